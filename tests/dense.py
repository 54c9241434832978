"""The path's few functions with the state x (B, L, V) in full: the reference for the low-rank state.

Written from the formulas, without the package: times are floats or (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _column(t: Tensor | float) -> Tensor:
    return torch.as_tensor(t).reshape(-1, 1, 1)


def dense_corrupt(tokens: Tensor, t: Tensor | float, z: Tensor) -> Tensor:
    """x_t = (1-t) z + t·onehot(tokens)."""
    onehot = torch.nn.functional.one_hot(tokens, z.shape[-1]).to(z.dtype)
    return (1 - _column(t)) * z + _column(t) * onehot


def dense_step(x: Tensor, probs: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """X_{s,t}(x) = (1-t)/(1-s)·x + (t-s)/(1-s)·δ."""
    s, t = _column(s), _column(t)
    return (1 - t) / (1 - s) * x + (t - s) / (1 - s) * probs


def dense_sample(
    network: Callable[[Tensor, float, float], Tensor],
    embedding: Tensor,
    prior: Tensor,
    fresh: list[Tensor],
    grid: list[float],
    gamma: float,
) -> tuple[Tensor, list[Tensor]]:
    """The γ-sampler on x: tokens (B, L), and the states x at which the network was called.

    Args:
        network: (xE, s, t) -> probabilities (B, L, V).
        prior: z (B, L, V).
        fresh: ε (B, L, V) of each step but the last.
        grid: flow times from 0 to 1.
    """
    x, seen = prior, []
    for eps, s, t in zip(fresh, grid[:-2], grid[1:-1]):
        seen.append(x)
        middle = 1 - (1 - t) * (1 - gamma**2) ** 0.5
        probs = network(x @ embedding, s, middle)
        x = dense_step(x, probs, s, middle)
        x = x + ((1 - middle) - (1 - t)) * probs + gamma * (1 - t) * eps
    seen.append(x)
    return network(x @ embedding, grid[-2], 1.0).argmax(-1), seen
