"""SDTT: a masked model taught to do in one step what it did in two (arXiv 2410.21035).

The teacher takes two ancestral steps of dt from x_t. The target of a masked token is the teacher's posterior at the
call that opened it, and the second call's for one that stayed masked; the student's answer to x_t is drawn to it by
KL(student ‖ target). After each round the averaged student becomes the teacher, and dt doubles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowlm.device import widened
from flowlm.discrete import mdlm
from flowlm.discrete.base import SCHEDULE
from flowlm.discrete.distil import Rounds, RoundsObjective, check_rounds, divergence
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from flowlm.families import Objective
from flowlm.posterior import Target

if TYPE_CHECKING:
    from flowlm.clock import Clock
    from flowlm.config import RunConfig


class Either:
    """One of two targets at each position.

    Args:
        first: (B, L), whether it is the first one.
        one, other: targets over the same positions.
    """

    def __init__(self, first: Tensor, one: Target, other: Target):
        self.first, self.one, self.other = first.reshape(-1, 1), one, other

    def probs_at(self, rows: slice) -> Tensor:
        return torch.where(self.first[rows], self.one.probs_at(rows), self.other.probs_at(rows))


def losses(
    student: mdlm.Network,
    teacher: mdlm.Network,
    tokens: Tensor,
    t: Tensor,
    uniform: Tensor,
    dt: float,
    mask: int,
    schedule: LogLinear,
) -> Tensor:
    """KL(student ‖ target) at masked positions, 0 elsewhere, (B, L).

    Args:
        t: times (B,); steps end at 0 at the earliest.
        uniform: (3, B, L) float64: what is masked, what the teacher opens, and to what.
    """
    x = mdlm.corrupt(tokens, t, uniform[0], mask, schedule)
    with torch.no_grad():
        one = teacher(x, t)
        s = (t - dt).clamp_min(0.0)
        drawn = one.tokens("categorical", uniform[2])
        opens = (x == mask) & (uniform[1] < schedule.opening(t, s)[:, None])
        later = torch.where(opens, drawn, x)
        other = teacher(later, s)
    loss = divergence(student(x, t), Either(opens, one, other))
    return torch.where(x == mask, loss, 0.0)


class SDTTObjective(RoundsObjective):
    """Losses of a student, with rounds."""

    def __init__(self, rounds: Rounds):
        super().__init__(self._of, 3, rounds)

    def _of(self, net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        return losses(
            lambda x, t: net(x),
            lambda x, t: self.rounds.teacher(x),
            tokens,
            widened(draws["t"]),
            noise,
            self.rounds.width,
            net.config.vocab_size,
            SCHEDULE,
        )


class SDTT(mdlm.MDLM):
    """The family of few-step masked diffusion."""

    name, label, about = "sdtt", "SDTT", "masked diffusion, distilled"
    taught, held_out_ranks, likelihood = True, False, ""

    def check(self, run: RunConfig) -> None:
        super().check(run)
        check_rounds(run)

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        return SDTTObjective(Rounds(run.rounds, self.needed(teacher), averaged, run.train.steps))
