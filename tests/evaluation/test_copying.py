"""Copied runs against a search through all of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlm.evaluation.copying import Copies

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=1, max_size=8)


def runs(passage: Sequence[Hashable], length: int) -> list[tuple[Hashable, ...]]:
    return [tuple(passage[i : i + length]) for i in range(len(passage) - length + 1)]


@given(TEXTS, TEXTS, st.integers(1, 9))
def test_equals_a_search(samples: list[list[str]], passages: list[list[str]], n: int) -> None:
    found = Copies(passages).of(samples, n)
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
    found = Copies(passages).of(samples)
    assert found.longest[:50].tolist() == [b - a for a, b in spans]
    assert not found.inside[:50].any()
    assert found.longest[50:].tolist() == [300, 299, 100]
    assert found.inside[50:].tolist() == [True, True, False]
    assert found.whole[50:].tolist() == [True, False, False]
    assert found.found[52] == (100 - 7) + (50 - 7)


def test_runs_longer_than_a_block() -> None:
    """Passages that agree for long with many others, in which halving has to look far."""
    passages = [[0] * k + [k] for k in range(1, 120)]
    found = Copies(passages).of([[0] * 60, [0] * 119, [0] * 200, [0] * 30 + [30], [0] * 30 + [29]])
    assert found.longest.tolist() == [60, 119, 119, 31, 30]
    assert found.inside.tolist() == [True, True, False, True, False]


def test_summary_by_hand() -> None:
    passages = [list("abcd"), list("xy")]
    found = Copies(passages).of([list("abc"), list("xy"), list("cdxy"), []], n=2)
    assert found.longest.tolist() == [3, 2, 2, 0]
    assert found.inside.tolist() == [True, True, False, False]
    assert found.whole.tolist() == [False, True, False, False]
    # ab bc | xy | cd dx xy: all but dx
    assert found.summary() == {"copied": 0.5, "longest_mean": 1.75, "longest_max": 3, "found_2": 5 / 6}
    assert Copies(passages).of([["a"]]).summary()["found_8"] is None


def test_empty_samples_have_taken_nothing() -> None:
    found = Copies([["a"], []]).of([[], []])
    assert found.summary() == {"copied": 0.0, "longest_mean": 0.0, "longest_max": 0, "found_8": None}
    assert not found.whole.any()
    assert Copies([[]]).of([["a"]]).longest.tolist() == [0]


def test_words_and_ids_do_not_meet() -> None:
    assert Copies([[1, 2]]).of([["1", "2"]]).longest.tolist() == [0]
    assert Copies([[0, 1, 2]]).of(np.array([[1, 2]])).inside.tolist() == [True]  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        Copies([["a"]]).of([["a"]], 0)
    with pytest.raises(ValueError, match="samples is empty"):
        Copies([["a"]]).of([])
    with pytest.raises(ValueError, match="passages is empty"):
        Copies([])
    with pytest.raises(ValueError, match="samples: each is a sequence of words"):
        Copies([["a"]]).of(["a b"])
    with pytest.raises(ValueError, match="passages: an item is 'None'"):
        Copies([[None]])
