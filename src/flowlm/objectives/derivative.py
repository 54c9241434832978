"""Rates of a two-time denoiser along a path of its state and times, for targets that carry no gradient.

Derived are the hidden states, which are d wide; what is V wide follows from them in the chunks of the posterior. Times
are flow times: the network's clock stands between them and what it reads, so that the rates carry its dτ/dt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowlm.files import first_line
from flowlm.path import times_like
from flowlm.posterior import Posterior

#: A denoiser as the targets see it: (y, s, t) -> posterior.
Network = Callable[[Tensor, Tensor, Tensor], Posterior]

#: How rates are made: forward-mode differentiation, or differences of three network calls.
METHODS = ("jvp", "difference")

#: Step of the differences, as a share of the time left to 1, and the least time left that counts. As far from
#: float32's rounding as from the curvature of the evidence's gain, which grows as (1-s)⁻².
DIFFERENCE, LEAST_LEFT = 5e-3, 1e-2


class Moving:
    """A posterior and its rate.

    Args:
        posterior: δ.
        rate: the rate of its hidden states (B, L, d).
    """

    def __init__(self, posterior: Posterior, rate: Tensor):
        self.posterior, self.rate = posterior, rate.reshape(-1, rate.shape[-1])

    def log_probs_at(self, rows: slice) -> tuple[Tensor, Tensor]:
        """log p and its rate a_k = ż_k - Σ_j p_j ż_j, (n, V) each, at positions `rows` of the flattened (B·L)."""
        hidden = self.posterior.hidden.reshape(self.rate.shape)[rows]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logits, tangent = torch.func.jvp(self.posterior.head, (hidden,), (self.rate[rows],))[:2]
            log_probs = logits.log_softmax(-1)
            return log_probs, tangent - (log_probs.exp() * tangent).sum(-1, keepdim=True)


def rate_at_the_end(network: Network, y: Tensor, s: Tensor, t: Tensor, method: str) -> Moving:
    """δ_{s,t}(y) and ∂_t δ_{s,t}(y).

    Args:
        network: two-time denoiser.
        y: state at s, (B, L, d).
        s, t: flow times (B,), s < t.
        method: one of `METHODS`.

    Raises:
        ValueError: a network that cannot be differentiated forwards.
    """
    return _moving(network, (y, s, t), (torch.zeros_like(y), 0.0, 1.0), (t - s, 1 - t), 1 - t, method)


def rate_at_the_start(
    network: Network, y: Tensor, velocity: Tensor, s: Tensor, t: Tensor, method: str
) -> Moving:
    """δ_{s,t}(y) and its rate as y goes with the flow, d/ds δ_{s,t}(y) = ∂_s δ_{s,t} + b_s·∇δ_{s,t}.

    Args:
        network, y, s, t, method: as of `rate_at_the_end`.
        velocity: b_s(y), (B, L, d).

    Raises:
        ValueError: a network that cannot be differentiated forwards.
    """
    return _moving(network, (y, s, t), (velocity, 1.0, 0.0), (s, t - s), 1 - s, method)


@torch.no_grad()
def _moving(
    network: Network,
    at: tuple[Tensor, Tensor, Tensor],
    along: tuple[Tensor, float, float],
    room: tuple[Tensor, Tensor],
    left: Tensor,
    method: str,
) -> Moving:
    """The posterior at (y, s, t) and its rate along a direction.

    Args:
        room: how far the moving time may go down and up.
        left: its distance to 1.
    """
    direction = (along[0], torch.full_like(at[1], along[1]), torch.full_like(at[2], along[2]))
    made: list[Posterior] = []

    def hidden(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        made.append(network(y, s, t))
        return made[-1].hidden

    # In float32: a difference of bfloat16 numbers is rounding.
    with torch.autocast(at[0].device.type, enabled=False):
        if method == "jvp":
            try:
                # Fused attention has no forward derivative, and compiled code none either.
                with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
                    # What a network keeps for later calls must not be made within the derivative.
                    network(*(x[:1] for x in at))
                    value, rate = torch.func.jvp(hidden, at, direction)[:2]
            except NotImplementedError as error:
                raise ValueError(
                    "this network has no forward-mode derivative, which flow_map.derivative = 'jvp' takes: use "
                    f"flow_map.derivative = 'difference' ({first_line(error)})"
                ) from error
        else:
            value = hidden(*at)
            rate = _difference(hidden, value, at, direction, room, left)
    posterior = copy.copy(made[0])
    posterior.hidden = value
    return Moving(posterior, rate)


def _difference(
    fn: Callable[..., Tensor],
    value: Tensor,
    at: tuple[Tensor, ...],
    direction: tuple[Tensor, ...],
    room: tuple[Tensor, Tensor],
    left: Tensor,
) -> Tensor:
    """The slope at 0 of the parabola through ε = 0, e and f: central where there is room, else to the side that has."""
    below, above = room
    width = DIFFERENCE * left.clamp_min(LEAST_LEFT)
    central = (below >= width) & (above >= width)
    aside = torch.minimum(width, torch.maximum(above, below) / 2) * torch.where(above >= below, 1, -1)
    e, f = torch.where(central, -width, aside), torch.where(central, width, 2 * aside)
    out = _times(-(e + f) / (e * f), value)
    for near, far in ((e, f), (f, e)):
        moved = fn(*(x + _times(near, d) for x, d in zip(at, direction)))
        out = out + _times(-far / (near * (near - far)), moved)
    return out


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight (B,) times x (B, ...), in the dtype of x."""
    return times_like(weight, x).to(x.dtype) * x
