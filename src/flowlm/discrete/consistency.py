"""Duo's discrete consistency distillation (arXiv 2506.10892), and the Gaussian states behind uniform ones.

A uniform state is the argmax of a Gaussian one, w = α̃ x_0 + σ̃ ε with α̃² = sigmoid(-g): its argmax is the clean token
with the chance P_c, and any other with equal chances, so that

    α = (V P_c - 1)/(V - 1)      at the signal-to-noise α̃/σ̃

which is the clock τ of flow time t̃ = α̃/(α̃ + σ̃). Two noise levels under one ε are two points of one deterministic path:
the student's answer at the noisier one is drawn to the teacher's at the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowlm.clock import Clock, DecodingErrorClock
from flowlm.discrete import duo
from flowlm.discrete.base import SCHEDULE, DiscreteObjective
from flowlm.discrete.distil import Rounds, check_teacher, divergence
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from flowlm.families import Objective

if TYPE_CHECKING:
    from flowlm.config import RunConfig

#: g of the least and the most noise that students learn.
LEVELS = (-4.0, -1.0)


def gaussian(g: Tensor) -> tuple[Tensor, Tensor]:
    """(α̃, σ̃) of g, float64."""
    g = g.double()
    return torch.sigmoid(-g).sqrt(), torch.sigmoid(g).sqrt()


def kept(g: Tensor, clock: Clock) -> Tensor:
    """α of g: the chance with which a uniform state keeps its token, at the clock of V tokens."""
    signal, noise = gaussian(g)
    return clock.tau(signal / (signal + noise))


def time_of(alpha: Tensor, schedule: LogLinear) -> Tensor:
    """t with α_t = alpha."""
    return (1 - alpha) / (1 - schedule.eps)


def argmax_tokens(tokens: Tensor, g: Tensor, noise: Tensor) -> Tensor:
    """argmax of α̃ x_0 + σ̃ ε (B, L), for ε = noise (B, L, V).

    The largest of the others' ε, and the token's own, decide it.
    """
    signal, sigma = (part.to(noise.dtype)[:, None, None] for part in gaussian(g))
    state = sigma * noise
    return state.scatter_add(-1, tokens[..., None], signal.expand(*tokens.shape, 1).to(state.dtype)).argmax(
        -1
    )


def soft_tokens(
    tokens: Tensor, g: Tensor, noise: Tensor, embedding: Tensor, temperature: float = 1e-3
) -> Tensor:
    """softmax((α̃ x_0 + σ̃ ε)/temperature)·E (B, L, d): the curriculum's input, near the argmax's embedding."""
    signal, sigma = (part.to(noise.dtype)[:, None, None] for part in gaussian(g))
    state = (sigma * noise).scatter_add(
        -1, tokens[..., None], signal.expand(*tokens.shape, 1).to(noise.dtype)
    )
    return (state / temperature).softmax(-1) @ embedding


def row_noise(draws: Tensor, shape: tuple[int, int]) -> Callable[[int], Tensor]:
    """ε (L, V) of each row, from one uniform draw a row: never those of all rows at once."""
    seeds = (draws.double().cpu() * 2**53).long().tolist()

    def of(row: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seeds[row])).to(draws.device)

    return of


class DCDObjective(DiscreteObjective):
    """KL(student at the noisier of two states ‖ teacher at the other), both of one ε."""

    def __init__(self, rounds: Rounds, clock: Clock):
        super().__init__(self._of, 1, timed=True)
        self.rounds, self.clock = rounds, clock

    def prepare(self, model: Any, step: int | None = None) -> None:
        if step is not None:
            self.rounds.enter(model, step)

    def _of(self, net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        low, high = LEVELS
        later = draws["t"].double()
        pair = [low + (high - low) * t for t in (later, (later - self.rounds.width).clamp_min(0.0))]
        epsilon = row_noise(noise[0, :, 0], (tokens.shape[1], net.config.vocab_size))
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

    def state(self) -> dict[str, Tensor]:
        return self.rounds.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.rounds.load(state)


class DCD(duo.Duo):
    """The family of few-step uniform diffusion."""

    name, label, about = "duo-dcd", "Duo-DCD", "diffusion with uniform states, distilled"
    taught, held_out_ranks = True, False

    def check(self, run: RunConfig) -> None:
        super().check(run)
        check_teacher(run)

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        rounds = Rounds(run.rounds, self.needed(teacher), run.train.steps)
        return DCDObjective(rounds, DecodingErrorClock(network.config.vocab_size))
