"""Duo: diffusion with uniform states (arXiv 2506.10892). A token is kept with probability α_t, else drawn anew from
all V.

With x̄ = V α x_0 + 1-α, x̄θ = V α p + 1-α (vectors over tokens, each of sum V), and i the noisy token:

    loss = -α'/(V α) [V/x̄θ_i - V/x̄_i + (1/x̄_i) Σ_j x̄_j log(x̄θ_i x̄_j / (x̄θ_j x̄_i))]

whose mean over t and sum over positions is a bound on -log p(w). At its minimum p is the posterior of a token given the
other positions' noisy tokens: its own comes in by the formulas. From t to s < t, with α_ts = α_t/α_s,

    q_j ∝ α_t V p_j 1[j=i] + (α_ts - α_t) 1[j=i] + (α_s - α_t) p_j + (1-α_ts)(1-α_s)/V

The curriculum shows the network, for the first part of training, a soft input: the tokens of the Gaussian state whose
argmax is the noisy token, softmax((α̃ x_0 + σ̃ ε)/temperature), at the signal-to-noise where the argmax is right with
the chance that α gives. The paper draws the Gaussian's level g evenly in a range chosen for its vocabulary, with the
bound's share of that range as the loss: so with `g_low` and `g_high`. Without, t is drawn as ever, and the level is the
one with its α, for any vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowlm.categorical import categorical
from flowlm.clock import Clock, DecodingErrorClock
from flowlm.device import wide, widened
from flowlm.discrete.base import SCHEDULE, SWEEP, Discrete, DiscreteObjective, check_rule
from flowlm.discrete.gaussian import (
    argmax_tokens,
    kept,
    level_of,
    row_noise,
    slope,
    soft_tokens,
    time_of,
)
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear, steps_of
from flowlm.families import Ask, Objective
from flowlm.posterior import Posterior
from flowlm.samplers import Sample, Step

if TYPE_CHECKING:
    from flowlm.config import RunConfig

#: Tokens, none of them a mask, and a time, to the posterior.
Network = Callable[[Tensor, Tensor], Posterior]


def corrupt(tokens: Tensor, t: Tensor, uniform: Tensor, vocab_size: int, schedule: LogLinear) -> Tensor:
    """x_t (B, L). uniform (2, B, L): whether a token is drawn anew, and which."""
    other = (uniform[1] * vocab_size).long().clamp_max(vocab_size - 1)
    return torch.where(uniform[0] < 1 - schedule.alpha(t)[:, None], other, tokens)


def losses(
    network: Network, tokens: Tensor, t: Tensor, uniform: Tensor, vocab_size: int, schedule: LogLinear
) -> Tensor:
    """The bound's share of each position (B, L)."""
    x = corrupt(tokens, t, uniform, vocab_size, schedule)
    return bound(network(x, t), x, tokens, t, vocab_size, schedule)


def bound(
    posterior: Posterior, x: Tensor, tokens: Tensor, t: Tensor, vocab_size: int, schedule: LogLinear
) -> Tensor:
    """The loss (B, L) of a posterior for the noisy tokens x of `tokens` at t."""
    v = vocab_size
    alpha, rest = (part(t)[:, None].float().expand_as(x) for part in (schedule.alpha, schedule.noise))
    scale = schedule.rate(t)[:, None].float() / (v * alpha)
    noisy, clean = x.reshape(-1, 1), tokens.reshape(-1, 1)
    by_row = alpha.reshape(-1, 1), rest.reshape(-1, 1)

    def sums(net: Tensor, rows: slice) -> Tensor:
        a, b = (part[rows] for part in by_row)
        theta = v * a * net.softmax(-1) + b  # x̄θ, never below 1-α
        logs = theta.log()
        return torch.cat(
            [
                theta.gather(-1, noisy[rows]),
                logs.gather(-1, clean[rows]),
                logs.sum(-1, keepdim=True),
            ],
            -1,
        )

    theta_i, log_theta_0, log_theta = posterior.map(sums).unbind(-1)
    own = v * alpha + rest  # entries of x̄: `own` at the right token, `rest` at others
    bar_i = torch.where(x == tokens, own, rest)
    # Σ_j x̄_j = V; x̄ differs from `rest` at the right token alone.
    entropy = (v - 1) * rest * rest.log() + own * own.log()
    cross = rest * log_theta + v * alpha * log_theta_0
    return scale * (v / theta_i - v / bar_i + (v * (theta_i.log() - bar_i.log()) + entropy - cross) / bar_i)


def step(
    x: Tensor,
    posterior: Posterior,
    s: float,
    t: float,
    uniform: Tensor,
    schedule: LogLinear,
    *,
    temperature: float = 1.0,
    rule: str = "categorical",
) -> Tensor:
    """x_s (B, L) of x_t by q, which is a mixture: x_t itself, a predicted token, or any one.

    Args:
        posterior: p, of x_t.
        uniform: (B, L).
        temperature: of p.
        rule: "categorical", or "argmax" for the likeliest token of q.
    """
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    v, ratio = len(posterior.embedding), alpha_t / alpha_s
    predicted, anew = alpha_s - alpha_t, (1 - ratio) * (1 - alpha_s)
    own, draws = x.reshape(-1, 1), uniform.reshape(-1)

    def chunk(net: Tensor, rows: slice) -> Tensor:
        net, same = net / temperature, own[rows, 0]
        log_sum = net.logsumexp(-1)
        chance = (net.gather(-1, own[rows]).squeeze(-1) - log_sum).to(draws.dtype).exp()
        stays = alpha_t * v * chance + (ratio - alpha_t)
        if rule == "argmax":
            top = net.max(-1)
            best = predicted * (top.values - log_sum).exp()
            return torch.where(stays + predicted * chance >= best, same, top.indices)
        at = draws[rows] * (stays + predicted + anew)
        # Within its share the draw is uniform again: it says which token.
        other = ((at - stays - predicted) / anew * v).long().clamp(0, v - 1) if anew else same
        jumps = (at >= stays) & (at < stays + predicted)
        weights = net[jumps].to(wide(net.device)).softmax(-1)
        drawn = categorical(weights, ((at - stays) / predicted)[jumps])
        return torch.where(at < stays, same, other).masked_scatter(jumps, drawn)

    return posterior.map(chunk)


@torch.no_grad()
def sample(
    network: Network,
    shape: tuple[int, int],
    steps: int,
    first: Tensor,
    uniforms: Callable[[int], Tensor],
    vocab_size: int,
    schedule: LogLinear,
    *,
    temperature: float = 1.0,
    last: str = "categorical",
    device: torch.device | str = "cpu",
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Passages (B, L) from uniform tokens, in ancestral steps from t = 1 to 0.

    Args:
        first: draws (B, L) of the first tokens, float64.
        uniforms: of each step, draws (B, L), float64.
        last: "categorical", or "argmax" for the greedy tail: the last step takes the likeliest tokens. It moves
            perplexity and entropy by much: say which was used.
    """
    x = (first * vocab_size).long().clamp_max(vocab_size - 1).to(device)
    for i, t, s in steps_of(steps):
        posterior = network(x, torch.full(shape[:1], t, device=device))
        if callback is not None:
            callback(Step(i, t, x, posterior))
        rule = last if s == 0 else "categorical"
        x = step(x, posterior, s, t, uniforms(i), schedule, temperature=temperature, rule=rule)
    return x


@dataclass(frozen=True)
class DuoConfig:
    """How a uniform diffusion is trained."""

    curriculum: float = 0.5
    """Share of the steps, the first ones, in which the network reads soft tokens."""
    temperature: float = 1e-3
    """Of the soft tokens."""
    g_low: float = 0.0
    """Least log noise-to-signal ratio g of the Gaussian whose levels the curriculum, or Duo-DCD for its pairs, draws
    evenly; with g_high = 0 too, levels are those of the vocabulary at hand."""
    g_high: float = 0.0
    """Largest such ratio."""

    @property
    def levels(self) -> tuple[float, float] | None:
        """(g_low, g_high); None where they are not given."""
        return (self.g_low, self.g_high) if self.g_low or self.g_high else None

    def __post_init__(self) -> None:
        if self.levels is not None and not self.g_low < self.g_high:
            raise ValueError(
                f"duo.g_low = {self.g_low} is to lie below duo.g_high = {self.g_high}: leave both 0 for all levels"
            )
        if not 0 <= self.curriculum <= 1:
            raise ValueError(f"duo.curriculum is a share of the steps in [0, 1], got {self.curriculum}")
        if self.temperature <= 0:
            raise ValueError(f"duo.temperature must be positive, got {self.temperature}")


class DuoObjective(DiscreteObjective):
    """The bound, on soft tokens for the first part of `steps`."""

    def __init__(self, config: DuoConfig, steps: int, clock: Clock):
        super().__init__(self._of, 2, timed=True, seeded=True)
        self.config, self.steps, self.clock = config, steps, clock
        self.soft = False

    def prepare(self, model: Any, step: int | None = None) -> None:
        self.soft = step is not None and step < self.config.curriculum * self.steps

    def _of(self, net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        v, t = net.config.vocab_size, draws["t"]
        if not self.soft:
            return losses(net, tokens, t, noise, v, SCHEDULE)
        share = torch.ones_like(t)
        if self.config.levels is None:
            g = level_of(SCHEDULE.alpha(widened(t)), self.clock)
        else:
            low, high = self.config.levels
            g = low + (high - low) * widened(t)
            t = time_of(kept(g, self.clock), SCHEDULE).to(t.dtype)
            # dt of the bound's integral for even draws of g.
            share = (slope(g, self.clock).abs() * (high - low) / (1 - SCHEDULE.eps)).to(t.dtype)
        epsilon = row_noise(draws["seed"], (tokens.shape[1], v), tokens.device)

        def soft(row: int) -> Tensor:
            part = slice(row, row + 1)
            return soft_tokens(
                tokens[part], g[part], epsilon(row)[None], net.embedding, self.config.temperature
            )

        rows = range(len(tokens))
        # Recomputed for the backward pass, ε too: what is kept would be as large as the dense state.
        inputs = [checkpoint(soft, row, use_reentrant=False, preserve_rng_state=False) for row in rows]
        noisy = [argmax_tokens(tokens[i : i + 1], g[i : i + 1], epsilon(i)[None]) for i in rows]
        posterior = net(torch.cat(inputs), t)
        return share[:, None] * bound(posterior, torch.cat(noisy), tokens, t, v, SCHEDULE)


class Duo(Discrete):
    """The family of uniform states."""

    name = network_name = "duo"
    label, about = "Duo", "diffusion with uniform states"
    writes = "It writes by changing random tokens, step by step."
    likelihood = "bound"
    timed = True
    extra = 0
    options: ClassVar[Mapping[str, Any]] = {"temperature": 1.0, "last": "categorical"}
    sweep = SWEEP

    def reader(self, network: TokenNetwork, ask: Ask) -> Network:
        """How the sampler asks the network."""
        return network

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        clock = DecodingErrorClock(network.config.vocab_size).to(network.embedding.device)
        return DuoObjective(run.duo, run.train.steps, clock)

    def sample(self, network: TokenNetwork, ask: Ask, **options: Any) -> Sample:
        check_rule(**options)
        device = network.embedding.device
        begin = self._uniforms(ask, "duo first", (ask.length,), device)
        uniforms = self._uniforms(ask, "duo", (ask.length,), device)
        tokens = sample(
            self.reader(network, ask),
            (ask.num, ask.length),
            ask.steps,
            begin(0),
            uniforms,
            network.config.vocab_size,
            SCHEDULE,
            device=device,
            callback=ask.callback,
            **options,
        )
        return Sample(tokens, ask.steps)
