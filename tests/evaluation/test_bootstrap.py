"""Intervals: they hold what they should as often as they say, and shrink as chance does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowlm.evaluation.bootstrap import mean_interval, ratio_interval, share_interval


def test_the_mean_lies_inside_as_often_as_is_said() -> None:
    """Of a skewed law too: exponential, mean 1."""
    rng = np.random.default_rng(0)
    ends = [mean_interval(rng.exponential(size=200).tolist()) for _ in range(400)]
    inside = [low < 1 < high for low, high in ends]  # type: ignore[misc]
    assert 0.91 < np.mean(inside) < 0.98


def test_a_perplexity_lies_inside_as_often_as_is_said() -> None:
    """Texts of different lengths, nats that go with them: exp(sum nats / sum tokens)."""
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(300):
        tokens = rng.integers(5, 60, size=150)
        nats = tokens * 3.0 + np.sqrt(tokens) * rng.normal(size=150)
        ends = ratio_interval(nats.tolist(), tokens.tolist(), math.exp)
        assert ends is not None
        inside.append(ends[0] < math.exp(3) < ends[1])
    assert 0.91 < np.mean(inside) < 0.98


def test_width_is_that_of_chance() -> None:
    rng = np.random.default_rng(2)
    widths = {}
    for num in (400, 6400):
        low, high = mean_interval(rng.normal(size=num).tolist())  # type: ignore[misc]
        widths[num] = high - low
        assert widths[num] == pytest.approx(2 * 1.96 / math.sqrt(num), rel=0.12)
    assert widths[400] / widths[6400] == pytest.approx(4, rel=0.15)


def test_the_same_numbers_have_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=300).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) == ratio_interval([2 * v for v in values], [2.0] * 300)
    assert mean_interval([0.5] * 10) == [0.5, 0.5]


def test_what_has_no_interval() -> None:
    assert mean_interval([]) is None
    assert mean_interval([1.0]) is None
    assert ratio_interval([0.0, 0.0], [0, 0]) is None
    # draws of the empty text alone have no ratio: of the others it is 2
    assert ratio_interval([0.0, 4.0], [0, 2]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="2 parts and 1 wholes"):
        ratio_interval([1, 2], [1])


@pytest.mark.parametrize(("share", "num"), [(0.0, 100), (1.0, 100), (0.5, 10), (0.97, 1000)])
def test_interval_of_a_share(share: float, num: int) -> None:
    low, high = share_interval(share, num)
    assert 0 <= low <= share <= high <= 1
    assert high > low
    # the ends are the shares p with |share - p| = 1.96 sqrt(p (1 - p) / num)
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / num), rel=1e-6)
