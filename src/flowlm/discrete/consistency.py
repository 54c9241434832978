"""Duo-DCD: discrete consistency distillation (arXiv 2506.10892).

Two noise levels under one ε are two points of one deterministic path: the student's answer at the noisier one is drawn
to the teacher's at the other, by KL(student ‖ teacher). After each round the averaged student becomes the teacher, and
the levels lie twice as far apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowlm.clock import Clock, DecodingErrorClock
from flowlm.device import widened
from flowlm.discrete import duo
from flowlm.discrete.base import SCHEDULE
from flowlm.discrete.distil import Rounds, RoundsObjective, check_rounds, divergence
from flowlm.discrete.gaussian import argmax_tokens, kept, level_of, row_noise, time_of
from flowlm.discrete.network import TokenNetwork
from flowlm.families import Objective

if TYPE_CHECKING:
    from flowlm.config import RunConfig

#: α of the least and the most noise that students learn: those of g = -4 and -1 at the paper's V = 30,522. At one g a
#: smaller vocabulary is less noisy, and the first step of all would be learnt by none.
LEVELS = (0.9991, 0.0075)


class DCDObjective(RoundsObjective):
    """KL(student at the noisier of two states ‖ teacher at the other), both of one ε.

    Args:
        rounds: the teacher and its step.
        clock: of V tokens, on the CPU; it is taken to the teacher's device.
        levels: g of the least and the most noise; those of `LEVELS` when None.
    """

    def __init__(self, rounds: Rounds, clock: Clock, levels: tuple[float, float] | None = None):
        super().__init__(self._of, 0, rounds, seeded=True)
        if levels is None:
            ends = level_of(torch.tensor(LEVELS), clock)
            levels = (float(ends[0]), float(ends[1]))
        self._low, self._high = levels
        self.clock = clock.to(rounds.teacher.embedding.device)

    def _of(self, net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        later = widened(draws["t"])
        pair = [
            self._low + (self._high - self._low) * t
            for t in (later, (later - self.rounds.width).clamp_min(0.0))
        ]
        epsilon = row_noise(draws["seed"], (tokens.shape[1], net.config.vocab_size), tokens.device)
        states: list[list[Tensor]] = [[], []]
        for row in range(len(tokens)):
            own, drawn = tokens[row : row + 1], epsilon(row)[None]
            for state, g in zip(states, pair, strict=True):
                state.append(argmax_tokens(own, g[row : row + 1], drawn))
        (x, z), (t, s) = (
            [torch.cat(state) for state in states],
            [time_of(kept(g, self.clock), SCHEDULE) for g in pair],
        )
        with torch.no_grad():
            target = self.rounds.teacher(z, s)
        return divergence(net(x, t), target)


class DCD(duo.Duo):
    """The family of few-step uniform diffusion."""

    name, label, about = "duo-dcd", "Duo-DCD", "diffusion with uniform states, distilled"
    taught, held_out_ranks, likelihood = True, False, ""

    def check(self, run: RunConfig) -> None:
        super().check(run)
        check_rounds(run)

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        rounds = Rounds(run.rounds, self.needed(teacher), averaged, run.train.steps)
        return DCDObjective(rounds, DecodingErrorClock(network.config.vocab_size), run.duo.levels)
