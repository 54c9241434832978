"""Weights of a flow map's rows by how large their losses are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Bins of either clock time, how much of a mean a step keeps, and the least loss, as a share of the mean of all, that a
#: weight is the inverse of.
BINS, MEMORY, LEAST = 8, 0.98, 0.05


class InverseWeights:
    """Weights w(s, t) ∝ 1/E[loss | s, t]: what a learned weight, e^(-v) loss + v, comes to at its least, without its
    network. The mean over all rows seen is 1.

    Losses are kept by bins of the clock times of s and t. Weights change between steps alone, so that micro-batches are
    weighted alike.
    """

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(2, BINS * BINS, dtype=torch.float64)
        self._new: list[tuple[Tensor, Tensor]] = []

    def of(self, tau_s: Tensor, tau_t: Tensor) -> Tensor:
        """Weights (B,), float32, of rows at clock times (B,); 1 where nothing is known."""
        seen = self.count > 0
        if not bool(seen.any()):
            return torch.ones(len(tau_s))
        overall = self.total.sum() / self.count.sum()
        mean = torch.where(seen, self.total / self.count.clamp_min(1e-12), overall)
        weight = 1 / mean.clamp_min(LEAST * float(overall)).clamp_min(1e-12)
        weight = weight * self.count.sum() / (weight * self.count).sum()
        return weight[self._bins(tau_s, tau_t)].float()

    def observe(self, tau_s: Tensor, tau_t: Tensor, losses: Tensor) -> None:
        """Losses (B,) of rows; they count from the next `step` on."""
        self._new.append((self._bins(tau_s, tau_t), losses.detach()))

    def step(self, gather: Callable[[list[Any]], list[Any]] = list) -> None:
        """Take in what was observed.

        Args:
            gather: as of `flowlm.families.Objective`.
        """
        new = gather([(bins, losses.cpu()) for bins, losses in self._new])
        self._new = []
        if not new:
            return
        index = torch.cat([bins for bins, _ in new])
        losses = torch.cat([losses for _, losses in new]).double()
        self.total = (MEMORY * self.total).index_add(0, index, losses)
        self.count = (MEMORY * self.count).index_add(0, index, torch.ones_like(losses))

    def state(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, Tensor]:
        """What a resume needs; gather as of `step`."""
        self.step(gather)  # what the last step observed; its own next one then finds nothing
        return {"weights.total": self.total, "weights.count": self.count}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.total, self.count = state["weights.total"], state["weights.count"]

    @staticmethod
    def _bins(tau_s: Tensor, tau_t: Tensor) -> Tensor:
        s, t = ((tau * BINS).long().clamp(0, BINS - 1).cpu() for tau in (tau_s, tau_t))
        return BINS * s + t
