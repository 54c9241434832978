"""Rows: the law scores as itself, everything after the end is ignored, keys keep their order."""

from __future__ import annotations

import math

import pytest

from flowlm.data.grammar import Grammar, tokenize
from flowlm.evaluation.metrics import (
    ROW,
    evaluate_texts,
    law_row,
    make_row,
    merged,
    passage,
    samples_row,
    words,
)
from flowlm.evaluation.oracle import score
from flowlm.evaluation.samples import Header, Record

NUM = 2000


@pytest.fixture(scope="module")
def story() -> Grammar:
    return Grammar()


def test_law_is_the_reference(story: Grammar) -> None:
    row = law_row(story, NUM, seed=5)
    assert tuple(row)[: len(ROW)] == ROW
    assert (row["model"], row["nfe"], row["num"], row["seed"], row["law"]) == ("law", 0, NUM, 5, story.hash)
    assert row["valid"] == row["parsed"] == 1.0
    assert not any(row["broken"].values())
    assert 0.6 < row["slot_tv"] / row["slot_tv_floor"] < 1.5
    assert 0.8 < row["pair_tv"] / row["pair_tv_floor"] < 1.2
    assert row["nll_per_story"] == pytest.approx(story.entropy, abs=0.2)
    assert row["unique"] > 0.99
    assert (row["seconds"], row["tokens_per_second"], row["dtype"]) == (None, None, None)
    assert row["commit"]


def test_law_row_refuses(story: Grammar) -> None:
    with pytest.raises(ValueError, match="num is 0"):
        law_row(story, 0, 0)


def test_numbers_by_hand() -> None:
    report = evaluate_texts(["a a b b [EOS] z z z", "a, a", "a a b b"])
    log2 = math.log(2)
    third = math.log(3) - 2 / 3 * log2  # a , a
    assert report["num"] == 3
    assert report["entropy"] == pytest.approx((2 * log2 + third) / 3)
    assert report["unique"] == pytest.approx(2 / 3)
    assert report["distinct_1"] == pytest.approx(3 / 11)
    assert report["distinct_2"] == pytest.approx(5 / 8)  # aa ab bb | a, ,a | aa ab bb
    assert report["distinct_3"] == pytest.approx(3 / 5)  # aab abb | a,a | aab abb
    assert report["mean_length"] == pytest.approx(11 / 3)
    assert "valid" not in report


def test_only_the_passage_counts(story: Grammar) -> None:
    texts = story.sample(50, 1)
    dressed = [f" {text} [EOS] {text} [EOS]\n" for text in texts]
    plain = evaluate_texts(texts, story)
    assert evaluate_texts(dressed, story) == plain
    assert plain["valid"] == 1.0
    by_law = score(texts, story)
    intervals = by_law.pop("intervals")
    assert plain.items() >= by_law.items()
    assert plain["intervals"].items() >= intervals.items()
    low, high = plain["intervals"]["entropy"]
    assert low < plain["entropy"] < high
    assert passage("[EOS] late") == ""
    assert evaluate_texts(["", "[EOS]"], story)["valid"] == 0.0


def test_faults_show(story: Grammar) -> None:
    texts = story.sample(100, 2)
    report = evaluate_texts([*texts[:90], *(["no story at all."] * 10)], story)
    assert report["valid"] == pytest.approx(0.9)
    assert report["broken"]["form"] == pytest.approx(0.1)
    repeated = evaluate_texts(texts[:1] * 100, story)
    assert repeated["valid"] == 1.0
    assert repeated["unique"] == 0.01
    assert repeated["slot_tv"] > 5 * repeated["slot_tv_floor"]


def test_words_agree_with_the_grammar(story: Grammar) -> None:
    for text in story.sample(200, 3):
        assert words(text) == tokenize(text)
    assert words("Don't go: 3 Füchse (äh)!") == ["Don't", "go", ":", "3", "Füchse", "(", "äh", ")", "!"]


def test_row_of_a_samples_file(story: Grammar) -> None:
    texts = story.sample(20, 4)
    records = [Record(i, text, [1] * 64, 2, 9) for i, text in enumerate(texts)]
    header = Header(
        model="fmlm", recipe="story", nfe=2, sampler={"gamma": 0.0}, seed=9, dtype="bfloat16", seconds=4.0
    )
    row = samples_row(header, records, story)
    assert tuple(row)[: len(ROW)] == ROW
    assert (row["model"], row["nfe"], row["num"], row["seed"], row["dtype"]) == ("fmlm", 2, 20, 9, "bfloat16")
    assert row["tokens_per_second"] == 20 * 64 / 4.0
    assert row["law"] == story.hash
    assert row["valid"] == 1.0
    assert (row["recipe"], row["sampler"]) == ("story", {"gamma": 0.0})


def test_row_of_a_foreign_file_has_gaps() -> None:
    row = samples_row(Header(), [Record(0, "some text", [], None, None)])
    assert tuple(row)[: len(ROW)] == ROW
    gaps = (
        "nfe",
        "valid",
        "broken",
        "nll_per_token",
        "slot_tv",
        "pair_tv",
        "seconds",
        "tokens_per_second",
        "law",
    )
    assert all(row[key] is None for key in gaps)
    assert row["entropy"] == pytest.approx(math.log(2))


def test_make_row_orders() -> None:
    row = make_row({"later": 1, "law": "x", "model": "m"})
    assert tuple(row) == (*ROW, "later")
    assert row["valid"] is None


def test_merged_keeps_the_intervals_of_all() -> None:
    one, two = {"a": 1, "b": 1, "intervals": {"a": [0, 2]}}, {"b": 2, "intervals": {"b": [1, 3]}}
    assert merged(one, two, {"c": 3}) == {"a": 1, "b": 2, "c": 3, "intervals": {"a": [0, 2], "b": [1, 3]}}
    assert one["intervals"] == {"a": [0, 2]}


def test_refusals(story: Grammar) -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        evaluate_texts([], story)
    with pytest.raises(ValueError, match="single string"):
        evaluate_texts("one text", story)
