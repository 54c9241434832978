"""The noise schedule that the discrete families share: α_t = 1 - (1-ε) t, the chance that a token is still clean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

#: One time, or many.
Times = TypeVar("Times", float, Tensor)


def steps_of(count: int) -> Iterator[tuple[int, float, float]]:
    """(number, t, s) of even steps from t = 1 to s = 0, which is exact at the end."""
    for i in range(count):
        yield i, 1 - i / count, 1 - (i + 1) / count


@dataclass(frozen=True)
class LogLinear:
    """α_t = 1 - (1-ε) t for t in [0, 1], and what follows from it.

    Args:
        eps: ε, what is left of a token at t = 1. 1e-3 as in the releases of MDLM, SEDD and Duo; with 0 the likelihood
            bounds are exact.
        first: least time that is trained on; a loss weighted by 1/t is not defined at 0.
    """

    eps: float = 1e-3
    first: float = 1e-3

    def alpha(self, t: Times) -> Times:
        """α_t."""
        return 1 - (1 - self.eps) * t

    def noise(self, t: Times) -> Times:
        """1-α_t, without the rounding of a difference from 1."""
        return (1 - self.eps) * t

    def opening(self, t: Times, s: Times) -> Times:
        """(α_s - α_t)/(1-α_t), the chance that a mask is opened on the way from t to s; 1 for s = 0."""
        # As a difference of the noise: that of 1-α_t from itself is 0, and no mask is left at the end.
        return (self.noise(t) - self.noise(s)) / self.noise(t)

    def rate(self, t: Tensor) -> Tensor:
        """-α'_t."""
        return torch.full_like(t, 1 - self.eps)

    def weight(self, t: Tensor) -> Tensor:
        """-α'_t/(1-α_t) = 1/t, the weight of a masked token's cross-entropy in the likelihood bound."""
        return 1 / t

    def times(self, stratified: Tensor) -> Tensor:
        """Training times of draws on [0, 1)."""
        return self.first + (1 - self.first) * stratified
