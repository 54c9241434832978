"""What training on many GPUs should cost, from figures of a single one: `docs/scaling.md` is written from it.

    all-reduce of n GPUs: 2 (n-1)/n · bytes / bandwidth

No machine is measured here. The constants are assumptions, and wait for measured figures.

    python benchmarks/scaling.py        writes the tables into docs/scaling.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"

GPUS = (8, 64, 512)
#: Of weights, gradients, AdamW's two moments and the average, float32.
STATE_BYTES = 4 + 4 + 8 + 4
#: Kept for the backward pass, of a token in a block, over the width: eighteen activations of bfloat16.
KEPT = 36
#: What communication may take of the time of computing before it is called a bottleneck.
TOLERATED = 0.1


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes of eight."""

    flops: float = 989e12
    """Dense bfloat16, of one GPU, a second."""
    used: float = 0.4
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

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds of a ring all-reduce of so many bytes."""
        return 2 * (gpus - 1) / gpus * size / self.bandwidth(gpus)


@dataclass(frozen=True)
class Model:
    """A network of the published size."""

    vocab_size: int
    length: int
    parameters: float
    width: int = 768
    depth: int = 12
    told_apart: int = 512

    @property
    def block(self) -> float:
        """Weights of the matrices of one block: attention 4 d², MLP 8 d²."""
        return 12 * self.width**2

    @property
    def flops_per_token(self) -> float:
        """Of one training step of an FLM: three times forward; the head once more, made again for the backward pass."""
        d = self.width
        attention = 4 * self.length * d * self.depth
        inner = 2 * (self.block * self.depth + d * d + 2 * (self.told_apart + 1) * d) + attention
        return 3 * inner + 4 * 2 * d * self.vocab_size

    @property
    def muon_flops(self) -> float:
        """Of one step of Muon: five iterations of A = XXᵀ, A², AX for each matrix; every process takes all of them."""
        d = self.width
        shapes = ((d, 3 * d), (d, d), (d, 4 * d), (d, 4 * d))
        return self.depth * sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)

    @property
    def gradient_bytes(self) -> float:
        """What an all-reduce moves, float32."""
        return 4 * self.parameters

    @property
    def activation_bytes_per_token(self) -> float:
        return KEPT * self.width * self.depth


@dataclass(frozen=True)
class Step:
    """One optimizer step of so many passages on so many GPUs.

    Args:
        model, machine: what is trained on what.
        gpus: n.
        batch: passages over all of them, at least one for each.
    """

    model: Model
    gpus: int
    batch: int
    machine: Machine = Machine()

    @property
    def rows(self) -> float:
        """Passages of one GPU."""
        return self.batch / self.gpus

    @property
    def computing(self) -> float:
        """Seconds of forward and backward."""
        return self.machine.seconds(self.rows * self.model.length * self.model.flops_per_token)

    @property
    def muon(self) -> float:
        """Seconds of Muon, the same on any number of GPUs."""
        return self.machine.seconds(self.model.muon_flops)

    @property
    def communicating(self) -> float:
        """Seconds of DDP's all-reduce."""
        return self.machine.all_reduce(self.model.gradient_bytes, self.gpus)

    @property
    def drawing(self) -> float:
        """Seconds of drawing the noise, d float32 normals a token, a kernel for each passage."""
        each = 4 * self.model.length * self.model.width / self.machine.written
        return self.rows * (each + self.machine.launch)

    @property
    def seconds(self) -> float:
        """Of the step: nothing is hidden behind anything."""
        return self.drawing + self.computing + self.muon + self.communicating

    @property
    def efficiency(self) -> float:
        """Share of the step in which it computes."""
        return self.computing / self.seconds

    @property
    def bottleneck(self) -> str:
        """What takes longest beside computing."""
        parts = {"noise": self.drawing, "Muon": self.muon, "all-reduce": self.communicating}
        return max(parts, key=lambda name: parts[name])

    @property
    def least_batch(self) -> int:
        """Passages at which the all-reduce takes no more than `TOLERATED` of computing."""
        each = self.machine.seconds(self.model.length * self.model.flops_per_token)
        return self.gpus * math.ceil(self.communicating / TOLERATED / each)

    def memory(self, shard: bool, micro_batch: int) -> float:
        """Bytes of one GPU: state, and activations of a micro-batch.

        Args:
            shard: by FSDP2, of an FLM: what lies outside the blocks is whole during a step, with its gradients, and two
                blocks are at a time.
            micro_batch: passages of a forward pass.
        """
        blocks = self.model.block * self.model.depth
        state = STATE_BYTES * self.model.parameters
        if shard:
            state = state / self.gpus + 8 * (self.model.parameters - blocks) + 8 * 2 * self.model.block
        return state + micro_batch * self.model.length * self.model.activation_bytes_per_token


#: Of lm1b-flm and owt-flm.
MODELS = (Model(30_522, 128, 139_292_986), Model(50_258, 1024, 169_627_218))
BATCH = 512


def tables() -> str:
    """The tables of docs/scaling.md."""
    parts = []
    for model in MODELS:
        speed = Machine().flops * Machine().used / model.flops_per_token
        parts.append(
            f"**V = {model.vocab_size:,}, L = {model.length:,}**: {model.flops_per_token / 1e9:.2f} GFLOP a token, "
            f"{speed:,.0f} tokens a second of one GPU while it computes.\n"
        )
        head = (
            "GPUs",
            "passages of each",
            "noise",
            "computing",
            "Muon",
            "all-reduce",
            "step",
            "computing, share",
        )
        head += ("beside computing most is", "batch for 10 % all-reduce", "memory, DDP", "memory, FSDP2")
        lines = ["| " + " | ".join(head) + " |", "|" + " --: |" * len(head)]
        for gpus in GPUS:
            step = Step(model, gpus, BATCH)
            micro = min(8, int(step.rows))
            cells = (
                f"{gpus}",
                f"{step.rows:.0f}",
                *(f"{1e3 * t:.1f} ms" for t in (step.drawing, step.computing, step.muon, step.communicating)),
                f"{1e3 * step.seconds:.1f} ms",
                f"{100 * step.efficiency:.0f} %",
                step.bottleneck,
                f"{step.least_batch:,}",
                *(f"{step.memory(shard, micro) / 1e9:.1f} GB" for shard in (False, True)),
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
