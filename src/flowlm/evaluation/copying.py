"""How much of samples is taken from training text, word for word.

Every suffix of every passage and sample is ranked by its first 1, 2, 4, ... items (Manber & Myers 1993). In that
order, what a sample shares with training text from some place on, it shares with the next suffix of a training
passage above or below. Exact: ranks are equal if and only if the items are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowlm.evaluation.sequences import flatten

__all__ = ["Copying", "copying"]

_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Copying:
    """What `copying` finds, arrays (samples,). An empty sample has taken nothing.

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


def _ranks(symbols: _Ints, border: _Ints, reach: int) -> list[_Ints]:
    """ranks[j] (T,): the order of what stands from each place to 2^j items on or to its border, whichever comes
    first; 0 at a border, where nothing stands. Up to the first 2^j >= reach."""
    ranks = [symbols]
    step = 1
    while step < reach:
        following = ranks[-1][np.minimum(np.arange(len(symbols)) + step, border)]
        keys = ranks[-1] * (ranks[-1].max() + 1) + following
        ranks.append(np.unique(keys, return_inverse=True)[1])
        step *= 2
    return ranks


def _shared(ranks: list[_Ints], border: _Ints, a: _Ints, b: _Ints) -> _Ints:
    """How many items are the same from places `a` and from places `b` on; none where b is -1."""
    start = a
    for level in reversed(range(len(ranks))):
        step = 2**level
        # equal ranks are equal items, and as many as `step` if that many stand before the border of one
        same = (b >= 0) & (a + step <= border[a]) & (ranks[level][a] == ranks[level][b])
        a, b = a + step * same, b + step * same
    return a - start


def copying(
    samples: Sequence[Sequence[Hashable]], passages: Sequence[Sequence[Hashable]], n: int = 8
) -> Copying:
    """Compare `samples` with training `passages`; runs never cross the border of two passages.

    n: the length of the n-grams that are counted. ValueError: n < 1, no samples, no passages, strings, or items
    other than strings and integers.
    """
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one item; give n >= 1")
    items, lengths = flatten("passages", passages)
    own, own_lengths = flatten("samples", samples)
    numbers = {item: number for number, item in enumerate(dict.fromkeys(items + own), 1)}

    # training text, then samples, a border (0) after each
    sizes = np.append(lengths, own_lengths) + 1
    border = np.repeat(np.cumsum(sizes) - 1, sizes)
    inner = np.arange(len(border)) != border
    symbols = np.zeros(len(border), np.int64)
    symbols[inner] = [numbers[item] for item in items + own]
    reach = max(1, int(own_lengths.max()))  # no run is longer
    ranks = _ranks(symbols, border, reach)

    first = int((lengths + 1).sum())  # where the samples begin
    order = np.argsort(ranks[-1], kind="stable")
    training = inner & (np.arange(len(border)) < first)
    # the nearest place of training text above and below each in that order, -1 where there is none
    index = np.where(training[order], np.arange(len(order)), -1)
    above = np.maximum.accumulate(index)
    index[index < 0] = len(order)
    below = np.minimum.accumulate(index[::-1])[::-1]
    neighbours = np.full((2, len(order)), -1)
    neighbours[0, order] = np.where(above >= 0, order[above], -1)
    neighbours[1, order] = np.where(below < len(order), order[np.minimum(below, len(order) - 1)], -1)

    own_places = np.arange(first, len(border))
    run = np.maximum(*(_shared(ranks, border, own_places, b[own_places]) for b in neighbours))
    starts = np.cumsum(own_lengths + 1) - (own_lengths + 1)  # every sample has at least its border
    longest = np.maximum.reduceat(run, starts)
    known = {tuple(passage) for passage in passages}
    return Copying(
        longest=longest,
        inside=(own_lengths > 0) & (longest == own_lengths),
        whole=np.array([len(sample) > 0 and tuple(sample) in known for sample in samples]),
        grams=np.maximum(own_lengths - n + 1, 0),
        found=np.add.reduceat((run >= n).astype(np.int64), starts),
        n=n,
    )
