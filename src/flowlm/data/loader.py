"""Batches that are a pure function of (seed, step): any step can be asked for, in any order, at no cost.

So there is no state to save: a run that goes on asks for the step it has come to, in as many processes as it likes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlm.rng import key

__all__ = ["Loader"]


_ROUNDS = 24


def permuted(index: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """What stands at places `index` of a permutation of 0 … n-1 that `seed` decides, without the permutation itself.

    Places are pairs (a, b) of a grid of at least n cells. Each round moves one of the two, cyclically, by a number that
    the other and the round decide, as in a Feistel network: so it can be undone. A cell from n on, of which there are
    few, is permuted again until it is one of the n, which so are permuted among themselves (cycle walking; Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        index: places, any shape, each in 0 … n-1.
        n: from 1 up.
        seed: 63 bits, as of `flowlm.rng.key`.

    Returns:
        Of the shape of index.
    """
    width = math.isqrt(n - 1) + 1
    sizes = (np.uint64(-(-n // width)), np.uint64(width))
    # The raw stream of a bit generator never changes with numpy's version, shuffles may.
    keys = np.random.Philox(seed).random_raw(_ROUNDS)
    out = index.astype(np.uint64)
    walking = np.ones(out.shape, bool)
    while walking.any():
        pair = [*np.divmod(out[walking], sizes[1])]
        for number, own in enumerate(keys):
            moved, other = number % 2, 1 - number % 2
            pair[moved] = (pair[moved] + _mixed(pair[other] + own)) % sizes[moved]
        out[walking] = pair[0] * sizes[1] + pair[1]
        walking &= out >= n
    return out.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits: the upper 32, which mix best, before the last shift of splitmix64's finalizer (Steele, Lea,
    Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


class Loader:
    """Rows of `tokens` (N, L) in seeded order; each epoch is a permutation, batches run on over its end.

    Its memory is that of a batch: no order of all rows is kept.

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

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row indices of the global batch at `step`, (batch,). No row comes twice within an epoch."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        n, at, end = len(self.tokens), step * self.size, (step + 1) * self.size
        parts = []
        while at < end:
            epoch, first = divmod(at, n)
            places = np.arange(first, min(n, first + end - at))
            parts.append(permuted(places, n, key(self.seed, "epoch", epoch)))
            at += len(places)
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
