"""Batches that are a pure function of (seed, step): any step can be asked for, in any order, at no cost.

So there is no state to save: a run that goes on asks for the step it has come to, in as many processes as it likes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlm.rng import key

__all__ = ["Loader"]


class Loader:
    """Rows of `tokens` (N, L) in seeded order; each epoch is a permutation, batches run on over its end.

    ValueError: tokens not 2-d or empty, batch < 1.
    """

    def __init__(self, tokens: NDArray[Any], batch: int, seed: int) -> None:
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be (N, L) with N, L >= 1, got the shape {tuple(tokens.shape)}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.tokens = tokens
        self.size = batch
        self.seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # the raw stream of a bit generator never changes with numpy's version, shuffles may
            raw = np.random.Philox(key(self.seed, "epoch", epoch)).random_raw(len(self.tokens))
            while len(self._orders) > 1:  # this epoch's order and the one before: a batch may need both
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = np.argsort(raw, kind="stable")
        return self._orders[epoch]

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row indices of the global batch at `step`, (batch,). No row comes twice within an epoch."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        n, at, end = len(self.tokens), step * self.size, (step + 1) * self.size
        parts = []
        while at < end:
            epoch, first = divmod(at, n)
            parts.append(self._order(epoch)[first : min(n, first + end - at)])
            at += len(parts[-1])
        return np.concatenate(parts)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the global batch at `step`, (stop - start, L), int64.

        Processes that take disjoint ranges together see exactly the global batch.
        """
        stop = self.size if stop is None else stop
        if not 0 <= start < stop <= self.size:
            raise ValueError(f"need 0 <= start < stop <= batch, got {start}:{stop} of a batch of {self.size}")
        own = self.rows(step)[start:stop]
        return torch.from_numpy(self.tokens[own].astype(np.int64))
