"""What is minimised: each objective draws its times for a global batch and returns per-token losses.

An objective splits in two so that a batch may be accumulated or sharded in any way with the same result:
`draw` makes the per-row randomness of the whole batch, `losses` works on any of its rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flowlm.denoiser import Denoiser
from flowlm.objectives.flow import FlowObjective
from flowlm.objectives.flow_map import FlowMapConfig, FlowMapObjective


class Objective(Protocol):
    """What the training loop asks of an objective."""

    def prepare(self, model: Denoiser) -> None:
        """Called once a step, before any micro-batch: builds the noise law (its Gram) under the weights."""

    @property
    def noise_width(self) -> int:
        """Standard normals needed per token, after `prepare`."""

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Per-row draws of a global batch of num rows: tensors (num,), on the CPU."""

    def losses(self, model: Denoiser, tokens: Tensor, xi: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Per-token losses (B, L).

        Args:
            tokens: (B, L).
            xi: standard normals (B, L, noise_width).
            draws: the rows' share of `draw`, on the CPU.
        """


__all__ = ["FlowMapConfig", "FlowMapObjective", "FlowObjective", "Objective"]
