"""MDLM: masked diffusion (arXiv 2406.07524). A token is masked with probability 1-α_t, and stays what it is else.

    -log p(w) ≤ E_t (-α'_t/(1-α_t)) Σ_{l masked} -log p(w_l | x_t)

From t to s < t a masked token becomes k with probability p_k (α_s-α_t)/(1-α_t), and stays masked else. Tokens that
are no masks are carried over. The network reads no time: the masks say it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowlm.discrete.base import SCHEDULE, SWEEP, Discrete, DiscreteObjective, check_rule
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear, steps_of
from flowlm.families import Ask, Objective
from flowlm.posterior import Posterior
from flowlm.samplers import Sample, Step

if TYPE_CHECKING:
    from flowlm.clock import Clock
    from flowlm.config import RunConfig

#: Tokens with masks in them, and a time, to the posterior.
Network = Callable[[Tensor, Tensor], Posterior]


def corrupt(tokens: Tensor, t: Tensor, uniform: Tensor, mask: int, schedule: LogLinear) -> Tensor:
    """x_t (B, L): tokens, masked where uniform (B, L) < 1-α_t."""
    return torch.where(uniform < 1 - schedule.alpha(t)[:, None], mask, tokens)


def losses(
    network: Network, tokens: Tensor, t: Tensor, uniform: Tensor, mask: int, schedule: LogLinear
) -> Tensor:
    """(1/t) -log p(w_l | x_t) at masked positions, 0 elsewhere, (B, L): in the mean over t and positions a bound on
    the nats a token."""
    x = corrupt(tokens, t, uniform, mask, schedule)
    weight = torch.where(x == mask, schedule.weight(t)[:, None], 0.0).float()
    return weight * network(x, t).cross_entropy(tokens)


def step(
    x: Tensor,
    posterior: Posterior,
    s: float,
    t: float,
    uniform: Tensor,
    mask: int,
    schedule: LogLinear,
    *,
    temperature: float = 1.0,
    rule: str = "categorical",
) -> Tensor:
    """x_s (B, L) of x_t, by the true posterior under the predicted tokens, which are asked for where a mask opens.

    Args:
        posterior: of x_t.
        uniform: (2, B, L): whether a token is unmasked, and to what.
        rule: "categorical", or "argmax".
    """
    opens = (x == mask) & (uniform[0] < schedule.opening(t, s))
    drawn = posterior.at(opens).tokens(rule, uniform[1][opens], temperature)
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
    repeatable: bool = True,
    device: torch.device | str = "cpu",
    callback: Callable[[Step], None] | None = None,
) -> tuple[Tensor, int]:
    """Passages (B, L) by ancestral steps from all masks, and the network calls it took.

    A step that opened nothing leaves a repeatable answer of the network as it was: it is not asked again. Nor is it
    when no mask is left.

    Args:
        steps: uniform steps from t = 1 to 0.
        uniforms: of each step, draws (2, B, L), float64.
        last: rule of the last step: "categorical", or "argmax".
        repeatable: whether the network says the same of the same tokens every time.
    """
    x = torch.full(shape, mask, device=device)
    posterior: Posterior | None = None
    calls = 0
    for i, t, s in steps_of(steps):
        if posterior is None:
            posterior = network(x, torch.full(shape[:1], t, device=device))
            calls += 1
        if callback is not None:
            callback(Step(i, t, x, posterior))
        rule = last if s == 0 else "categorical"
        new = step(x, posterior, s, t, uniforms(i), mask, schedule, temperature=temperature, rule=rule)
        if not repeatable or not torch.equal(new, x):
            posterior = None
        x = new
        if not bool((x == mask).any()):
            break
    return x, calls


class MDLM(Discrete):
    """The family of masked diffusion."""

    name = network_name = "mdlm"
    label, about = "MDLM", "masked diffusion"
    writes = "It writes by opening masks, many of them in a step."
    likelihood = "bound"
    options: ClassVar[Mapping[str, Any]] = {"temperature": 1.0, "last": "categorical"}
    sweep = SWEEP
    repeatable: ClassVar[bool] = True
    """Whether the network says the same of the same tokens."""

    def reader(self, network: TokenNetwork, ask: Ask) -> Network:
        """How the sampler asks the network."""
        return lambda x, t: network(x)

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        def of(net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
            return losses(lambda x, t: net(x), tokens, draws["t"], noise[0], net.config.vocab_size, SCHEDULE)

        return DiscreteObjective(of, 1, timed=True)

    def sample(self, network: TokenNetwork, ask: Ask, **options: Any) -> Sample:
        check_rule(**options)
        device = network.embedding.device
        tokens, _ = sample(
            self.reader(network, ask),
            (ask.num, ask.length),
            ask.steps,
            self._uniforms(ask, "mdlm", (2, ask.length), device),
            network.config.vocab_size,
            SCHEDULE,
            repeatable=self.repeatable,
            device=device,
            callback=ask.callback,
            **options,
        )
        return Sample(tokens, ask.steps)
