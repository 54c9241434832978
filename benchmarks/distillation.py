"""One training step of the flow map by each of its objectives, against one of the flow.

All have one size; student and teacher share their embedding. Of each batch half the rows lie on the diagonal, with the
teacher's targets, as published.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import CPU, Memory, Row, compare, memory_of_arm, report_memory
from training_step import TrainingStep, clock_of, optimizer_of

from flowlm.backbone import BackboneConfig
from flowlm.correction import CorrectedFlow
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.objectives import FlowMapConfig, FlowMapObjective, FlowObjective

_PUBLISHED: dict[str, Any] = {
    "diagonal": 0.5,
    "diagonal_target": "teacher",
    "boundary": 1 / 32,
    "boundary_target": "self",
    "target": "student",
    "freeze_embedding": True,
}
_FORWARD_MODE = {"derivative": "jvp"}
CORRECTION = "two stages: correction"
#: Options of each objective beside the published shares; the flow's has none.
ARMS: dict[str, dict[str, Any] | None] = {
    "FLM": None,
    "PSD": {},
    "LSD": {"identity": "lsd"} | _FORWARD_MODE,
    "LSD, differences": {"identity": "lsd"},
    "LSD*, differences": {"identity": "lsd-logit"},
    "ESD": {"identity": "esd"} | _FORWARD_MODE,
    "ESD, differences": {"identity": "esd"},
    "ESD*, differences": {"identity": "esd-logit"},
    "CFM": {"identity": "cfm"},
    CORRECTION: {
        "diagonal": 0.0,
        "boundary": 1 / 64,
        "loss": "squared-error",
        "weight": "inverse",
    },
    "two stages: student": {
        "identity": "correction",
        "diagonal": 0.25,
        "boundary": 1 / 128,
        "loss": "squared-error",
        "weight": "inverse",
    },
    "PSD, rollouts at the boundary": {"diagonal": 0.25, "boundary": 0.5, "boundary_target": "teacher"},
}


#: Of them, what a quick run takes.
QUICK = ("FLM", "PSD", "CFM")


@dataclass(frozen=True)
class Case:
    """One size at which the objectives are compared."""

    vocab: int
    batch: int = 32
    length: int = 64
    width: int = 256
    depth: int = 4
    dtype: str = "float32"
    device: str = "cpu"


def cases(quick: bool, dtype: torch.dtype, device: torch.device = CPU) -> list[Case]:
    """One on either side of V = 2d."""
    name, where = str(dtype).removeprefix("torch."), str(device)
    if quick:
        return [Case(256, 4, 8, 32, 1, name, where)]
    return [Case(v, dtype=name, device=where) for v in (512, 8192)]


def step_of(case: Case, arm: str) -> TrainingStep:
    """A training step of a network by one of the objectives, on one batch of random tokens."""
    torch.manual_seed(0)
    shape = BackboneConfig(width=case.width, depth=case.depth)
    config = DenoiserConfig(vocab_size=case.vocab, length=case.length, backbone=shape)
    options = ARMS[arm]
    model: Denoiser | CorrectedFlow = Denoiser(config).to(case.device)
    # Logits of the order of one, as in `generation`: of flat ones every target is flat.
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=case.width**-0.5)
    objective: FlowObjective | FlowMapObjective = FlowObjective(clock_of(model))
    if options is not None:
        teacher = model.eval().requires_grad_(False)
        setting = FlowMapConfig(**_PUBLISHED | options)
        learned_from: Denoiser | CorrectedFlow = teacher
        if arm == CORRECTION or setting.identity == "correction":
            # Where it is not needed it would count in the memory.
            corrected = CorrectedFlow(dataclasses.replace(config, family="correction", two_times=True)).to(
                case.device
            )
            corrected.flow.load_state_dict(teacher.state_dict())
            corrected.begin()
        if setting.identity == "correction":
            learned_from = corrected.eval()
        if arm == CORRECTION:
            model = corrected
        else:
            made_like = dataclasses.replace(config, two_times=True, head_start=setting.head_start)
            student = Denoiser(made_like).to(case.device)
            student.load_state_dict(student.state_dict() | teacher.state_dict())
            for fixed in (student.embedding, student.mean):
                fixed.requires_grad_(False)
            model = student
        objective = FlowMapObjective(setting, clock_of(teacher), learned_from)
    tokens = torch.randint(case.vocab, (case.batch, case.length)).to(case.device)
    return TrainingStep(model, objective, optimizer_of(model), tokens, case.dtype)


#: Steps in the process whose memory is taken.
STEPS = 2


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each objective in each case."""
    rows: list[Row] = []
    todo, arms = cases(quick, dtype, device), QUICK if quick else tuple(ARMS)
    peaks: dict[tuple[Case, str], Memory] = {}
    # All of them first: the peak of a process counts in that of the one which started it.
    for case in todo:
        say(f"distillation: memory of a step at V = {case.vocab:,}")
        peaks |= {(case, arm): memory_of_arm(Path(__file__), case, arm) for arm in arms}
    for case in todo:
        say(f"distillation: seconds of a step at V = {case.vocab:,}")
        steps = {arm: step_of(case, arm) for arm in arms}
        for row in compare(steps, repeats=2 if quick else 7, device=device):
            peak, first = peaks[case, row["arm"]], peaks[case, arms[0]]
            rows.append(
                dataclasses.asdict(case)
                | row
                | {
                    "peak_bytes": peak.peak,
                    "step_bytes": peak.own,
                    "peak_ratio": peak.peak / first.peak,
                    "step_ratio": peak.own / first.own,
                }
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    asked = Case(**json.loads(sys.argv[1]))
    report_memory(
        lambda: step_of(asked, sys.argv[2]), lambda step: [step() for _ in range(STEPS)], asked.device
    )
