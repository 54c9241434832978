"""Published checkpoints of FLM and FMLM (Lightning files of arXiv 2602.16813's code) as models of this package.

Their network is this one's with other choices, so the weights go over one to one, by name; the averaged ones are a list
in the order of the module's parameters. What the tensors say (V, d, blocks, heads, one time or two) is taken from
them, and has to be what the file's own settings say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowlm.backbone import BackboneConfig
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.inert import StoredTensor, plain, read_torch_file
from flowlm.model import FlowLM
from flowlm.weights import misfits

__all__ = ["WEIGHTS", "convert"]

WEIGHTS = ("averaged", "raw")
PREFIX = "backbone."
BEGINNINGS = ("[CLS]", "<|endoftext|>")
"""Of a row of LM1B and of OpenWebText."""
ATTENTION_SOFTCAP = 50.0
"""c of the scores in all releases."""
LOGIT_SOFTCAP = 30.0
"""c of the output in releases since 2026-04; there was none before, and no tensor tells."""

OURS = ("flm", "fmlm")
"""What algorithms that are converted begin with, in a file's settings: "flm", "flm_distill" …"""

_INNER = {
    "norm1.weight": "norm1.weight",
    "norm2.weight": "norm2.weight",
    "attn_qkv.weight": "qkv.weight",
    "attn_out.weight": "out.weight",
    "mlp.0": "up",
    "mlp.2": "down",
    "adaLN_modulation": "modulation",
}
_OUTER = {
    "vocab_embed.embedding": "embedding",
    "sigma_map.mlp": "time_embedding.mlp",
    "sigma_map_prime.mlp": "end_embedding.mlp",
    "output_layer.norm_final": "backbone.norm",
    "output_layer.adaLN_modulation": "backbone.modulation",
    "output_layer.linear": "head",
}
_BUFFER = "rotary_emb.inv_freq"
"""The one tensor that is no parameter: in the state, not in the averages. It tells the width of a head."""


def our_name(name: str) -> str:
    """A parameter's name here, of its name there, without prefix. KeyError: there is no such parameter."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    table, start, rest = (_INNER, f"backbone.blocks.{block[1]}.", block[2]) if block else (_OUTER, "", name)
    for theirs, ours in table.items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            return start + ours + rest[len(theirs) :]
    raise KeyError(name)


def convert(
    checkpoint: Path,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    weights: str = "averaged",
    length: int = 0,
    logit_softcap: float = LOGIT_SOFTCAP,
    say: Callable[[str], None] | None = None,
) -> FlowLM:
    """Write a published checkpoint into `folder`, to be generated from, evaluated, taught from or trained on.

    Args:
        checkpoint: a Lightning file.
        folder: made when missing; the model's files in it are replaced, when all has been read.
        tokenizer: of the same vocabulary.
        weights: "averaged" (EMA, which the paper reports) or "raw".
        length: L; 0 takes what the file says.
        logit_softcap: c of the output; 0 for releases before 2026-04.
        say: where plain messages go.

    Returns:
        The model, as it will be loaded.

    Raises:
        ValueError: the file is damaged, of another family, or without averages; sizes that do not fit each other or the
            tokenizer. Nothing is then written.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights = {weights!r}: use 'averaged' or 'raw'")
    content = read_torch_file(checkpoint)
    try:
        tensors, outside = _state(content)
        config = _config(tensors, _said(content), length, logit_softcap, tokenizer)
        state = {our_name(name): stored.load() for name, stored in _chosen(content, tensors, weights).items()}
        denoiser = Denoiser(config)
        _fill(denoiser, state)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    if say is not None:
        say(_told(config, denoiser, weights, _step(content)))
        if outside:
            say(f"left out, being no part of the network: {', '.join(sorted(outside))}")
    model = FlowLM(denoiser.eval(), tokenizer)
    begin = next((token for token in BEGINNINGS if _has(tokenizer, token)), "")
    if begin:
        # Both published models learned passages that were joined, cut into rows, and framed.
        model.data = {"rows": "wrap", "bos": begin}
    model.save_pretrained(folder)
    return FlowLM.from_pretrained(folder)


def _has(tokenizer: Tokenizer, token: str) -> bool:
    try:
        tokenizer.id(token)
    except ValueError:
        return False
    return True


def _state(content: Any) -> tuple[dict[str, StoredTensor], set[str]]:
    """The network's tensors by their names there, and what else is in the state."""
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, StoredTensor) for name, value in state.items()
    ):
        raise ValueError("it has no state_dict of tensors: it is no Lightning checkpoint")
    tensors = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    unknown = []
    for name in tensors:
        try:
            our_name(name)
        except KeyError:
            unknown += [name] if name != _BUFFER else []
    missing = [
        name
        for name in ("vocab_embed.embedding", "blocks.0.attn_qkv.weight", "sigma_map.mlp.2.weight", _BUFFER)
        if name not in tensors
    ]
    if unknown or missing:
        raise ValueError(
            "its network is not that of FLM and FMLM"
            + (f"; unknown: {', '.join(unknown[:8])}{', …' * (len(unknown) > 8)}" if unknown else "")
            + (f"; missing: {', '.join(missing)}" if missing else "")
        )
    return tensors, {name for name in state if not name.startswith(PREFIX)}


def _said(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model as the file has them, as far as they are plain. ValueError: those of another family."""
    said = plain(content.get("hyper_parameters"))
    if not isinstance(said, dict):
        return {}
    inner = said.get("config")
    if not isinstance(inner, dict):
        inner = {}
    model = inner.get("model")
    algorithm = inner.get("algo", said.get("algo"))
    if isinstance(algorithm, dict):
        algorithm = algorithm.get("name")
    if isinstance(algorithm, str) and not algorithm.lower().startswith(OURS):
        raise ValueError(
            f"its settings say algo = {algorithm!r}, whose tensors may be those of FLM and mean something else: only "
            "FLM and FMLM are converted"
        )
    return said | (model if isinstance(model, dict) else {})


def _config(
    tensors: Mapping[str, StoredTensor],
    said: Mapping[str, Any],
    length: int,
    logit_softcap: float,
    tokenizer: Tokenizer,
) -> DenoiserConfig:
    """What the network is made of: from its tensors, whatever the file says of itself."""
    shapes = [tensors[name].shape for name in ("vocab_embed.embedding", _BUFFER)]
    if [len(shape) for shape in shapes] != [2, 1] or any(0 in shape for shape in shapes):
        raise ValueError(f"its embedding and the angles of its positions have shapes {shapes}: it is damaged")
    (vocab, width), (half,) = shapes
    head_width = 2 * half
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    up, conditioning = tensors.get("blocks.0.mlp.0.weight"), tensors["sigma_map.mlp.2.weight"]
    if up is None or len(up.shape) != 2 or len(conditioning.shape) != 2 or width % head_width:
        raise ValueError(
            "its first block or its times have no MLP, or its heads do not divide its width: it is damaged"
        )
    found = {
        "vocab_size": vocab,
        "hidden_size": width,
        "n_blocks": len(blocks),
        "n_heads": width // head_width,
        "cond_dim": conditioning.shape[0],
    }
    for name, value in found.items():
        if name in said and said[name] != value:
            raise ValueError(f"its settings say {name} = {said[name]}, its tensors {value}: it is damaged")
    if tokenizer.vocab_size != vocab:
        raise ValueError(
            f"the model has {vocab} tokens and the tokenizer {tokenizer.vocab_size}: give the tokenizer it was trained "
            "with (BERT's, 30,522, for LM1B; GPT-2's with a pad, 50,258, for OpenWebText)"
        )
    known = said.get("length")
    if length and type(known) is int and length != known:
        raise ValueError(f"it was trained with passages of {known} tokens, and {length} were asked for")
    if not length and type(known) is not int:
        raise ValueError(
            "it does not say how long its passages are: give --length (128 for LM1B, 1024 for OpenWebText)"
        )
    dropout = said.get("dropout", 0.1)
    return DenoiserConfig(
        vocab_size=vocab,
        vocabulary=tokenizer.vocabulary_sha256,
        length=length or int(known),  # type: ignore[arg-type]
        two_times=any(name.startswith("sigma_map_prime.") for name in tensors),
        logit_softcap=logit_softcap,
        embedding_scale=1.0,
        local_posterior=False,
        prior_rank=0,
        local_tokens=0,
        backbone=BackboneConfig(
            width=width,
            depth=len(blocks),
            heads=found["n_heads"],
            conditioning=found["cond_dim"],
            mlp_ratio=up.shape[0] / width,
            activation="gelu",
            dropout=dropout if isinstance(dropout, int | float) else 0.1,
            attention_softcap=ATTENTION_SOFTCAP,
            position="rotary",
            qk_norm=False,
        ),
    )


def _chosen(
    content: Mapping[str, Any], tensors: Mapping[str, StoredTensor], weights: str
) -> dict[str, StoredTensor]:
    """The parameters by their names there: as trained, or the averages, which are a list in the same order."""
    raw = {name: stored for name, stored in tensors.items() if name != _BUFFER}
    if weights == "raw":
        return raw
    ema = content.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or not shadow:
        raise ValueError("it has no averaged weights: take the others with --weights raw")
    if len(shadow) != len(raw):
        raise ValueError(
            f"it averages {len(shadow)} tensors, and the network has {len(raw)}: which is which cannot be told; take "
            "the others with --weights raw"
        )
    for (name, stored), average in zip(raw.items(), shadow, strict=True):
        if not isinstance(average, StoredTensor) or average.shape != stored.shape:
            raise ValueError(f"its average of {name} has another shape: they are not in the network's order")
    return dict(zip(raw, shadow, strict=True))


def _fill(denoiser: Denoiser, state: dict[str, Tensor]) -> None:
    if wrong := misfits(dict(denoiser.named_parameters()), state):
        raise ValueError("its tensors do not make up a network: " + "; ".join(wrong))
    denoiser.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    if not all(bool(value.isfinite().all()) for value in denoiser.parameters()):
        raise ValueError("some of its weights are not finite")


def _step(content: Mapping[str, Any]) -> int | None:
    step = content.get("global_step")
    return step if type(step) is int else None


def _told(config: DenoiserConfig, denoiser: Denoiser, weights: str, step: int | None) -> str:
    b, count = config.backbone, sum(p.numel() for p in denoiser.parameters())
    parts = [
        "FMLM (two times)" if config.two_times else "FLM (one time)",
        f"{weights} weights" + (f" of step {step:,}" if step is not None else ""),
        f"{count:,} parameters",
        f"V = {config.vocab_size:,}",
        f"L = {config.length}",
        f"d = {b.width}",
        f"{b.depth} blocks of {b.heads} heads",
        f"MLP ×{b.mlp_ratio:g}",
        f"conditioning {b.conditioning}",
        f"dropout {b.dropout:g}",
        f"scores capped at {b.attention_softcap:g}",
        f"logits capped at {config.logit_softcap:g}" if config.logit_softcap else "logits not capped",
    ]
    return ", ".join(parts)
