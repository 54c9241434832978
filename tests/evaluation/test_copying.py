"""Copied runs against a search through all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlm.evaluation.copying import copying

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=1, max_size=8)


def runs(passage: Sequence[Hashable], length: int) -> list[tuple[Hashable, ...]]:
    return [tuple(passage[i : i + length]) for i in range(len(passage) - length + 1)]


@given(TEXTS, TEXTS, st.integers(1, 9))
def test_equals_a_search(samples: list[list[str]], passages: list[list[str]], n: int) -> None:
    found = copying(samples, passages, n)
    taken = {run for passage in passages for length in range(1, 13) for run in runs(passage, length)}
    for row, sample in enumerate(samples):
        longest = max((k for k in range(1, 13) if taken & set(runs(sample, k))), default=0)
        assert found.longest[row] == longest
        assert found.inside[row] == (tuple(sample) in taken)
        assert found.whole[row] == (sample in passages and len(sample) > 0)
        assert found.grams[row] == len(runs(sample, n))
        assert found.found[row] == sum(run in taken for run in runs(sample, n))


def test_long_copies() -> None:
    rng = np.random.default_rng(0)
    passages = [rng.integers(0, 50, 300).tolist() for _ in range(50)]
    # a piece of a passage, between words that never occur; a whole one; one cut short; one across two passages
    spans = [(int(a), int(a + k)) for a, k in zip(rng.integers(0, 100, 50), rng.integers(20, 200, 50))]
    samples = [[-1, *passage[a:b], -2] for passage, (a, b) in zip(passages, spans)]
    samples += [passages[3], passages[4][:-1], passages[5][-100:] + passages[6][:50]]
    found = copying(samples, passages)
    assert found.longest[:50].tolist() == [b - a for a, b in spans]
    assert not found.inside[:50].any()
    assert found.longest[50:].tolist() == [300, 299, 100]
    assert found.inside[50:].tolist() == [True, True, False]
    assert found.whole[50:].tolist() == [True, False, False]
    assert found.found[52] == (100 - 7) + (50 - 7)


def test_summary_by_hand() -> None:
    passages = [list("abcd"), list("xy")]
    found = copying([list("abc"), list("xy"), list("cdxy"), []], passages, n=2)
    assert found.longest.tolist() == [3, 2, 2, 0]
    assert found.inside.tolist() == [True, True, False, False]
    assert found.whole.tolist() == [False, True, False, False]
    # ab bc | xy | cd dx xy: all but dx
    assert found.summary() == {"copied": 0.5, "longest_mean": 1.75, "longest_max": 3, "found_2": 5 / 6}
    assert copying([["a"]], passages).summary()["found_8"] is None


def test_empty_samples_have_taken_nothing() -> None:
    found = copying([[], []], [["a"], []])
    assert found.summary() == {"copied": 0.0, "longest_mean": 0.0, "longest_max": 0, "found_8": None}
    assert not found.whole.any()
    assert copying([["a"]], [[]]).longest.tolist() == [0]


def test_words_and_ids_do_not_meet() -> None:
    assert copying([["1", "2"]], [[1, 2]]).longest.tolist() == [0]
    assert copying(np.array([[1, 2]]), [[0, 1, 2]]).inside.tolist() == [True]  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        copying([["a"]], [["a"]], 0)
    with pytest.raises(ValueError, match="samples is empty"):
        copying([], [["a"]])
    with pytest.raises(ValueError, match="passages is empty"):
        copying([["a"]], [])
    with pytest.raises(ValueError, match="samples: each is a sequence of words"):
        copying(["a b"], [["a"]])
    with pytest.raises(ValueError, match="passages: an item is 'None'"):
        copying([["a"]], [[None]])
