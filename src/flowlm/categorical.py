"""Exact categorical draws: float64, by inversion, from uniforms that the caller made."""

from __future__ import annotations

import torch
from torch import Tensor


def categorical(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices (...) drawn in proportion to weights (..., K).

    In float32 the uniforms have 24 bits, and rare tokens come up too seldom: samples look better than the model is
    (arXiv 2409.02908).

    Args:
        weights: not negative, not all zero, float64.
        uniform: (...) on [0, 1), float64.
    """
    total = weights.cumsum(-1)
    index = torch.searchsorted(total, (uniform * total[..., -1])[..., None], right=True)
    return index.squeeze(-1).clamp_max(weights.shape[-1] - 1)
