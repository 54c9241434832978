"""Targets of the flow map from rates: the Lagrangian and the Eulerian identity, of probabilities and of logits, and the
Lagrangian one's bound by the endpoint.

    Lagrangian   δ_{s,t} = D_t(X_{s,t}) - (1-t)(t-s)/(1-s) ∂_t δ_{s,t}
    Eulerian     (1-t) δ_{s,t} = (1-t) D_s + (1-s)(t-s) d/ds δ_{s,t}

(arXiv 2602.16813; of logits: Discrete Flow Maps, arXiv 2604.09784; the bound: Categorical Flow Maps, arXiv 2602.12233.)
Along the flow, d/ds is ∂_s + b_s·∇. No target carries a gradient; through a rate one passes in the bound alone, and
that rate is a difference. Targets of probabilities lie on the simplex at the flow map alone:
before, they are projected onto it for a cross-entropy. Those of logits stay on it, but take a logarithm whose argument
may be negative before, and which at the flow map is D/δ: the Lagrangian one is ill conditioned for tokens ruled
out between s and t, where D_t vanishes and δ_{s,t} does not. So they are bounded by a multiple of δ itself, which
the flow map, its own target, never meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowlm.objectives.derivative import Moving, Network, rate_at_the_end, rate_at_the_start
from flowlm.path import step, velocity
from flowlm.posterior import Posterior

#: ε of the bound's rate: c ∂_t δ_{s,t} is the difference of δ at t ± ε c over 2ε. As far from float32's rounding as
#: from the curvature.
SHARE = 5e-3

#: A one-time denoiser as the targets see it: (y, t) -> D_t(y).
Inner = Callable[[Tensor, Tensor], Posterior]


def lagrangian_weight(s: Tensor, t: Tensor) -> Tensor:
    """(1-t)(t-s)/(1-s), the weight of ∂_t δ_{s,t}."""
    return (1 - t) * (t - s) / (1 - s)


def eulerian_weight(s: Tensor, t: Tensor) -> Tensor:
    """(1-s)(t-s), the weight of d/ds δ_{s,t}."""
    return (1 - s) * (t - s)


def start_weight(s: Tensor, t: Tensor) -> Tensor:
    """1-t, the Eulerian identity's weight of D_s - δ_{s,t}."""
    return 1 - t


def sparsemax(x: Tensor) -> Tensor:
    """The nearest point of the simplex, max(x - θ, 0) with θ such that it sums to 1, over the last dimension."""
    ordered = x.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    # At least one, so that not-a-number comes out as such.
    kept = (rank * ordered > excess).sum(-1, keepdim=True).clamp_min(1)
    return (x - excess.gather(-1, kept - 1) / kept).clamp_min(0)


class Watched:
    """A target that is made position by position, and how far it was from being one.

    Args:
        make: positions `rows` of the flattened (B·L) -> target (n, V) and its figure (n,).
        name: of the figure: "outside" the simplex, the mass below 0, or "clamped", that of the target's mass which its
            bound has set.
    """

    def __init__(self, make: Callable[[slice], tuple[Tensor, Tensor]], name: str):
        self.make, self.name = make, name
        self.total: Tensor | float = 0.0
        self.count = 0

    def probs_at(self, rows: slice) -> Tensor:
        with torch.no_grad():
            target, figure = self.make(rows)
            # Not in place: who took the total keeps it when the backward pass makes a chunk again.
            self.total = self.total + figure.sum()
            self.count += len(figure)
        return target


def _weight(weight: Tensor, like: Posterior) -> Tensor:
    """A weight (B,) of each of the flattened positions, (B·L, 1); in float32 at least, as the states it is of."""
    kind = torch.promote_types(like.hidden.dtype, torch.float32)
    return weight[:, None].expand(like.shape).reshape(-1, 1).to(kind)


def _of_probabilities(make: Callable[[slice], Tensor], project: bool) -> Watched:
    def watched(rows: slice) -> tuple[Tensor, Tensor]:
        target = make(rows)
        outside = target.clamp_max(0).sum(-1).neg()
        return sparsemax(target) if project else target, outside

    return Watched(watched, "outside")


def _of_logits(
    inner: Posterior, moving: Moving, ratio: Callable[[slice, Tensor], Tensor], floor: float
) -> Watched:
    """softmax(min(log D - log ratio, log δ - log floor)): the target whose ratio D/δ follows from the rate of log δ;
    where that is not positive, it is the bound."""

    def watched(rows: slice) -> tuple[Tensor, Tensor]:
        log_p, a = moving.log_probs_at(rows)
        quotient, most = ratio(rows, a), log_p - math.log(floor)
        free = inner.log_probs_at(rows) - quotient.clamp_min(torch.finfo(quotient.dtype).tiny).log()
        bound = (quotient <= 0) | (free > most)
        target = torch.where(bound, most, free).softmax(-1)
        return target, (target * bound).sum(-1)

    return Watched(watched, "clamped")


def _lagrangian(
    network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor, method: str
) -> tuple[Moving, Posterior, Tensor]:
    """δ_{s,t} with ∂_t, D_t(X_{s,t}) and the weight."""
    moving = rate_at_the_end(network, y, s, t, method)
    with torch.no_grad():
        inner = denoiser(step(y, moving.posterior.embed(), s, t), t)
    return moving, inner, _weight(lagrangian_weight(s, t), inner)


def _eulerian(
    network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor, method: str
) -> tuple[Moving, Posterior, Tensor, Tensor]:
    """δ_{s,t} with d/ds along b_s = (D_s E - y)/(1-s), D_s, and the weights 1-t and (1-s)(t-s)."""
    with torch.no_grad():
        inner = denoiser(y, s)
    moving = rate_at_the_start(network, y, velocity(y, inner.embed(), s), s, t, method)
    return moving, inner, _weight(start_weight(s, t), inner), _weight(eulerian_weight(s, t), inner)


def lsd_target(
    network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor, method: str, project: bool
) -> Watched:
    """The Lagrangian target D_t(X_{s,t}) - c ∂_t δ_{s,t}, c = (1-t)(t-s)/(1-s).

    Args:
        network: two-time denoiser of the target.
        denoiser: one-time denoiser, D.
        y: state at s, (B, L, d).
        s, t: flow times (B,), s < t.
        method: of the rate, "jvp" or "difference".
        project: to the simplex, for a cross-entropy.
    """
    moving, inner, c = _lagrangian(network, denoiser, y, s, t, method)

    def make(rows: slice) -> Tensor:
        log_p, a = moving.log_probs_at(rows)
        return inner.probs_at(rows) - c[rows] * log_p.exp() * a

    return _of_probabilities(make, project)


def lsd_logit_target(
    network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor, method: str, floor: float
) -> Watched:
    """The Lagrangian target of logits, softmax(log D_t(X_{s,t}) - log(1 + c·a)), a = ∂_t log δ_{s,t}.

    Args:
        network, denoiser, y, s, t, method: as of `lsd_target`.
        floor: no token has more than 1/floor times its δ_{s,t}, before all are normalised.
    """
    moving, inner, c = _lagrangian(network, denoiser, y, s, t, method)
    return _of_logits(inner, moving, lambda rows, a: 1 + c[rows] * a, floor)


def esd_target(
    network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor, method: str, project: bool
) -> Watched:
    """The Eulerian pseudo-target δ_{s,t} + r, r = (1-t)(D_s - δ_{s,t}) + (1-s)(t-s) d/ds δ_{s,t}.

    Nothing divides by 1-t, and the gradient of a loss to it does not vanish at t = 1.

    Args:
        network, denoiser, y, s, t, method, project: as of `lsd_target`.
    """
    moving, inner, left, c = _eulerian(network, denoiser, y, s, t, method)

    def make(rows: slice) -> Tensor:
        log_p, a = moving.log_probs_at(rows)
        p = log_p.exp()
        return p + left[rows] * (inner.probs_at(rows) - p) + c[rows] * p * a

    return _of_probabilities(make, project)


def esd_logit_target(
    network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor, method: str, floor: float
) -> Watched:
    """The Eulerian target of logits, softmax(log D_s - log(1 - (1-s)(t-s)/(1-t) a)), a = d/ds log δ_{s,t}; t < 1.

    Args:
        network, denoiser, y, s, t, method, floor: as of `lsd_logit_target`.
    """
    moving, inner, left, c = _eulerian(network, denoiser, y, s, t, method)
    return _of_logits(inner, moving, lambda rows, a: 1 - c[rows] / left[rows] * a, floor)


def cfm_target(network: Network, denoiser: Inner, y: Tensor, s: Tensor, t: Tensor) -> Posterior:
    """The endpoint D_t(X_{s,t}), to which `cfm_drift` belongs: with R the residual of the Lagrangian identity,

        |R|² = |D_t(X_{s,t}) - δ_{s,t} - c ∂_t δ_{s,t}|² ≤ 4 [KL(D_t(X_{s,t}) ‖ δ_{s,t}) + ½ |c ∂_t δ_{s,t}|²]

    (Categorical Flow Maps, arXiv 2602.12233, with the identity's own c). It vanishes where the endpoint does not change
    along the flow, and there alone: at the flow map of a law that leaves a choice it is not least.

    Args:
        network, denoiser, y, s, t: as of `lsd_target`.
    """
    with torch.no_grad():
        return denoiser(step(y, network(y, s, t).embed(), s, t), t)


def cfm_drift(network: Network, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """½ |c ∂_t δ_{s,t}|² at each position (B, L), c = (1-t)(t-s)/(1-s), with a gradient through the rate.

    Args:
        network: two-time denoiser that learns.
        y: state at s, (B, L, d).
        s, t: flow times (B,), s < t.
    """
    # As c ≤ min(t-s, 1-t), t ± ε c lies between s and 1; and nothing is divided by c.
    aside = SHARE * lagrangian_weight(s, t)
    with torch.autocast(y.device.type, enabled=False):  # a difference of bfloat16 numbers is rounding
        later, earlier = network(y, s, t + aside), network(y, s, t - aside)
        return later.squared_distance(earlier) / (8 * SHARE**2)
