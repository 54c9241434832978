"""Perplexity at equal entropy: a sampler's knobs trade one for the other, so neither says much without the other.

A sampler that repeats itself has a low entropy and with it a low perplexity. Each knob, turned by itself, gives a curve
of (entropy, perplexity); models are compared where their curves pass the entropy of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from flowlm.evaluation.bootstrap import resampled

__all__ = ["Passage", "Texts", "best", "passing", "passing_interval", "settings"]

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


class Texts(NamedTuple):
    """What was measured of each text of a curve's point."""

    nats: Sequence[float]
    tokens: Sequence[float]
    entropies: Sequence[float]


def passing_interval(curve: Sequence[Texts], entropy: float) -> list[float] | None:
    """95 % percentile-bootstrap interval [low, high] of the perplexity at which a curve passes an entropy.

    Text i of every point is drawn together, since all of a sampler's settings start it from the same noise. The entropy
    is taken as known. A draw whose curve does not reach it has no perplexity and counts as the largest.

    Returns:
        None where there are fewer than two texts, or where so many draws do not reach the entropy that high is none.

    Raises:
        ValueError: the points have different numbers of texts.
    """
    counts = {len(own.nats) for own in curve}
    if len(counts) > 1:
        raise ValueError(f"points of {sorted(counts)} texts: give each as many, that they are drawn together")
    if counts in (set(), {0}, {1}):
        return None
    sums = np.stack([resampled(own) for own in curve])  # (points, draws, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        perplexities = np.exp(sums[..., 0] / sums[..., 1])
    entropies = sums[..., 2] / counts.pop()
    found = []
    for draw in range(sums.shape[1]):
        pairs = zip(entropies[:, draw].tolist(), perplexities[:, draw].tolist(), strict=True)
        at = passing([pair for pair in pairs if math.isfinite(pair[1])], entropy)
        found.append(math.inf if at is None else at.perplexity)
    low, high = np.percentile(found, (2.5, 97.5), method="closest_observation")
    return [float(low), float(high)] if math.isfinite(high) else None


def best(curves: Mapping[str, Sequence[Point]], entropy: float) -> tuple[str, Passage] | None:
    """The knob whose curve passes an entropy at the least perplexity, and where; None if none does."""
    reached = {
        knob: value for knob, curve in curves.items() if (value := passing(curve, entropy)) is not None
    }
    return min(reached.items(), key=lambda item: item[1], default=None)
