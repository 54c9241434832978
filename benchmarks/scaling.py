"""What training on many GPUs should cost, from figures of a single one: `docs/scaling.md` is written from it.

    all-reduce of n GPUs: 2 (n-1)/n · bytes / bandwidth
    shards, whose weights are gathered for the forward and the backward pass and gradients scattered: 3 (n-1)/n · …

Operations and memory are those that `flowlm info` counts of the presets. No machine is measured here: the constants are
assumptions, and wait for measured figures.

    python benchmarks/scaling.py        writes the tables into docs/scaling.md
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

from flowlm.config import RunConfig, load_recipe
from flowlm.cost import H200, SINGLE, UTILISATION, Cost, cost_of

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"

RECIPES = ("lm1b-flm", "owt-flm")
GPUS = (8, 64, 512)
#: Of weights, gradients, AdamW's two moments and the average, float32.
STATE_BYTES = 5 * SINGLE
#: What communication may take of the time of computing before it is called a bottleneck.
TOLERATED = 0.1
#: Learning rate of Muon where its step is counted: any but 0, with which there is none.
MUON = 0.02


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes of eight."""

    flops: float = H200
    """Dense bfloat16, of one GPU, a second."""
    used: float = UTILISATION
    """Share of it that training reaches."""
    node: int = 8
    inside: float = 450e9
    """Bytes a second and direction of a GPU, within its node."""
    between: float = 50e9
    """The same between nodes."""
    written: float = 4e12
    """Bytes a second that a GPU writes to its memory: what drawing normals is bound by."""
    launch: float = 1e-5
    """Seconds from one kernel to the next: noise is drawn row by row."""

    def bandwidth(self, gpus: int) -> float:
        """Of the slowest link of a ring, bytes a second."""
        return self.inside if gpus <= self.node else self.between

    def seconds(self, flops: float) -> float:
        """Of so many operations."""
        return flops / (self.flops * self.used)

    def passed(self, times: int, size: float, gpus: int) -> float:
        """Seconds in which so many bytes go round a ring so many times."""
        return times * (gpus - 1) / gpus * size / self.bandwidth(gpus)


@functools.cache
def _config(recipe: str, rows: int) -> RunConfig:
    """What one GPU does with so many passages a step."""
    config = load_recipe(recipe)
    train = replace(config.train, batch=rows, micro_batch=min(config.train.micro_batch, rows))
    return replace(config, train=train)


@functools.cache
def _cost(recipe: str, rows: int) -> Cost:
    return cost_of(_config(recipe, rows))


@functools.cache
def muon_flops(recipe: str) -> float:
    """Of one step of Muon for all matrices inside the blocks, which every process takes."""
    config = _config(recipe, 1)
    with_it = replace(config, optim=replace(config.optim, muon_lr=MUON))
    return cost_of(with_it).step_flops - _cost(recipe, 1).step_flops


@dataclass(frozen=True)
class Step:
    """One optimizer step of so many passages on so many GPUs.

    Args:
        recipe, machine: what is trained on what.
        gpus: n.
        batch: passages over all of them, a multiple of their number; as the recipe says when 0.
    """

    recipe: str
    gpus: int
    batch: int = 0
    machine: Machine = Machine()

    @property
    def rows(self) -> int:
        """Passages of one GPU."""
        return (self.batch or load_recipe(self.recipe).train.batch) // self.gpus

    @property
    def micro_batch(self) -> int:
        """Passages of a forward pass of one GPU."""
        return _config(self.recipe, self.rows).train.micro_batch

    @property
    def cost(self) -> Cost:
        """What one GPU computes and holds."""
        return _cost(self.recipe, self.rows)

    @property
    def computing(self) -> float:
        """Seconds of forward and backward."""
        return self.machine.seconds(self.cost.step_flops)

    @property
    def communicating(self) -> float:
        """Seconds of DDP's all-reduce of float32 gradients."""
        return self.machine.passed(2, SINGLE * self.cost.parameters, self.gpus)

    @property
    def gathering(self) -> float:
        """Seconds of FSDP2's gathers and scatters, once for each forward pass."""
        calls = math.ceil(self.rows / self.micro_batch)
        return calls * self.machine.passed(3, SINGLE * self.cost.parameters, self.gpus)

    @property
    def drawing(self) -> float:
        """Seconds of drawing the noise, d float32 normals a token, a kernel for each passage."""
        model = load_recipe(self.recipe).model
        each = SINGLE * model.length * model.backbone.width / self.machine.written
        return self.rows * (each + self.machine.launch)

    @property
    def seconds(self) -> float:
        """Of the step by DDP: nothing is hidden behind anything."""
        return self.drawing + self.computing + self.communicating

    @property
    def efficiency(self) -> float:
        """Share of the step in which it computes."""
        return self.computing / self.seconds

    @property
    def least_batch(self) -> int:
        """Passages at which the all-reduce takes no more than `TOLERATED` of computing."""
        rows = 1
        while self.machine.seconds(_cost(self.recipe, rows).step_flops) * TOLERATED < self.communicating:
            rows *= 2
        low, high = rows // 2, rows
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.machine.seconds(_cost(self.recipe, middle).step_flops) * TOLERATED
            low, high = (low, middle) if enough >= self.communicating else (middle, high)
        return self.gpus * high

    def memory(self, shard: bool = False) -> float:
        """Bytes of one GPU.

        Args:
            shard: by FSDP2, of an FLM: what lies outside the blocks is whole during a step, with its gradients, and two
                blocks are at a time.
        """
        cost = self.cost
        if not shard:
            return cost.memory.total
        block = cost.backbone / load_recipe(self.recipe).model.backbone.depth
        outside = cost.parameters - cost.backbone
        state = STATE_BYTES * cost.parameters / self.gpus + 2 * SINGLE * (outside + 2 * block)
        return state + cost.memory.activations


def tables() -> str:
    """The tables of docs/scaling.md."""
    parts = []
    for recipe in RECIPES:
        one, model = Step(recipe, 8), load_recipe(recipe).model
        each = one.cost.step_flops / (one.rows * model.length)
        machine = one.machine
        speed, muon = machine.flops * machine.used / each, machine.seconds(muon_flops(recipe))
        parts.append(
            f"**`{recipe}`** (V = {model.vocab_size:,}, L = {model.length:,}, {one.cost.parameters / 1e6:.0f} million "
            f"parameters): {each / 1e9:.2f} GFLOP a token, {speed:,.0f} tokens a second of one GPU while it computes. "
            f"Muon, where it is used, adds {1e3 * muon:.1f} ms a step on every GPU.\n"
        )
        head = (
            "GPUs",
            "passages of each",
            "at once",
            "noise",
            "computing",
            "all-reduce",
            "step",
            "computing, share",
        )
        head += (
            "batch for 10 % all-reduce",
            "gathers and scatters of shards",
            "memory, DDP",
            "memory, FSDP2",
        )
        lines = ["| " + " | ".join(head) + " |", "|" + " --: |" * len(head)]
        for gpus in GPUS:
            step = Step(recipe, gpus)
            cells = (
                f"{gpus}",
                f"{step.rows}",
                f"{step.micro_batch}",
                *(f"{1e3 * t:.1f} ms" for t in (step.drawing, step.computing, step.communicating)),
                f"{1e3 * step.seconds:.1f} ms",
                f"{100 * step.efficiency:.0f} %",
                f"{step.least_batch:,}",
                f"{1e3 * step.gathering:.1f} ms",
                *(f"{step.memory(shard) / 1e9:.1f} GB" for shard in (False, True)),
            )
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def written(document: str) -> str:
    """A document with the tables between its marks as they are now."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables()}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
