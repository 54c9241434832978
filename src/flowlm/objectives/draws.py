"""Random times of a batch: stratified, and stochastically rounded shares."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(num: int, generator: torch.Generator) -> Tensor:
    """num draws on [0, 1), one in each of num equal cells, in random order, float64."""
    cells = torch.arange(num, dtype=torch.float64)
    draws = (cells + torch.rand(num, generator=generator, dtype=torch.float64)) / num
    return draws[torch.randperm(num, generator=generator)]


def stochastic_round(value: float, generator: torch.Generator) -> int:
    """An integer whose mean is value: truncation would give small batches no boundary rows at all."""
    whole = int(value)
    return whole + int(torch.rand((), generator=generator).item() < value - whole)
