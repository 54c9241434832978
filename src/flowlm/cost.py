"""What a run costs, counted from its recipe: parameters, tokens, FLOPs, memory, hours. Nothing is trained for it.

FLOPs are products of matrices alone, an addition and a multiplication being two, as `flowlm.training.flops` counts
them: by formula, since a model of the paper's size cannot be run to be counted. A weight takes two of them forward and
four backward for each token it meets; logits of all chunks but the first are made again on the way back.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from flowlm import posterior
from flowlm.config import RunConfig, default_run_folder, load_recipe, recipe_path
from flowlm.data.corpora import DataConfig
from flowlm.data.grammar import Grammar
from flowlm.data.registry import TOKENIZERS
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import DenoiserConfig
from flowlm.device import describe, resolve_device, resolve_dtype
from flowlm.families import family, family_of
from flowlm.training.optim import is_hidden_matrix

__all__ = ["Cost", "Memory", "cost_of", "described", "here", "lines", "models_of"]

#: FLOP/s of an H200 in dense bfloat16 by its maker, and the share of a device's speed that training is taken to reach.
H200, UTILISATION = 989e12, 0.4
#: Objectives that have a formula.
COUNTED = ("flow", "flow-map", "ar", "mdlm", "sedd", "duo", "sdtt", "duo-dcd", "di4c", "duo-di4c")
#: Of these, mixtures over latents.
MIXED = ("di4c", "duo-di4c")
#: Bytes of a number in float32, in which weights, gradients, moments and averages are kept.
SINGLE = 4
#: Where Linux says how many bytes a container may take, or "max".
CONTAINER = Path("/sys/fs/cgroup/memory.max")
#: Sinusoids that `TimeEmbedding` makes of a time.
SINUSOIDS = 256


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that trains, by what they are for."""

    weights: int
    gradients: int
    moments: int
    """Of the optimizer: two numbers a parameter with AdamW, one with Muon."""
    average: int
    """The averaged weights."""
    teacher: int
    activations: int
    """At the peak of one micro-batch: what the backward pass needs, and what is there for a moment. An estimate."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    parameters: int
    backbone: int
    """Of the parameters, those of the transformer itself, without embedding and head."""
    tokens: int
    """Steps × batch × L."""
    step_flops: float
    """Of an optimizer step over the whole batch, the mean over the run."""
    run_flops: float
    memory: Memory

    @property
    def gpu_hours(self) -> float:
        """On one H200, at 40 % of its speed in dense bfloat16."""
        return self.run_flops / (H200 * UTILISATION) / 3600


def cost_of(
    config: RunConfig,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    models: tuple[DenoiserConfig, DenoiserConfig | None] | None = None,
) -> Cost:
    """The cost of a run.

    Args:
        config: the run's. Its teacher may be a run or the folder that a recipe would make (`models_of`).
        dtype: compute dtype, which activations are kept in.
        device: "cuda" or "cpu": kernels keep different tensors for the backward pass.
        models: the model and its teacher; `models_of` the run when None.

    Raises:
        ValueError: the size of the vocabulary is not known yet, or no teacher; an objective that has no formula here.
    """
    if config.objective not in COUNTED:
        raise ValueError(
            f"objective = {config.objective!r} is not counted by formula, only by running it: known are "
            f"{', '.join(map(repr, COUNTED))}"
        )
    if config.objective == "flow-map" and config.flow_map.identity != "psd":
        raise ValueError(
            f"flow_map.identity = {config.flow_map.identity!r} is not counted by formula, only by running it: known is "
            "'psd'"
        )
    model, teacher = models or models_of(config)
    student = _Sizes(model)
    taught = None if teacher is None else _Sizes(teacher)
    steps, batch = config.train.steps, config.train.batch
    step = _flops(config, student, taught)
    return Cost(
        parameters=student.parameters,
        backbone=student.backbone,
        tokens=steps * batch * model.length,
        step_flops=step,
        run_flops=step * steps,
        memory=_memory(config, student, taught, dtype, device),
    )


def models_of(config: RunConfig) -> tuple[DenoiserConfig, DenoiserConfig | None]:
    """The model that a run trains, and its teacher.

    A teacher that has not been trained is known by its recipe, if the run names the folder that this recipe makes.

    Raises:
        ValueError: V is not known, or the teacher is neither a run nor of a recipe.
    """
    kind = family(config.objective)
    teacher = _teacher(config.teacher) if config.teacher else None
    if teacher is not None:
        kind.check_source(config, teacher, config.teacher)
    elif kind.taught and (
        config.objective != "flow-map" or config.flow_map.asks_the_teacher or config.flow_map.freeze_embedding
    ):
        raise ValueError("what a student costs is known with its teacher: name it with --teacher RUN")
    model = dataclasses.replace(teacher or config.model, **kind.fill(config))
    return dataclasses.replace(model, vocab_size=model.vocab_size or _vocabulary(config.data)), teacher


def _vocabulary(data: DataConfig) -> int:
    """V as far as it is known before a text is read: of words, at most so many."""
    if data.vocab_size:
        return data.vocab_size
    if data.tokenizer in TOKENIZERS:
        return TOKENIZERS[data.tokenizer].vocab_size
    if data.corpus == "grammar" and data.tokenizer == "words":
        return Tokenizer.train_words((), vocab=Grammar().vocabulary).vocab_size
    raise ValueError(
        "what it costs is known with the size of its vocabulary, which the data decides: say --model.vocab-size V"
    )


def _teacher(name: str) -> DenoiserConfig:
    from flowlm.model import read_model_config

    folder = Path(name)
    if folder.exists():
        return read_model_config(folder)
    if folder == default_run_folder(folder.name):
        recipe = load_recipe(recipe_path(folder.name))
        return models_of(recipe)[0]
    raise ValueError(
        f"the teacher {name} is not there, nor is it a folder that a recipe makes, such as "
        f"{default_run_folder('lm1b-flm')}: name a run with --teacher RUN"
    )


# -- parameters ------------------------------------------------------------------------------------------------


class _Sizes:
    """What is counted of a network: its parameters, and the FLOPs of a call on so many rows of its length."""

    def __init__(self, config: DenoiserConfig):
        self.config = config
        shape = config.backbone
        self.width, self.length, self.vocab = shape.width, config.length, config.vocab_size
        self.hidden = int(shape.width * shape.mlp_ratio)
        # Neither a clock nor the local posterior can be made of tensors without content: the one has no parameters,
        # and those of the other are added.
        bare = dataclasses.replace(config, clock="uniform", local_posterior=False)
        with torch.device("meta"):
            network = family_of(config).network(bare)
        named = {name: p.numel() for name, p in network.named_parameters()}
        self.told_apart = self._told_apart()
        local = self.told_apart * (self.width + 1 + config.prior_rank) + config.prior_rank * config.length
        self.local = local + shape.conditioning + 1 if self.told_apart else 0
        self.parameters = sum(named.values()) + self.local
        self.backbone = sum(size for name, size in named.items() if "backbone." in name)
        self.hidden_matrices = [
            tuple(p.shape) for name, p in network.named_parameters() if is_hidden_matrix(name, p)
        ]
        #: Weights of the matrices inside the blocks, that every token meets.
        self.inside = sum(m * n for m, n in self.hidden_matrices)
        #: Times that it reads, and a latent, which is embedded as they are; 0 of a family that reads none.
        told = ("time_embedding", "end_embedding", "latent_embedding")
        self.times = sum(getattr(network, name, None) is not None for name in told)
        self.embedding, self.mean = named["embedding"], named.get("mean", 0)

    def _told_apart(self) -> int:
        """Tokens that the local posterior weighs, with "none of these"; 0 where there is none."""
        config = self.config
        if config.family != "flow" or not config.local_posterior:
            return 0
        return config.local_tokens + 1 if 0 < config.local_tokens < self.vocab else self.vocab

    # -- FLOPs of rows: each a whole sequence; shares of rows are means ---------------------------------------

    def forward(self, rows: float) -> float:
        """A call without the head."""
        tokens, shape = rows * self.length, self.config.backbone
        attention = shape.depth * 4 * tokens * self.length * self.width
        times = self.times * 2 * rows * shape.conditioning * (SINUSOIDS + shape.conditioning)
        return (
            2 * tokens * self.inside + attention + self._modulation(rows) + times + self._local(tokens, rows)
        )

    def backward(self, rows: float) -> float:
        """What a call and its head take on the way back, with what is made again there."""
        tokens, shape = rows * self.length, self.config.backbone
        # Two products of a forward pass have two gradients each; a fused kernel makes the scores again.
        attention = shape.depth * (10 if self.fused else 8) * tokens * self.length * self.width
        modulation = (2 if self.times else 1) * self._modulation(rows)  # to a constant no gradient passes
        times = self.times * 2 * rows * shape.conditioning * (SINUSOIDS + 2 * shape.conditioning)
        head = 2 * self.head(tokens) + self.head(self.again(tokens))
        return 4 * tokens * self.inside + attention + modulation + times + head + self._local_backward(tokens)

    @property
    def fused(self) -> bool:
        """Whether attention is one kernel, which keeps no scores."""
        return self.config.backbone.attention_backend != "math" and not self.config.backbone.attention_softcap

    def head(self, tokens: float) -> float:
        """Logits; as many once more for a mean of embeddings under them."""
        return 2 * tokens * self.width * self.vocab

    def again(self, tokens: float) -> float:
        """Of so many tokens, those beyond the first chunk of logits."""
        return max(0.0, tokens - self.chunk)

    @property
    def chunk(self) -> int:
        """Tokens whose logits are there at once."""
        return max(1, posterior.CHUNK_ELEMENTS // self.vocab)

    def evidence(self) -> float:
        """The weights of the local posterior, made once for a micro-batch."""
        if not self.told_apart or self.config.state != "one-hot":
            return 0
        return 6 * self.vocab * self.width * min(self.vocab, self.width)

    def _modulation(self, rows: float) -> float:
        shape = self.config.backbone
        return 2 * rows * shape.conditioning * self.width * (6 * shape.depth + 2)

    def _local(self, tokens: float, rows: float) -> float:
        if not self.told_apart:
            return 0
        gain = 2 * rows * self.config.backbone.conditioning
        # The prior of positions is the same for all rows. Of less than a row, that share of calls has one.
        return 4 * tokens * self.width * self.told_apart + min(1.0, rows) * self._prior() + gain

    def _local_backward(self, tokens: float) -> float:
        if not self.told_apart:
            return 0
        beyond = max(0.0, tokens - max(1, posterior.CHUNK_ELEMENTS // self.told_apart))
        evidence_again = 2 * beyond * self.width * self.told_apart
        return 4 * tokens * self.width * self.told_apart + 2 * self._prior() + evidence_again

    def _prior(self) -> float:
        return 2 * self.length * self.config.prior_rank * self.told_apart


# -- FLOPs of a step -------------------------------------------------------------------------------------------


def _flops(config: RunConfig, student: _Sizes, teacher: _Sizes | None) -> float:
    batch = config.train.batch
    size = min(config.train.micro_batch or batch, batch)
    parts = [size] * (batch // size) + ([batch % size] if batch % size else [])
    law, law_backward = _noise_law(config, student, teacher)
    optimizer = sum(map(_newton_schulz, student.hidden_matrices)) if config.optim.muon_lr else 0
    return optimizer + law + sum(_part_flops(config, student, teacher, rows) + law_backward for rows in parts)


def _part_flops(config: RunConfig, student: _Sizes, teacher: _Sizes | None, rows: int) -> float:
    """Of a micro-batch: draws, forward, backward."""
    tokens, v, d = rows * student.length, student.vocab, student.width
    if config.objective in MIXED:
        assert teacher is not None
        return _mixture(config.di4c.latents, student, teacher, rows)
    total = student.forward(rows) + student.head(tokens) + student.backward(rows) + student.evidence()
    kind = config.objective
    if kind in ("ar", "mdlm", "sedd"):
        return total
    if kind == "flow":
        return total + _noise(student, tokens, gradient=True)
    if kind == "duo":
        # Soft tokens, a mean of embeddings over the vocabulary, and its gradient in them.
        return total + config.duo.curriculum * 4 * tokens * v * d
    if kind == "flow-map":
        before = config.flow_map.flow_first
        shares = ((before, 1.0), (1 - before, config.flow_map.diagonal))
        return total + sum(
            share * _flow_map(config, student, teacher, rows, diagonal) for share, diagonal in shares if share
        )
    assert teacher is not None
    targets = {"sdtt": 2, "duo-dcd": 1}[kind]
    total += targets * (teacher.forward(rows) + teacher.head(tokens) + teacher.head(teacher.again(tokens)))
    return total + (teacher.head(tokens) if kind == "sdtt" else 0)  # what the first step opens is drawn


def _mixture(latents: int, student: _Sizes, teacher: _Sizes, rows: int) -> float:
    """Of Di4C: each row with every latent, by the student, and by it as it stands, going on from the teacher's step."""
    many, tokens = latents * rows, latents * rows * student.length
    own = student.forward(many) + student.head(tokens) + student.backward(many)
    drawn = teacher.forward(rows) + teacher.head(tokens) + student.forward(many) + student.head(tokens)
    # What the mixture is compared with has its logits made as often as the mixture's own.
    once = student.head(tokens) + teacher.head(tokens / latents)
    return own + drawn + once * (1 + student.again(tokens) / tokens)


def _flow_map(
    config: RunConfig, student: _Sizes, teacher: _Sizes | None, rows: int, diagonal: float
) -> float:
    """Noise and targets of the semigroup, with this share of the rows on the diagonal."""
    setting, length = config.flow_map, student.length
    tokens = rows * length
    on = diagonal * rows
    ends = setting.boundary * (rows - on)
    walked = ends if setting.boundary_target == "teacher" else 0.0
    pairs = rows - on - walked
    total = 2 * (student.forward(pairs) + student.head(pairs * length))  # δ_su with its mean, δ_ut
    if setting.target == "averaged":
        total += student.evidence()
    #: Of each token in the order of a batch, heads that its target asks.
    taught = on if teacher is not None and setting.diagonal_target == "teacher" else 0.0
    heads = [(on * length, 1 if taught else 0), (walked * length, 1), (pairs * length, 2)]
    if teacher is not None:
        total += teacher.forward(taught) + (teacher.evidence() if taught or walked else 0)
        total += setting.rollout_steps * teacher.forward(walked)
        total += 2 * (setting.rollout_steps - 1) * teacher.head(walked * length)
    left = float(student.chunk)
    for count, asked in heads:
        once = min(left, count)
        left -= once
        total += asked * (student.head(once) + 2 * student.head(count - once))
    if teacher is None or not (setting.freeze_embedding or setting.asks_the_teacher):
        return total + _noise(student, tokens, gradient=True)
    total += _noise(student, tokens, gradient=False)
    if setting.freeze_embedding:
        return total
    # The student's own state: what the teacher's embedding says of it, and, where no noise is drawn itself, the rest.
    return total + (2 if _low_rank(student) else 1) * _noise(student, tokens, gradient=True)


def _low_rank(model: _Sizes) -> bool:
    return model.vocab > 2 * model.width


def _noise(model: _Sizes, tokens: float, *, gradient: bool) -> float:
    """From normals to the noise state: a product, and its gradient in the embedding."""
    if model.config.state != "one-hot":
        return 0
    inner = model.width if _low_rank(model) else model.vocab
    return (4 if gradient else 2) * tokens * inner * model.width


def _noise_law(config: RunConfig, student: _Sizes, teacher: _Sizes | None) -> tuple[float, float]:
    """Of the low-rank noise: what is made once a step, and what goes back through it from each micro-batch."""
    d, gram = student.width, 2 * student.vocab * student.width**2
    flows = config.objective in ("flow", "flow-map")
    if not flows or not _low_rank(student) or student.config.state != "one-hot":
        return 0, 0
    if teacher is not None and config.flow_map.freeze_embedding:
        return 0, 0  # one law for the whole run
    if _couples(config, teacher):
        return 4 * gram + 4 * d**3, 2 * gram + 4 * d**3  # what follows from the teacher's alone is made once
    return 2 * gram + 2 * d**3, gram + 2 * d**3


def _couples(config: RunConfig, teacher: _Sizes | None) -> bool:
    """Whether one noise is seen through two embeddings, a teacher's and a student's, see `CoupledLowRankNoise`."""
    setting = config.flow_map
    return (
        config.objective == "flow-map"
        and teacher is not None
        and setting.asks_the_teacher
        and not setting.freeze_embedding
    )


def _newton_schulz(shape: tuple[int, ...]) -> float:
    """Muon's five steps on a matrix."""
    m, n = sorted(shape)
    return 5 * (4 * m * m * n + 2 * m**3)


# -- memory ----------------------------------------------------------------------------------------------------

#: Tensors of the size of a chunk of logits that a loss keeps for its backward pass.
_KEPT = {"flow": 1, "ar": 1, "mdlm": 1, "sedd": 1, "flow-map": 2, "duo": 3, "sdtt": 4, "duo-dcd": 4}
_KEPT |= dict.fromkeys(MIXED, 4)
#: And those which are there for a moment beside them, with their gradients.
_PASSING = 3
#: What a CPU holds beyond that, in such tensors: freed memory that is kept and does not fit (`keep_freed_memory`).
_PIECES = 10


def _memory(
    config: RunConfig, student: _Sizes, teacher: _Sizes | None, dtype: torch.dtype, device: str
) -> Memory:
    frozen = 0
    if student.config.state == "random" or (teacher is not None and _shares_embedding(config)):
        frozen = student.embedding + (student.mean if teacher is not None else 0)
    trained = student.parameters - frozen
    muons = student.inside if config.optim.muon_lr else 0
    # A student that becomes its own teacher, round by round, keeps the first one beside it.
    teachers = 2 if config.objective in ("sdtt", "duo-dcd") else 1
    kept = family(config.objective).keeps_teacher(config)
    return Memory(
        weights=SINGLE * student.parameters,
        gradients=SINGLE * trained,
        moments=SINGLE * (2 * trained - muons),
        average=SINGLE * student.parameters,
        teacher=SINGLE * teachers * teacher.parameters if teacher and kept else 0,
        activations=int(_activations(config, student, teacher, dtype, device)),
    )


def _shares_embedding(config: RunConfig) -> bool:
    return config.objective == "flow-map" and config.flow_map.freeze_embedding


def _activations(
    config: RunConfig, student: _Sizes, teacher: _Sizes | None, dtype: torch.dtype, device: str
) -> float:
    shape, d, v = student.config.backbone, student.width, student.vocab
    rows = min(config.train.micro_batch or config.train.batch, config.train.batch)
    rows *= config.di4c.latents if config.objective in MIXED else 1
    tokens, number = rows * student.length, dtype.itemsize
    scores = 0 if _one_kernel(student, dtype, device) else shape.heads * student.length * number
    # With a soft cap, its tanh and the softmax.
    scored = scores * (2 if shape.attention_softcap else 1)
    kept: float = shape.depth * tokens * (_block(student, dtype, device) + scored)
    # The state, the data's embedding, the noise, and what the backbone gives.
    kept += tokens * d * (3 * SINGLE + 2 * number)
    if number < SINGLE:
        # Autocast keeps its casts of the matrices, and the head's of the last chunks.
        kept += number * (student.inside + 2 * d * v)
    if student.told_apart:
        weighed = min(tokens, max(1, posterior.CHUNK_ELEMENTS // student.told_apart)) * student.told_apart
        kept += 3 * SINGLE * weighed + tokens * d * number
    logits = SINGLE * v * min(tokens, student.chunk)
    per_chunk = _KEPT[config.objective] + (1 if student.config.logit_softcap else 0)
    # The gradient of the head, of one chunk, before it is added to that of the others.
    passing: float = logits * (per_chunk + _PASSING) + SINGLE * d * v
    if config.objective == "flow-map":
        # A target's own forward pass: no more than a block of it at a time.
        paired = (1 - config.flow_map.diagonal) * tokens
        passing = max(passing, paired * (12 * d * number + 3 * scores))
        if _couples(config, teacher) and _low_rank(student):
            kept += 4 * SINGLE * d * v  # what the coupled noise keeps of two embeddings
    if config.objective == "duo" and config.duo.curriculum:
        passing = max(passing, 4 * SINGLE * student.length * v)
    return kept + logits * (per_chunk + (_PIECES if device == "cpu" else 0)) + passing


def _one_kernel(model: _Sizes, dtype: torch.dtype, device: str) -> bool:
    slow = device == "cpu" and dtype == torch.bfloat16 and model.config.backbone.attention_backend == "auto"
    return model.fused and not slow


def _block(model: _Sizes, dtype: torch.dtype, device: str) -> float:
    """Bytes that a block keeps of a token, but for scores."""
    shape, d, number = model.config.backbone, model.width, dtype.itemsize
    # What is normed, the norm, and it modulated. On a GPU autocast norms in float32.
    norms = 2 * d * (2 * SINGLE + number if device == "cuda" and number < SINGLE else 3 * number)
    # Queries, keys and values as they are multiplied, with those before their own norms; their mean; what is gated.
    streams = d * number * (3 + 1 + 2 + (2 if shape.qk_norm else 0))
    if _one_kernel(model, dtype, device):
        streams += 2 * d * number  # values within the product they come from, and the kernel's own output
    masks = 2 * d * (1 if device == "cuda" else number) if shape.dropout else 0
    return norms + streams + masks + 2 * model.hidden * number


# -- in words --------------------------------------------------------------------------------------------------


def described(config: RunConfig) -> list[str]:
    """The cost of a recipe and of running it here, or why it is not known, in lines."""
    try:
        said = lines(config, cost_of(config))
    except ValueError as error:
        return [f"cost: {error}"]
    try:
        return said + here(config)
    except ValueError as error:
        return [*said, f"here: {error}"]


def lines(config: RunConfig, cost: Cost) -> list[str]:
    """The cost in words, a line for each: what `flowlm info` prints and the head of a preset says."""
    train, memory = config.train, cost.memory
    rows = min(train.micro_batch or train.batch, train.batch)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in dataclasses.asdict(memory).items() if size)
    length = cost.tokens // (train.steps * train.batch)
    return [
        f"parameters: {cost.parameters:,}, of them {cost.backbone:,} in the backbone",
        f"tokens: {_power(cost.tokens)} ({train.steps:,} steps × {train.batch} passages × {length})",
        f"compute: {_power(cost.step_flops)} FLOPs a step, {_power(cost.run_flops)} for the run",
        f"memory: about {_bytes(memory.total)} a GPU, with {rows} passages in a forward pass, in bfloat16:",
        f"  {parts}",
        f"time: {cost.gpu_hours:,.3g} GPU hours, if an H200 reaches 40 % of its 989 TFLOP/s in dense bfloat16",
    ]


def here(config: RunConfig) -> list[str]:
    """Whether a run fits this machine, and how long it may take here, a line each.

    Raises:
        ValueError: as `cost_of`, or a device that is not there.
    """
    device = resolve_device(config.train.device)
    dtype, _ = resolve_dtype(config.train.dtype, device)
    name = str(dtype).removeprefix("torch.")
    kind = "cuda" if device.type == "cuda" else "cpu"
    cost, there = cost_of(config, dtype, kind), _memory_of(device)
    needed, most = cost.memory.total, largest_micro_batch(config, there, dtype, kind)
    where = "memory of its own" if device.type == "cuda" else "memory"
    fits = "it fits" if needed < there else f"it does not fit, by {_bytes(needed - there)}"
    rows = min(config.train.micro_batch or config.train.batch, config.train.batch)
    speed = _speed(device, dtype, _Sizes(models_of(config)[0]))
    taken = _time(cost.run_flops / (speed * UTILISATION))
    return [
        f"here: {describe(device)}, {_bytes(there)} of {where}",
        f"  in {name}, with {rows} passages in a forward pass, it takes about {_bytes(needed)}: {fits}",
        _most(most, config.train.batch),
        f"  an estimate: {taken}, at 40 % of the {speed / 1e9:,.0f} GFLOP/s that one product of matrices reaches",
    ]


def _most(rows: int, batch: int) -> str:
    if not rows:
        return "  not even one passage fits: take a smaller network, or more memory"
    return f"  the most that fit: {rows}" + (
        ", the whole batch" if rows == batch else f", --train.micro-batch {rows}"
    )


def largest_micro_batch(config: RunConfig, there: int, dtype: torch.dtype, device: str) -> int:
    """Passages in a forward pass with which a run takes less than so much memory: the whole batch, or else the
    largest power of two; 0 where not even one fits.

    Args:
        there: bytes.
        dtype, device: as in `cost_of`.
    """
    batch = config.train.batch
    rows = [batch, *(2**k for k in reversed(range(batch.bit_length())) if 2**k < batch)]
    for micro_batch in rows:
        train = dataclasses.replace(config.train, micro_batch=micro_batch)
        if cost_of(dataclasses.replace(config, train=train), dtype, device).memory.total < there:
            return micro_batch
    return 0


def _power(count: float) -> str:
    return f"{count:.2e}".replace("e+", "e")


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    for unit, least, length in (("days", 864_000, 86_400), ("hours", 3600, 3600), ("minutes", 60, 60)):
        if seconds >= least:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _memory_of(device: torch.device) -> int:
    """Bytes of the device; where the processor is the device, of the machine, or what a container has of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER.read_text(encoding="utf-8").strip() if CONTAINER.exists() else ""
    return min(whole, int(limit)) if limit.isdigit() else whole


def _speed(device: torch.device, dtype: torch.dtype, model: _Sizes, seconds: float = 0.5) -> float:
    """FLOP/s of the product (2048 × d)·(d × hidden), the best of those done in so many seconds, and at least two."""
    width, hidden = model.width, model.hidden
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2048, width, generator=generator).to(device, dtype)
    right = torch.randn(width, hidden, generator=generator).to(device, dtype)
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # a GPU has to be done with it
        best = min(best, time.perf_counter() - start)
        count += 1
    return 2 * 2048 * width * hidden / best
