"""Diversity against values worked out by hand, self-BLEU also against nltk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from flowlm.evaluation.diversity import corpus_entropy, distinct_n, self_bleu, unigram_entropy, unique

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
    "measure", [unigram_entropy, corpus_entropy, unique, lambda samples: distinct_n(samples, 2), self_bleu]
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


def test_self_bleu_by_hand() -> None:
    assert self_bleu([list("abcde")] * 2) == self_bleu([list("abcde")] * 5) == 1.0
    assert self_bleu([list("abcd"), list("efgh"), []]) == 0.0
    # a b c against a b d: p_1 = 2/3, p_2 = 1/2, and the same the other way round
    assert self_bleu([list("abc"), list("abd")], 2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # a a against a: p_1 = 1/2, no pair: 0.1;  a against a a: p_1 = 1, no pair to have: 0.1, shorter: 1/e
    expected = (math.sqrt(0.5 * 0.1) + math.sqrt(1.0 * 0.1) / math.e) / 2
    assert self_bleu([list("aa"), ["a"]], 2) == pytest.approx(expected)


def test_self_bleu_leaves_each_sample_out() -> None:
    # the greatest count of an item stands in the sample itself: the second greatest is what others offer
    assert self_bleu([list("aaab"), list("aaxy"), list("azzz")], 1) == pytest.approx(
        (2 / 4 + 2 / 4 + 1 / 4) / 3
    )


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=2, max_size=8), st.integers(1, 5))
def test_self_bleu_is_that_of_nltk(samples: list[list[str]], n: int) -> None:
    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(samples[:i] + samples[i + 1 :], sample, (1 / n,) * n, smoothing)
        for i, sample in enumerate(samples)
    ]
    assert self_bleu(samples, n) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_self_bleu_rises_with_the_number_of_samples() -> None:
    samples = [[(7 * i * i + j * j * (i % 5)) % 23 for j in range(12)] for i in range(200)]
    assert self_bleu(samples[:10], 3) < self_bleu(samples[:50], 3) < self_bleu(samples, 3)


def test_self_bleu_refuses() -> None:
    with pytest.raises(ValueError, match="one sample"):
        self_bleu([["a"]])
    with pytest.raises(ValueError, match="n is 0"):
        self_bleu([["a"], ["b"]], 0)
