"""SEDD with absorbing states (arXiv 2310.16834): the network gives scores, ratios of probabilities.

With σ = -log α, at a masked position

    log s_k = net_k - log(e^σ - 1) - log V,       at best s_k = r p(w_l = k | x_t), r = 1/(e^σ - 1)
    loss = σ' [Σ_k s_k - r log s_{w_l} + r (log r - 1)]

where V, the number of tokens, is that of all states but the mask. At its minimum the loss is MDLM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowlm.device import wide
from flowlm.discrete.base import SCHEDULE, SWEEP, Discrete, DiscreteObjective, check_rule
from flowlm.discrete.mdlm import corrupt
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear, steps_of
from flowlm.families import Ask, Objective
from flowlm.posterior import Posterior
from flowlm.samplers import Sample, Step

if TYPE_CHECKING:
    from flowlm.clock import Clock
    from flowlm.config import RunConfig

#: Tokens with masks in them, and a time, to scores' logits.
Network = Callable[[Tensor, Tensor], Posterior]


def losses(
    network: Network, tokens: Tensor, t: Tensor, uniform: Tensor, mask: int, schedule: LogLinear
) -> Tensor:
    """The score entropy at masked positions, 0 elsewhere, (B, L): a bound on the nats a token as MDLM's is."""
    x = corrupt(tokens, t, uniform, mask, schedule)
    alpha = schedule.alpha(t)
    log_r = (alpha / (1 - alpha)).log()[:, None].float()
    rate = (schedule.rate(t) / alpha)[:, None].float()  # σ'
    ids = tokens.reshape(-1, 1)
    # log Σ_k exp net_k, and net of the token that was there.
    total, own = (
        network(x, t)
        .map(lambda net, rows: torch.cat([net.logsumexp(-1, keepdim=True), net.gather(-1, ids[rows])], -1))
        .unbind(-1)
    )
    shift = log_r - math.log(mask)  # the mask is numbered V
    r = log_r.exp()
    entropy = (total + shift).exp() - r * (own + shift) + r * (log_r - 1)
    return torch.where(x == mask, rate * entropy, 0.0)


def step(
    x: Tensor,
    scores: Posterior,
    s: float,
    t: float,
    uniform: Tensor,
    mask: int,
    schedule: LogLinear,
    *,
    temperature: float = 1.0,
    rule: str = "categorical",
) -> Tensor:
    """x_s (B, L) of x_t by the analytic sampler (Tweedie's): a mask becomes k with weight s_k (α_s/α_t - 1), and stays
    with weight 1 - Σ_k of these, if that is left; to s = 0 it never stays.

    With r = α_t/(1-α_t), Σ_k of them is (α_s-α_t)/(1-α_t) Σ_k exp(net_k)/V: MDLM's chance to open, times what the
    scores make of it.

    Args:
        scores: of x_t, as logits net.
        uniform: (B, L).
        temperature: of which tokens masks become; how many of them are opened is left to the scores.
        rule: "categorical", or "argmax".
    """
    masked = x == mask
    total = scores.at(masked).map(lambda net, _: net.to(wide(net.device)).logsumexp(-1))
    chance = schedule.opening(t, s) * (total - math.log(mask)).exp()  # the mask is numbered V
    chance = chance.clamp_max(1.0) if s > 0 else torch.ones_like(chance)
    draw = uniform[masked]
    opens = masked.masked_scatter(masked, draw < chance)
    # Within its share the draw is uniform again: it says which token.
    drawn = scores.at(opens).tokens(rule, (draw / chance)[draw < chance], temperature)
    return x.masked_scatter(opens, drawn)


@torch.no_grad()
def sample(
    network: Network,
    shape: tuple[int, int],
    steps: int,
    uniforms: Callable[[int], Tensor],
    mask: int,
    schedule: LogLinear,
    *,
    temperature: float = 1.0,
    last: str = "categorical",
    device: torch.device | str = "cpu",
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Passages (B, L) from all masks, in uniform steps from t = 1 to 0; the last leaves no mask.

    Args:
        uniforms: of each step, draws (B, L), float64.
        temperature: of which tokens masks become; how many of them are opened is left to the scores.
        last: rule of the last step: "categorical", or "argmax".
    """
    x = torch.full(shape, mask, device=device)
    for i, t, s in steps_of(steps):
        scores = network(x, torch.full(shape[:1], t, device=device))
        if callback is not None:
            callback(Step(i, t, x, scores))
        rule = last if s == 0 else "categorical"
        x = step(x, scores, s, t, uniforms(i), mask, schedule, temperature=temperature, rule=rule)
    return x


class SEDD(Discrete):
    """The family of score entropy with absorbing states."""

    name = network_name = "sedd"
    label, about = "SEDD", "masked diffusion by scores"
    writes = "It writes by opening masks, many of them in a step."
    likelihood = "bound"
    timed = True
    options: ClassVar[Mapping[str, Any]] = {"temperature": 1.0, "last": "categorical"}
    sweep = SWEEP

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        def of(net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
            return losses(net, tokens, draws["t"], noise[0], net.config.vocab_size, SCHEDULE)

        return DiscreteObjective(of, 1, timed=True)

    def sample(self, network: TokenNetwork, ask: Ask, **options: Any) -> Sample:
        check_rule(**options)
        device = network.embedding.device
        uniforms = self._uniforms(ask, "sedd", (ask.length,), device)
        mask = network.config.vocab_size
        tokens = sample(
            network,
            (ask.num, ask.length),
            ask.steps,
            uniforms,
            mask,
            SCHEDULE,
            device=device,
            callback=ask.callback,
            **options,
        )
        return Sample(tokens, ask.steps)
