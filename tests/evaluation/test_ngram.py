"""Kneser-Ney against values worked out by hand, a slow reading of the formulas, and known laws."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlm.evaluation.ngram import FALLBACK, UNKNOWN, KneserNey

BEGIN, END = "<begin>", "<end>"

SMALL = st.lists(st.lists(st.sampled_from("abcd"), max_size=7), min_size=1, max_size=12).filter(any)


class Slow:
    """The formulas of the module's docstring, one by one, over tuples."""

    def __init__(self, passages: Sequence[Sequence[Hashable]], order: int) -> None:
        self.order = order
        self.outcomes = [*{item for passage in passages for item in passage}, UNKNOWN, END]
        self.occurs: Counter[tuple[Hashable, ...]] = Counter()
        for passage in passages:
            text = (BEGIN, *passage, END)
            for k in range(1, order + 1):
                self.occurs.update(text[i : i + k] for i in range(len(text) - k + 1))

    def a(self, gram: tuple[Hashable, ...]) -> int:
        if len(gram) == self.order or gram[0] == BEGIN:
            return self.occurs[gram]
        return sum((item, *gram) in self.occurs for item in (BEGIN, *self.outcomes))

    @functools.cache  # noqa: B019 - lives as long as a test
    def discounts(self, k: int) -> tuple[float, ...]:
        t = Counter(self.a(gram) for gram in self.occurs if len(gram) == k and gram != (BEGIN,))
        if t[1] and t[2] and t[3]:
            y = t[1] / (t[1] + 2 * t[2])
            found = 1 - 2 * y * t[2] / t[1], 2 - 3 * y * t[3] / t[2], 3 - 4 * y * t[4] / t[3]
            if all(0 < d <= i for i, d in enumerate(found, 1)):
                return found
        return FALLBACK

    def p(self, item: Hashable, context: tuple[Hashable, ...]) -> float:
        shorter = self.p(item, context[1:]) if context else 1 / len(self.outcomes)
        counts = {x: self.a((*context, x)) for x in self.outcomes}
        if not any(counts.values()):
            return shorter
        d = (0.0, *self.discounts(len(context) + 1))
        whole = sum(counts.values())
        left = sum(d[min(count, 3)] for count in counts.values())
        return (counts[item] - d[min(counts[item], 3)] + left * shorter) / whole

    def log_probs(self, passage: Sequence[Hashable]) -> list[float]:
        text = (BEGIN, *(item if item in self.outcomes else UNKNOWN for item in passage), END)
        return [math.log(self.p(text[i], text[max(0, i - self.order + 1) : i])) for i in range(1, len(text))]


def conditional(model: KneserNey, context: list[Hashable]) -> np.ndarray:
    """p(. | context) of the vocabulary, the unknown and the end."""
    items = [*model.vocabulary, UNKNOWN]
    probs = [model.log_probs([*context, item])[len(context)] for item in items]
    return np.exp([*probs, model.log_probs(context)[-1]])


def zipf(num: int, size: int, seed: int) -> list[list[Hashable]]:
    """Passages of words of very unequal frequencies, each half decided by the word before it."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, size + 1)
    weights /= weights.sum()
    passages: list[list[Hashable]] = []
    for _ in range(num):
        passage: list[Hashable] = []
        last = 0
        for word, follows in zip(rng.choice(size, 12, p=weights), rng.random(12) < 0.5):
            last = (3 * last + 1) % size if follows else int(word)
            passage.append(last)
        passages.append(passage[: rng.integers(1, 13)])
    return passages


def test_by_hand() -> None:
    model = KneserNey.fit([["a", "b"], ["a"]], order=2)
    # a follows begin, b follows a, the end follows both: 1, 1, 2 of 4; 1/2 is left to the uniform 1/4
    # begin a: 2 of 2 less 1;  a b, a end: 1 of 2 less 1/2;  b end: 1 of 1 less 1/2
    assert model.fallback == (1, 2)
    assert model.discounts == (FALLBACK, FALLBACK)
    a, b, unknown, end = 0.25, 0.25, 0.125, 0.375
    first = [(2 - 1) / 2 + a / 2, 0.25 + b / 2, 0.5 + end / 2]
    assert np.exp(model.log_probs(["a", "b"])) == pytest.approx(first)
    # after an unseen word only the shortest context is left
    second = [unknown / 2, b, 0.5 + end / 2]
    assert np.exp(model.log_probs(["never", "b"])) == pytest.approx(second)
    both = -np.log(np.prod(first) * np.prod(second)) / 6
    assert model.perplexity([["a", "b"], ["never", "b"]]) == pytest.approx(math.exp(both))


def test_discounts_by_hand() -> None:
    # a, b, c and the end occur once, d and e twice, f three times, g four times
    model = KneserNey.fit([list("abcddeefffgggg")], order=1)
    assert model.discounts == ((0.5, 1.25, 1.0),)
    assert model.fallback == ()
    left = 4 * 0.5 + 2 * 1.25 + 2 * 1.0
    uniform = left / 15 / 9
    expected = [0.5 / 15 + uniform, 0.75 / 15 + uniform, 2 / 15 + uniform, 3 / 15 + uniform, uniform]
    assert np.exp(model.log_probs([*"adfg", "?"])[:-1]) == pytest.approx(expected)


@settings(deadline=None)
@given(SMALL, st.lists(st.sampled_from("abcdX"), max_size=8), st.integers(1, 5))
def test_equals_the_slow_one(passages: list[list[str]], passage: list[str], order: int) -> None:
    model = KneserNey.fit(passages, order)
    assert model.log_probs(passage) == pytest.approx(Slow(passages, order).log_probs(passage), abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_slow_one_with_discounts(order: int) -> None:
    passages = zipf(80, 200, seed=order)
    model, slow = KneserNey.fit(passages, order), Slow(passages, order)
    assert model.fallback == ()
    for k in range(order):
        assert model.discounts[k] == pytest.approx(slow.discounts(k + 1))
    for passage in zipf(4, 220, seed=99):
        assert model.log_probs(passage) == pytest.approx(slow.log_probs(passage), abs=1e-12)


@settings(deadline=None)
@given(SMALL, st.lists(st.sampled_from("abcdX"), max_size=6), st.integers(1, 5))
def test_probabilities_are_positive_and_sum_to_one(
    passages: list[list[str]], context: list[Hashable], order: int
) -> None:
    probs = conditional(KneserNey.fit(passages, order), context)
    assert probs.min() > 0
    assert probs.sum() == pytest.approx(1, abs=1e-9)


def test_sums_to_one_after_seen_and_unseen_contexts() -> None:
    passages = zipf(300, 300, seed=0)
    model = KneserNey.fit(passages)
    assert model.fallback == ()
    for context in (
        [],
        passages[0][:2],
        passages[1][:4],
        passages[2],
        [299, 298, 297, 296],
        ["never", 1],
        [1, 1],
    ):
        probs = conditional(model, context)
        assert probs.min() > 0
        assert probs.sum() == pytest.approx(1, abs=1e-9)


def test_all_passages_at_once_or_one_by_one() -> None:
    passages, others = zipf(300, 30, seed=1), [*zipf(20, 40, seed=2), []]
    model = KneserNey.fit(passages, 3)
    nats = np.concatenate([model.log_probs(passage) for passage in others])
    assert len(nats) == sum(map(len, others)) + len(others)
    assert model.perplexity(others) == pytest.approx(math.exp(-nats.mean()))
    each, counts = model.nats(others)
    assert counts.tolist() == [len(passage) + 1 for passage in others]
    assert each.tolist() == pytest.approx([-model.log_probs(passage).sum() for passage in others])


def chain(num: int, seed: int) -> tuple[list[list[Hashable]], float, float]:
    """Passages of a Markov chain, the mean of -log p over their items and ends, and its expectation."""
    rng = np.random.default_rng(seed)
    stop = 0.05
    table = np.random.default_rng(7).dirichlet(np.full(6, 0.4), 6)
    start = np.linalg.matrix_power(table, 1000)[0]  # stationary, so that each item has this law

    def draw(probs: np.ndarray) -> int:
        return min(int(np.searchsorted(np.cumsum(probs), rng.random(), side="right")), 5)

    passages: list[list[Hashable]] = []
    nats = 0.0
    for _ in range(num):
        state = draw(start)
        nats -= math.log(start[state])
        passages.append([state])
        while rng.random() >= stop:
            following = draw(table[state])
            nats -= math.log((1 - stop) * table[state, following])
            state = following
            passages[-1].append(state)
        nats -= math.log(stop)
    step = -stop * math.log(stop) - (1 - stop) * math.log(1 - stop)
    step -= (1 - stop) * float((start[:, None] * table * np.log(table)).sum())
    entropy = (step / stop - float(start @ np.log(start))) / (1 / stop + 1)
    return passages, nats / sum(len(passage) + 1 for passage in passages), entropy


def test_approaches_the_entropy_of_a_markov_chain() -> None:
    held_out, nats, entropy = chain(1000, seed=1)
    assert nats == pytest.approx(entropy, abs=0.02)
    excess = [
        math.log(KneserNey.fit(chain(num, seed=0)[0], 2).perplexity(held_out)) - nats
        for num in (10, 100, 2000)
    ]
    assert excess[0] > 2 * excess[1] > 4 * excess[2] > 0
    assert excess[2] < 0.002
    # a shorter memory must miss some of it, a longer one loses little
    passages = chain(2000, seed=0)[0]
    assert math.log(KneserNey.fit(passages, 1).perplexity(held_out)) > nats + 0.3
    assert math.log(KneserNey.fit(passages, 4).perplexity(held_out)) < nats + 0.02


def chi_squared(passages: list[list[Hashable]], law: dict[tuple[Hashable, ...], float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; what is expected fewer than 10 times makes one class."""
    num = len(passages)
    counts = Counter(map(tuple, passages))
    often = [passage for passage, p in law.items() if p * num >= 10]
    expected = np.array([num * law[passage] for passage in often])
    seen = np.array([counts[passage] for passage in often])
    if len(often) < len(law):
        expected, seen = np.append(expected, num - expected.sum()), np.append(seen, num - seen.sum())
    return float(((seen - expected) ** 2 / expected).sum()), len(expected) - 1


@pytest.mark.parametrize("order", [1, 2, 5])
def test_samples_follow_the_model(order: int) -> None:
    model = KneserNey.fit([list("abab"), list("ab"), list("ba"), ["c"], list("abc"), list("ab")], order)
    passages = model.sample(40_000, seed=order, max_length=3)
    law: dict[tuple[Hashable, ...], float] = {}
    prefixes: list[tuple[Hashable, ...]] = [()]
    for length in range(4):
        for prefix in prefixes:
            nats = model.log_probs(prefix)
            # with three items the passage is cut, whatever would have come
            law[prefix] = math.exp(nats[:-1].sum() if length == 3 else nats.sum())
        prefixes = [(*prefix, item) for prefix in prefixes for item in (*model.vocabulary, UNKNOWN)]
    assert sum(law.values()) == pytest.approx(1)
    statistic, freedom = chi_squared(passages, law)
    assert freedom > 30
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    assert any(UNKNOWN in passage for passage in passages)


def test_samples_score_as_the_model_expects() -> None:
    # the mean of -log p over samples is the entropy; so it is the same over two sets of samples
    model = KneserNey.fit(zipf(2000, 60, seed=0))
    perplexities = [model.perplexity(model.sample(4000, seed, max_length=1000)) for seed in (1, 2)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.03)


def test_a_sample_depends_on_its_seed_and_number_alone() -> None:
    model = KneserNey.fit(zipf(500, 40, seed=3))
    passages = model.sample(20, seed=5, max_length=30)
    assert passages == model.sample(20, seed=5, max_length=30)
    assert passages[:7] == model.sample(7, seed=5, max_length=30)
    assert [passage[:4] for passage in passages] == model.sample(20, seed=5, max_length=4)
    assert passages != model.sample(20, seed=6, max_length=30)
    assert len({tuple(passage) for passage in passages}) > 10
    assert max(map(len, passages)) <= 30


def test_one_word_over_and_over() -> None:
    model = KneserNey.fit([["a"] * 1000], order=3)
    assert model.fallback == (1, 2, 3)
    assert model.discounts == (FALLBACK,) * 3
    assert np.exp(model.log_probs(["a", "a", "a"]))[2] > 0.99
    assert conditional(model, ["a", "a"]).sum() == pytest.approx(1, abs=1e-9)


def test_passages_shorter_than_the_order() -> None:
    model = KneserNey.fit([["a"], []], order=5)
    assert len(model.discounts) == 3  # begin a end
    assert model.order == 5
    assert model.log_probs(["a", "a"]) == pytest.approx(Slow([["a"], []], 5).log_probs(["a", "a"]))
    assert set(map(tuple, model.sample(50, 0, 3))) >= {(), ("a",)}


def test_the_unknown_may_be_left_out_of_what_is_drawn() -> None:
    """Its share goes evenly to the known and the end, and nothing else changes."""
    model = KneserNey.fit([["a", "b"], ["b", "c", "a"]], order=2)
    n = 100_000
    first = [(passage or ["end"])[0] for passage in model.sample(n, 0, 1, unknown=False)]
    assert UNKNOWN not in first
    law = {item: math.exp(model.log_probs([item])[0]) for item in ("a", "b", "c", UNKNOWN)}
    law["end"] = 1 - sum(law.values())
    within = 4 * math.sqrt(0.25 / n)
    assert law[UNKNOWN] / 4 > within, "else the test would see nothing"
    for item in ("a", "b", "c", "end"):
        assert first.count(item) / n == pytest.approx(law[item] + law[UNKNOWN] / 4, abs=within)


def test_unknown_in_training_text_is_the_unknown() -> None:
    model = KneserNey.fit([["a", UNKNOWN, "b"], [UNKNOWN]], order=2)
    assert model.vocabulary == ("a", "b")
    assert model.log_probs(["a", "never"]) == pytest.approx(model.log_probs(["a", UNKNOWN]))
    assert np.exp(model.log_probs(["never"])[0]) > 0.25
    assert conditional(model, ["a"]).sum() == pytest.approx(1, abs=1e-9)


def test_identity() -> None:
    passages = [["the", "cat"], ["the", "dog", "and", "the", "hen"]]
    model = KneserNey.fit(passages, 2)
    assert model.name == "Kneser-Ney 2-gram, 7 words, vocabulary 5"
    assert len(repr(model)) < 400
    tokens = KneserNey.fit([[1, 2, 1]])
    assert tokens.name == "Kneser-Ney 5-gram, 3 tokens, vocabulary 2"
    arrays = KneserNey.fit(np.array([[1, 2, 1]]))  # type: ignore[arg-type]
    assert arrays.log_probs([2, 1]) == pytest.approx(tokens.log_probs(np.array([2, 1])))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="order is 0"):
        KneserNey.fit([["a"]], 0)
    with pytest.raises(ValueError, match="passages is empty"):
        KneserNey.fit([])
    with pytest.raises(ValueError, match="all 2 are empty"):
        KneserNey.fit([[], []])
    with pytest.raises(ValueError, match="split it into words"):
        KneserNey.fit(["a string"])
    with pytest.raises(ValueError, match=r"1\.5.*float"):
        KneserNey.fit([["a", 1.5]])
    with pytest.raises(ValueError, match=r"tensor.*tolist"):
        KneserNey.fit(torch.tensor([[1, 2]]))  # type: ignore[arg-type]
    model = KneserNey.fit([["a"]])
    with pytest.raises(ValueError, match="passage is the string 'a b'"):
        model.log_probs("a b")
    with pytest.raises(ValueError, match=r"passage: an item is 'None'.*NoneType"):
        model.log_probs([None])
    with pytest.raises(ValueError, match="passages is empty"):
        model.perplexity([])
    with pytest.raises(ValueError, match="split it into words"):
        model.perplexity(["a b"])
    with pytest.raises(ValueError, match="num is 0"):
        model.sample(0, 0, 5)
    with pytest.raises(ValueError, match="max_length is 0"):
        model.sample(1, 0, 0)
