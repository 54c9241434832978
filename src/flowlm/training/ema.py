"""Averaged weights, matched by name."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """An exponential moving average of a network's parameters, itself a network.

    Decay ramps up as min(decay, (1+n)/(10+n)) over updates n, so that short runs forget their start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, n: int) -> None:
        """Move towards the model's weights after its n-th step (n from 1)."""
        source = dict(model.named_parameters())
        mine = dict(self.model.named_parameters())
        if source.keys() != mine.keys():
            raise ValueError(f"averaged weights and model differ in {sorted(source.keys() ^ mine.keys())}")
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(mine.values()), [source[name].data for name in mine], 1 - decay)
