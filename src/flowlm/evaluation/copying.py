"""How much of samples is taken from training text, word for word.

Every suffix of every passage is put in order once, ranked by its first 1, 2, 4, ... items (Manber & Myers 1993). What a
sample shares with training text from some place on, it shares with the suffix before or after its own place in that
order, which is found by halving. Exact: items are compared themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowlm.evaluation.sequences import flatten

__all__ = ["Copies", "Copying"]

_Ints = NDArray[np.int64]
_Symbols = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Copying:
    """What `Copies.of` finds, arrays (samples,). An empty sample has taken nothing.

    All depend on the training text: a longer one shares more with any text. `longest_max` rises with the number
    of samples, so compare at equal numbers; the others are means, and do not but for chance. Short and common
    phrases are shared by all text: what held-out passages score is what writing no copies looks like.
    """

    longest: _Ints
    """Items of the longest run of the sample that also stands in one training passage."""
    inside: NDArray[np.bool_]
    """Whether the whole sample is such a run."""
    whole: NDArray[np.bool_]
    """Whether the sample is a training passage, from first item to last."""
    grams: _Ints
    """n-grams of the sample."""
    found: _Ints
    """Those of them that stand in a training passage."""
    n: int
    """Their n."""

    @property
    def copied(self) -> float:
        """Share of samples that are wholly a run of a training passage."""
        return float(self.inside.mean())

    @property
    def longest_mean(self) -> float:
        """Mean over samples of the longest run."""
        return float(self.longest.mean())

    @property
    def longest_max(self) -> int:
        """The longest run of all samples."""
        return int(self.longest.max())

    @property
    def found_share(self) -> float | None:
        """Share of all samples' n-grams that stand in a training passage; None if no sample has n items."""
        grams = int(self.grams.sum())
        return int(self.found.sum()) / grams if grams else None

    def summary(self) -> dict[str, float | None]:
        """``copied``, ``longest_mean``, ``longest_max``, and ``found_share`` as e.g. ``found_8``."""
        return {
            "copied": self.copied,
            "longest_mean": self.longest_mean,
            "longest_max": self.longest_max,
            f"found_{self.n}": self.found_share,
        }


#: Items compared at a time: few samples share more with the suffixes that halving meets.
BLOCK = 16
#: Elements of a comparison: bounds its memory.
ELEMENTS = 2**24


class Copies:
    """Training passages, in which runs of samples are looked up; they never cross the border of two passages.

    Args:
        passages: words or token ids of each. Memory is about 40 bytes an item while they are put in order, and 16 then.

    Raises:
        ValueError: no passages, strings, or items other than strings and integers.
    """

    def __init__(self, passages: Sequence[Sequence[Hashable]]):
        items, lengths = flatten("passages", passages)
        self._numbers = {item: number for number, item in enumerate(dict.fromkeys(items), 1)}
        # a border (0) after each; room for a block behind the last
        sizes = lengths + 1
        border = np.repeat(np.cumsum(sizes) - 1, sizes)
        self._symbols = np.zeros(len(border) + BLOCK, np.int32)
        inner = np.arange(len(border)) != border
        self._symbols[: len(border)][inner] = [self._numbers[item] for item in items]
        order = _order(self._symbols[: len(border)], border, int(lengths.max()))
        self._order = order[inner[order]]
        self._whole = {tuple(passage) for passage in passages}

    def of(self, samples: Sequence[Sequence[Hashable]], n: int = 8) -> Copying:
        """What samples share with the passages.

        n: the length of the n-grams that are counted. ValueError: n < 1, no samples, strings, or items other than
        strings and integers.
        """
        if n < 1:
            raise ValueError(f"n is {n}: an n-gram has at least one item; give n >= 1")
        items, lengths = flatten("samples", samples)
        ends = np.cumsum(lengths + 1)
        border = ends - 1
        symbols = np.zeros(int(ends[-1]) + BLOCK, np.int32)
        inner = np.ones(int(ends[-1]), bool)
        inner[border] = False
        # An item that is in no passage is equal to none.
        unseen = len(self._numbers) + 1
        symbols[: len(inner)][inner] = [self._numbers.get(item, unseen) for item in items]
        run = np.zeros(len(inner), np.int64)
        places = np.flatnonzero(inner)
        for start in range(0, len(places), ELEMENTS // BLOCK):
            some = places[start : start + ELEMENTS // BLOCK]
            run[some] = self._longest(symbols, some)
        starts = ends - (lengths + 1)  # every sample has at least its border
        longest = np.maximum.reduceat(run, starts)
        return Copying(
            longest=longest,
            inside=(lengths > 0) & (longest == lengths),
            whole=np.array([len(sample) > 0 and tuple(sample) in self._whole for sample in samples]),
            grams=np.maximum(lengths - n + 1, 0),
            found=np.add.reduceat((run >= n).astype(np.int64), starts),
            n=n,
        )

    def _longest(self, symbols: _Symbols, places: _Ints) -> _Ints:
        """Of each place of samples, how many items from it on stand in a passage."""
        low, high = np.zeros(len(places), np.int64), np.full(len(places), len(self._order))
        shared = np.zeros(len(places), np.int64)
        # Halving ends between two neighbours, and only by having compared with both of them.
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) // 2
            same, above = self._compare(symbols, places[open_], self._order[middle])
            shared[open_] = np.maximum(shared[open_], same)
            low[open_] = np.where(above, middle + 1, low[open_])
            high[open_] = np.where(above, high[open_], middle)
        return shared

    def _compare(self, symbols: _Symbols, a: _Ints, b: _Ints) -> tuple[_Ints, NDArray[np.bool_]]:
        """How many items are the same from places `a` of samples and `b` of passages on, and whether what follows in
        the sample comes later in the order."""
        same, above = np.zeros(len(a), np.int64), np.zeros(len(a), bool)
        left = np.arange(len(a))
        within = np.arange(BLOCK)
        while left.size:
            ours = symbols[(a[left] + same[left])[:, None] + within]
            theirs = self._symbols[(b[left] + same[left])[:, None] + within]
            # a border ends both, even where it meets another
            differs = (ours != theirs) | (ours == 0)
            first = np.where(differs.any(1), differs.argmax(1), BLOCK)
            same[left] += first
            stopped = np.flatnonzero(first < BLOCK)
            at = first[stopped]
            above[left[stopped]] = ours[stopped, at] > theirs[stopped, at]
            left = left[first == BLOCK]
        return same, above


def _order(symbols: _Symbols, border: _Ints, reach: int) -> _Ints:
    """All places, by what stands from each to its border."""
    ranks = symbols.astype(np.int64)
    step = 1
    while step < reach:
        following = ranks[np.minimum(np.arange(len(symbols)) + step, border)]
        ranks = np.unique(ranks * (ranks.max() + 1) + following, return_inverse=True)[1]
        step *= 2
    return np.argsort(ranks, kind="stable")
