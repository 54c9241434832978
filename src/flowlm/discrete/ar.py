"""AR: one token after another, each from those before it. The exact likelihood, and L network calls a passage.

log p(w) = Σ_l log p(w_l | w_<l)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowlm.backbone import KVCache
from flowlm.categorical import categorical
from flowlm.device import widened
from flowlm.discrete.base import Discrete, DiscreteObjective
from flowlm.discrete.network import TokenNetwork
from flowlm.families import TEMPERATURES, Ask, Objective
from flowlm.posterior import Posterior
from flowlm.samplers import Sample, Step, check_temperature

if TYPE_CHECKING:
    from flowlm.clock import Clock
    from flowlm.config import RunConfig
    from flowlm.denoiser import DenoiserConfig


def shifted(tokens: Tensor, begin: int) -> Tensor:
    """What is read to predict tokens (B, L): the beginning, and all of them but the last."""
    return torch.cat([torch.full_like(tokens[:, :1], begin), tokens[:, :-1]], 1)


def losses(network: TokenNetwork, tokens: Tensor) -> Tensor:
    """-log p(w_l | w_<l) (B, L): the exact likelihood, and what is minimised."""
    return network(shifted(tokens, network.config.vocab_size)).cross_entropy(tokens)


def narrowed(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Weights (..., V) of a draw, in the widest dtype of its device: at a temperature, among the k likeliest, or the
    fewest that weigh p.

    Ties at the border of the k likeliest are kept; of top-p at least the likeliest one is.
    """
    weights = (widened(log_probs) / temperature).softmax(-1)
    if 0 < top_k < weights.shape[-1]:
        least = weights.topk(top_k, -1).values[..., -1:]
        weights = torch.where(weights >= least, weights, 0.0)
    if top_p < 1:
        ordered, order = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, before < top_p)
        weights = torch.where(kept, weights, 0.0)
    return weights


@torch.no_grad()
def sample(
    network: TokenNetwork,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    last: str = "categorical",
    callback: Callable[[int, Posterior], None] | None = None,
) -> Tensor:
    """Passages (B, L), one position after another, each network call reading one token and the cache of the others.

    Args:
        network: causal.
        uniform: draws (B, L), float64.
        last: "categorical", or "argmax" for the likeliest token every time.
        callback: called with each position and its posterior.
    """
    batch, length = uniform.shape
    device = network.embedding.device
    dtype = (
        torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else network.embedding.dtype
    )
    cache = KVCache(network.backbone, batch, device, dtype)
    token = torch.full((batch, 1), network.config.vocab_size, device=device)
    out = []
    for position in range(length):
        posterior = network(token, cache=cache)
        if callback is not None:
            callback(position, posterior)
        if last == "argmax":
            token = posterior.tokens()
        else:
            weights = narrowed(posterior.log_probs(), temperature, top_k, top_p)
            token = categorical(weights, uniform[:, position : position + 1])
        out.append(token)
    return torch.cat(out, 1)


class AR(Discrete):
    """The autoregressive family."""

    name = network_name = "ar"
    label, about = "AR", "one token after another"
    writes = "It writes one token after another, a network call for each."
    likelihood = "exact"
    causal = True
    options: ClassVar[Mapping[str, Any]] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "last": "categorical",
    }
    sweep: ClassVar[Mapping[str, Sequence[Any]]] = {
        "temperature": TEMPERATURES,
        "top_p": (0.7, 0.8, 0.9, 0.95, 1.0),
    }

    def matters(self, option: str, config: DenoiserConfig, steps: int, options: Mapping[str, Any]) -> bool:
        return (
            options["last"] == "categorical"
        )  # the likeliest token is that of any temperature, among any others

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        return DiscreteObjective(lambda net, tokens, noise, draws: losses(net, tokens), 0, timed=False)

    def calls(self, steps: int, length: int) -> int:
        return length

    def sample(self, network: TokenNetwork, ask: Ask, **options: Any) -> Sample:
        check_draws(**options)
        device = network.embedding.device
        uniform = self._uniforms(ask, "ar", (ask.length,), device)(0)

        callback = ask.callback

        def seen(position: int, posterior: Posterior) -> None:
            assert callback is not None
            callback(Step(position, position / ask.length, posterior.hidden, posterior))

        tokens = sample(network, uniform, callback=None if callback is None else seen, **options)
        return Sample(tokens, ask.length)


def check_draws(temperature: float, top_k: int, top_p: float, last: str) -> None:
    """Refuse options that mean nothing, with the reason."""
    check_temperature(temperature)
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}: 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}: 1 keeps all tokens")
    if last not in ("categorical", "argmax"):
        raise ValueError(f"last = {last!r}: tokens are drawn ('categorical') or the likeliest ('argmax')")
