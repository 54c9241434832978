"""The Gaussian states behind uniform ones (arXiv 2506.10892).

A uniform state is the argmax of a Gaussian one, w = α̃ x_0 + σ̃ ε with α̃² = sigmoid(-g): its argmax is the clean token
with the chance P_c, and any other with equal chances, so that

    α = (V P_c - 1)/(V - 1)      at the signal-to-noise α̃/σ̃

which is the clock τ of flow time t̃ = α̃/(α̃ + σ̃).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowlm.clock import Clock
from flowlm.device import widened
from flowlm.discrete.schedule import LogLinear
from flowlm.posterior import mean_state
from flowlm.rng import normal_rows


def gaussian(g: Tensor) -> tuple[Tensor, Tensor]:
    """(α̃, σ̃) of g, in the widest dtype of its device."""
    g = widened(g)
    return torch.sigmoid(-g).sqrt(), torch.sigmoid(g).sqrt()


def kept(g: Tensor, clock: Clock) -> Tensor:
    """α of g: the chance with which a uniform state keeps its token, at the clock of V tokens."""
    signal, noise = gaussian(g)
    return clock.tau(signal / (signal + noise))


def slope(g: Tensor, clock: Clock) -> Tensor:
    """dα/dg of `kept`, never positive: τ'(t) dt/dg at t = 1/(1 + exp(g/2))."""
    signal, noise = gaussian(g)
    t = signal / (signal + noise)
    return -clock.rate(t) * t * (1 - t) / 2


def level_of(alpha: Tensor, clock: Clock) -> Tensor:
    """g with `kept(g)` = alpha, in the widest dtype of its device."""
    t = clock.time(widened(alpha)).clamp(1e-12, 1 - 1e-12)
    return 2 * ((1 - t).log() - t.log())


def time_of(alpha: Tensor, schedule: LogLinear) -> Tensor:
    """t with α_t = alpha."""
    return (1 - alpha) / (1 - schedule.eps)


def argmax_tokens(tokens: Tensor, g: Tensor, noise: Tensor) -> Tensor:
    """argmax of α̃ x_0 + σ̃ ε (B, L), for ε = noise (B, L, V)."""
    return _state(tokens, g, noise).argmax(-1)


def soft_tokens(
    tokens: Tensor, g: Tensor, noise: Tensor, embedding: Tensor, temperature: float = 1e-3
) -> Tensor:
    """softmax((α̃ x_0 + σ̃ ε)/temperature)·E (B, L, d): the curriculum's input, near the argmax's embedding."""
    return mean_state(_state(tokens, g, noise) / temperature, embedding, embedding.dtype)


def _state(tokens: Tensor, g: Tensor, noise: Tensor) -> Tensor:
    """α̃ x_0 + σ̃ ε (B, L, V)."""
    signal, sigma = (part.to(noise.dtype)[:, None, None] for part in gaussian(g))
    return (sigma * noise).scatter_add(-1, tokens[..., None], signal.expand(*tokens.shape, 1))


def row_noise(seeds: Tensor, shape: tuple[int, int], device: torch.device) -> Callable[[int], Tensor]:
    """ε (L, V) of each row, from one seed a row: never those of all rows at once.

    Args:
        seeds: (B,), integers on the CPU.
        shape: (L, V).
        device: where ε is drawn.
    """
    known: list[int] = seeds.tolist()

    def of(row: int) -> Tensor:
        return normal_rows([("epsilon", known[row])], shape, device)[0]

    return of
