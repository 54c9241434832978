"""Perplexity at equal entropy: a sampler's knobs trade one for the other, so neither says much without the other.

A sampler that repeats itself has a low entropy and with it a low perplexity. Each knob, turned by itself, gives a curve
of (entropy, perplexity); models are compared where their curves pass the entropy of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["Passage", "best", "passing", "settings"]

Point = tuple[float, float]
"""(entropy, perplexity)."""


def settings(value: Any, sweep: Sequence[Any]) -> list[Any]:
    """Where a knob is set: the values of a sweep and its own value, in order, numbers by size."""
    every = [*sweep] if value in sweep else [*sweep, value]
    return every if isinstance(value, str) else sorted(every)


class Passage(NamedTuple):
    """Where a curve passes an entropy."""

    perplexity: float
    point: int
    """The last point before it."""
    share: float
    """Of the way from that point to the next one."""

    def between(self, values: Sequence[float]) -> float:
        """Another number of the curve's points there, linear between neighbours: of a mixture of the two settings'
        samples it is what is linear in samples, and near to what is not."""
        value = values[self.point]
        return value if self.share == 0 else value + self.share * (values[self.point + 1] - value)


def passing(curve: Sequence[Point], entropy: float) -> Passage | None:
    """The passage of the least perplexity at which a curve passes an entropy; None where it does not reach it.

    Between neighbouring points (h_0, p_0), (h_1, p_1) with h_0 ≤ h ≤ h_1 or the reverse,

        log p = log p_0 + (h - h_0) / (h_1 - h_0) (log p_1 - log p_0),

    which is what a mixture of the two settings' samples would score, were all of one length. Nothing is
    extrapolated. ValueError: a perplexity that is not positive.
    """
    if any(perplexity <= 0 for _, perplexity in curve):
        raise ValueError(f"perplexities are positive, got {min(p for _, p in curve)}")
    found = [Passage(perplexity, i, 0.0) for i, (h, perplexity) in enumerate(curve) if h == entropy]
    for i, ((h0, p0), (h1, p1)) in enumerate(pairwise(curve)):
        if min(h0, h1) < entropy < max(h0, h1):
            share = (entropy - h0) / (h1 - h0)
            found.append(Passage(math.exp((1 - share) * math.log(p0) + share * math.log(p1)), i, share))
    return min(found, default=None)


def best(curves: Mapping[str, Sequence[Point]], entropy: float) -> tuple[str, Passage] | None:
    """The knob whose curve passes an entropy at the least perplexity, and where; None if none does."""
    reached = {
        knob: value for knob, curve in curves.items() if (value := passing(curve, entropy)) is not None
    }
    return min(reached.items(), key=lambda item: item[1], default=None)
