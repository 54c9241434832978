"""Diversity against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from flowlm.evaluation.diversity import corpus_entropy, distinct_n, unigram_entropy, unique

LOG2 = math.log(2)


def test_unigram_entropy() -> None:
    # a a b b: log 2;  a b c d: 2 log 2;  a: 0;  a a a b: 2 log 2 - 3/4 log 3
    assert unigram_entropy([list("aabb")]) == pytest.approx(LOG2)
    assert unigram_entropy([list("aabb"), list("abcd"), ["a"]]) == pytest.approx(LOG2)
    assert unigram_entropy([list("aaab")]) == pytest.approx(2 * LOG2 - 0.75 * math.log(3))
    assert unigram_entropy([[1, 1, 1]]) == 0.0
    assert unigram_entropy([[], list("ab")]) == pytest.approx(LOG2 / 2)


def test_corpus_entropy_pools() -> None:
    # each sample says one word only, together they are a fair coin
    assert unigram_entropy([["a"] * 5, ["b"] * 5]) == 0.0
    assert corpus_entropy([["a"] * 5, ["b"] * 5]) == pytest.approx(LOG2)
    assert corpus_entropy([[], []]) == 0.0
    # the samples' mean never exceeds the pool's, for samples of one length
    samples = [[1, 2, 3, 3], [1, 1, 1, 4], [5, 6, 7, 8]]
    assert unigram_entropy(samples) < corpus_entropy(samples)


def test_entropy_is_never_negative() -> None:
    assert all(unigram_entropy([["a"] * n]) == 0.0 for n in range(1, 200))


def test_distinct_n() -> None:
    samples = [list("abab"), list("ba")]
    assert distinct_n(samples, 1) == pytest.approx(2 / 6)
    assert distinct_n(samples, 2) == pytest.approx(2 / 4)  # ab ba ab | ba: none across the two samples
    assert distinct_n(samples, 3) == pytest.approx(2 / 2)
    assert distinct_n(samples, 5) == 0.0
    assert distinct_n([(1, 2), (1, 2)], 2) == 0.5


def test_unique() -> None:
    assert unique([["a", "b"], ["a", "b"], ["b", "a"], []]) == 0.75
    assert unique([(1, 2), [1, 2]]) == 0.5


@pytest.mark.parametrize(
    "measure", [unigram_entropy, corpus_entropy, unique, lambda samples: distinct_n(samples, 2)]
)
def test_refusals(measure: Callable[[Any], float]) -> None:
    with pytest.raises(ValueError, match="samples is empty"):
        measure([])
    with pytest.raises(ValueError, match="split it into words"):
        measure(["a string"])
    with pytest.raises(ValueError, match="split it into words"):
        measure("a string")


def test_distinct_n_refuses_n() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([[1]], 0)
