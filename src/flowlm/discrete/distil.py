"""What the few-step students of the discrete families minimise: a divergence from a target that their teacher makes.

KL(student ‖ target) = Σ_k p_k (log p_k - log target_k)        (SDTT, Duo's discrete consistency distillation)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowlm.discrete.base import DiscreteObjective, Losses
from flowlm.posterior import Posterior, Target
from flowlm.weights import whole

if TYPE_CHECKING:
    from flowlm.config import RunConfig
    from flowlm.discrete.network import TokenNetwork

#: Below it a target's probability counts as this: the divergence stays finite where a teacher is certain.
LEAST = 1e-9


def divergence(student: Posterior, target: Target) -> Tensor:
    """KL(student ‖ target) at each position (B, L), float32; no gradient passes to the target."""

    def rows_of(logits: Tensor, rows: slice) -> Tensor:
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p - target.probs_at(rows).clamp_min(LEAST).log())).sum(-1)

    return student.map(rows_of)


@dataclass(frozen=True)
class RoundsConfig:
    """Students that become their own teacher, round by round (objectives "sdtt" and "duo-dcd")."""

    rounds: int = 7
    """Rounds of equal length; after each the student, averaged over its steps, becomes the teacher, and its step twice
    as wide."""
    start: int = 1024
    """Steps from noise to data that the first teacher's step is one of. SDTT: 1024; Duo: 512."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.start < 1:
            raise ValueError(
                f"rounds.rounds and rounds.start must be at least 1, got {self.rounds}, {self.start}"
            )
        if 2 ** (self.rounds - 1) > self.start:
            raise ValueError(
                f"rounds.rounds = {self.rounds} with rounds.start = {self.start}: the last rounds would step over the "
                f"whole way at once; give at most {self.start.bit_length()} rounds"
            )


class Rounds:
    """The teacher of each round, and its step.

    Args:
        config: how many, and from where.
        teacher: of the first round; overwritten after each.
        averaged: the student's average, which it is overwritten by: under a rate that is still high the student itself
            teaches its noise.
        steps: of the whole distillation.
    """

    def __init__(self, config: RoundsConfig, teacher: TokenNetwork, averaged: nn.Module, steps: int):
        self.config, self.averaged, self.steps = config, averaged, steps
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
        self.number = 0

    @property
    def width(self) -> float:
        """dt of the present round: 2^round/start."""
        return min(1.0, 2**self.number / self.config.start)

    def enter(self, step: int) -> None:
        """The round of a step: a new one begins with the averaged student as its teacher."""
        number = min(step * self.config.rounds // self.steps, self.config.rounds - 1)
        if number > self.number:
            self.teacher.load_state_dict({n: whole(value) for n, value in self.averaged.state_dict().items()})
            self.number = number

    def state(self) -> dict[str, Tensor]:
        """The teacher's weights and the round's number."""
        weights = {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return {**weights, "round": torch.tensor([self.number])}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.number = int(state["round"])
        weights = {n.removeprefix("teacher."): v for n, v in state.items() if n.startswith("teacher.")}
        self.teacher.load_state_dict(weights)


class RoundsObjective(DiscreteObjective):
    """Losses of a student whose teacher changes with the round.

    Args:
        losses, uniforms, seeded: as of every discrete objective.
        rounds: the teacher and its step.
    """

    def __init__(self, losses: Losses, uniforms: int, rounds: Rounds, seeded: bool = False):
        super().__init__(losses, uniforms, timed=True, seeded=seeded)
        self.rounds = rounds

    def prepare(self, model: Any, step: int | None = None) -> None:
        if step is not None:
            self.rounds.enter(step)

    def networks(self) -> list[nn.Module]:
        return [self.rounds.teacher]

    def state(self) -> dict[str, Tensor]:
        return self.rounds.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.rounds.load(state)


def check_rounds(run: RunConfig) -> None:
    """ValueError: more rounds than steps."""
    if run.train.steps < run.rounds.rounds:
        raise ValueError(
            f"train.steps = {run.train.steps} is fewer than rounds.rounds = {run.rounds.rounds}: a round needs a step"
        )
