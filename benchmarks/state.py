"""One training step with the state y = xE that the package carries, against the one-hot state x it stands for.

The dense step draws z (B, L, V), makes x_t = (1-t) z + t·onehot, and reads it through the product y = x_t E, by which
the gradient reaches E. Network, local posterior, loss and optimizer are the same objects in both.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import CPU, Row, compare, memory_of_arm, report_memory
from training_step import DenseFlow, DenseFlowInPlace, TrainingStep, clock_of, optimizer_of

from flowlm.backbone import BackboneConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.objectives import FlowObjective


@dataclass(frozen=True)
class Case:
    """One size at which the states are compared."""

    vocab: int
    batch: int = 32
    length: int = 64
    width: int = 256
    depth: int = 4
    local_posterior: bool = True
    dtype: str = "float32"
    """Compute dtype of the network; the state stays float32, as in the package."""
    device: str = "cpu"


def cases(quick: bool, dtype: torch.dtype, device: torch.device = CPU) -> list[Case]:
    """V = 512 lies at 2d, where the package draws z itself; the local posterior is on, as by default, and off."""
    name = str(dtype).removeprefix("torch.")
    if quick:
        return [Case(4096, 8, 64, 32, 1, True, name, str(device))]
    sizes = [(v, on) for v in (512, 8192, 50257) for on in (True, False)]
    return [Case(v, local_posterior=on, dtype=name, device=str(device)) for v, on in sizes]


#: What an arm's objective is; the package's first.
ARMS: dict[str, type[FlowObjective]] = {
    "low-rank": FlowObjective,
    "dense": DenseFlow,
    "dense, in place": DenseFlowInPlace,
}


def steps_of(case: Case) -> dict[str, TrainingStep]:
    """A training step with each state, of one denoiser with its optimizer on one batch of random tokens."""
    torch.manual_seed(0)
    shape = BackboneConfig(width=case.width, depth=case.depth)
    model = Denoiser(
        DenoiserConfig(
            vocab_size=case.vocab,
            length=case.length,
            local_posterior=case.local_posterior,
            backbone=shape,
        )
    ).to(case.device)
    optimizer = optimizer_of(model)
    tokens = torch.randint(case.vocab, (case.batch, case.length)).to(case.device)
    return {
        arm: TrainingStep(model, objective(clock_of(model)), optimizer, tokens, case.dtype)
        for arm, objective in ARMS.items()
    }


#: Steps in the process whose memory is taken: the second begins with what the first left.
STEPS = 2


def work(steps: dict[str, TrainingStep], arm: str) -> None:
    """What a process does whose memory is taken, everything being built."""
    for _ in range(STEPS):
        steps[arm]()


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each state in each case."""
    rows: list[Row] = []
    todo = cases(quick, dtype, device)
    peaks = []
    # All of them first: the peak of a process counts in that of the one which started it.
    for case in todo:
        say(f"state: memory of a step at V = {case.vocab:,}, local posterior {_on(case)}")
        peaks.append({arm: memory_of_arm(Path(__file__), case, arm) for arm in ARMS})
    for case, peak in zip(todo, peaks, strict=True):
        say(f"state: seconds of a step at V = {case.vocab:,}, local posterior {_on(case)}")
        arms = compare(steps_of(case), repeats=2 if quick else 5, device=device)
        for row in arms:
            rows.append(
                dataclasses.asdict(case)
                | {
                    "local_posterior": _on(case),
                    "tokens_per_second": case.batch * case.length / row["median"],
                }
                | row
                | {
                    "peak_bytes": peak[row["arm"]].peak,
                    "step_bytes": peak[row["arm"]].own,
                    "peak_ratio": peak[row["arm"]].peak / peak["low-rank"].peak,
                    "step_ratio": peak[row["arm"]].own / peak["low-rank"].own,
                }
            )
    return rows


def _on(case: Case) -> str:
    return "on" if case.local_posterior else "off"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    asked = Case(**json.loads(sys.argv[1]))
    report_memory(lambda: steps_of(asked), lambda steps: work(steps, sys.argv[2]), asked.device)
