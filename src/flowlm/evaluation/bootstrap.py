"""How far a number of samples could have come out otherwise: 95 % intervals over the texts that were measured.

They say what chance in the drawing of texts does, and nothing else: not what another seed of the training, another
scorer or another training text would have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flowlm.rng import key

__all__ = ["RESAMPLES", "mean_interval", "ratio_interval", "resampled", "share_interval"]

RESAMPLES = 1000
_CHUNK = 2**22  # indices drawn at once


def resampled(values: Sequence[Sequence[float] | NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sums (RESAMPLES, k) of k numbers of each of n texts over n texts drawn with replacement, by a fixed seed.

    They are the same texts for all k, and for whatever else is as many.
    """
    of = np.asarray(values, np.float64)
    count = of.shape[1]
    source = np.random.Generator(np.random.Philox(key("bootstrap", count)))
    rows = max(1, _CHUNK // count)
    sums = []
    for start in range(0, RESAMPLES, rows):
        drawn = source.integers(count, size=(min(rows, RESAMPLES - start), count))
        sums.append(np.stack([own[drawn].sum(1) for own in of], axis=1))
    return np.concatenate(sums)


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], through: Callable[[float], float] = float
) -> list[float] | None:
    """95 % percentile-bootstrap interval [low, high] of through(sum parts / sum wholes), pairs drawn together.

    The same numbers have the same interval. Draws whose wholes sum to 0 have no ratio and are left out.

    Args:
        parts, wholes: one of each a text (n,): nats and tokens, say.
        through: rising, such as exp for a perplexity; percentiles go through it.

    Returns:
        None where there are fewer than two texts, or no ratio.

    Raises:
        ValueError: as many parts as wholes are needed.
    """
    a, b = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} parts and {b.size} wholes: give one of each a text")
    if a.size < 2 or not b.any():
        return None
    tops, bottoms = resampled([a, b]).T
    kept = bottoms != 0
    low, high = np.percentile(tops[kept] / bottoms[kept], (2.5, 97.5))
    return [through(float(low)), through(float(high))]


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """The same of the mean of one value a text."""
    return ratio_interval(values, [1.0] * len(values))


def share_interval(share: float, num: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `num`: it stays in [0, 1], and has a width at 0 and 1, where a bootstrap,
    which draws what it has seen, has none."""
    z = 1.96
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding aside
