"""The oracle: exact samples score like the law, and every fault shows in its own number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowlm.data.grammar import Grammar, Slot, Spec, tokenize
from flowlm.evaluation.oracle import MAX_JOINT_VALUES, pairs, score, tv_floor

KEYS = {
    "num", "parsed", "valid", "broken", "nll_per_story", "nll_per_token",
    "slot_tv", "slot_tv_max", "slot_tv_by_slot", "slot_tv_floor",
    "pair_tv", "pair_tv_max", "pair_tv_floor",
    "slot_tv_even",
    "pair_tv_even",
    "slot_coverage", "pair_coverage", "intervals",
}  # fmt: skip

COINS = Spec(
    (
        Slot("coin", {"heads": 3, "tails": 1}),
        Slot("bet", {"heads": {"won": 1}, "tails": {"lost": 1, "won": 1}}, "coin"),
        Slot("again", {None: 1, "again": 1}),
    ),
    "{coin} and {bet} {again}.",
)


@pytest.fixture(scope="module")
def story() -> Grammar:
    return Grammar()


@pytest.fixture(scope="module")
def texts(story: Grammar) -> list[str]:
    return story.sample(4000, seed=11)


def test_exact_samples(story: Grammar, texts: list[str]) -> None:
    report = score(texts, story)
    assert set(report) == KEYS
    assert report["num"] == 4000
    assert report["valid"] == report["parsed"] == 1.0
    assert report["broken"] == dict.fromkeys(story.rules, 0.0)
    assert report["nll_per_story"] == pytest.approx(story.entropy, abs=0.1)
    assert set(report["slot_tv_by_slot"]) == set(story.slots)
    assert report["slot_tv"] == pytest.approx(report["slot_tv_floor"], rel=0.3)
    assert report["pair_tv"] == pytest.approx(report["pair_tv_floor"], rel=0.1)
    assert report["slot_tv_max"] == max(report["slot_tv_by_slot"].values()) < 0.06
    assert report["pair_tv_max"] < 0.2


def test_likelihoods_are_means_over_valid_stories(story: Grammar, texts: list[str]) -> None:
    few = texts[:5]
    nll = [-story.log_prob(text) for text in few]
    report = score([*few, "nonsense", few[0].replace(" went to ", " went ")], story)
    assert report["nll_per_story"] == pytest.approx(np.mean(nll))
    rates = [n / (len(tokenize(text)) + 1) for n, text in zip(nll, few, strict=True)]
    assert report["nll_per_token"] == pytest.approx(np.mean(rates))
    assert report["valid"] == report["parsed"] == 5 / 7
    assert report["broken"]["form"] == 2 / 7


def test_one_perfect_story_over_and_over(story: Grammar, texts: list[str]) -> None:
    """Valid throughout, and as far from the law as one value is: TV = 1 - p(value)."""
    report = score([texts[0]] * 100, story)
    slots = story.judge(texts[0]).slots
    assert slots is not None
    assert report["valid"] == 1.0
    for slot, tv in report["slot_tv_by_slot"].items():
        assert tv == pytest.approx(1 - story.marginal(slot)[slots[slot]])
    joint = [1 - story.pair_marginal(a, b)[slots[a], slots[b]] for a, b in pairs(story)]
    assert report["pair_tv"] == pytest.approx(np.mean(joint))
    assert report["pair_tv_max"] == pytest.approx(max(joint))
    assert report["pair_tv"] > 3 * report["pair_tv_floor"]


def test_broken_agreement_shows_by_name_and_in_its_pair(story: Grammar, texts: list[str]) -> None:
    """Feelings handed to the wrong stories: marginals stay, validity and the pair's law do not."""
    feelings = [story.judge(text).slots["feeling"] for text in texts]  # type: ignore[index]
    moved = [
        text.replace(f" felt {mine} ", f" felt {other} ")
        for text, mine, other in zip(texts, feelings, feelings[1:] + feelings[:1], strict=True)
    ]
    exact, report = score(texts, story), score(moved, story)
    assert report["parsed"] == 1.0
    assert report["valid"] == pytest.approx(1 - report["broken"]["feeling"])
    assert report["valid"] < 0.4
    assert sum(share > 0 for share in report["broken"].values()) == 1
    assert report["slot_tv_by_slot"] == pytest.approx(exact["slot_tv_by_slot"])
    assert report["pair_tv_max"] > 0.5 > exact["pair_tv_max"]


def test_nothing_valid_and_nothing_parsed(story: Grammar, texts: list[str]) -> None:
    wrong = [
        text.replace(" girl ", " x ").replace(" boy ", " girl ").replace(" x ", " boy ")
        for text in texts[:50]
    ]
    report = score(wrong, story)
    assert (report["valid"], report["parsed"]) == (0.0, 1.0)
    assert report["broken"]["gender"] == 1.0
    assert report["nll_per_story"] is report["nll_per_token"] is None
    assert report["slot_tv"] is not None
    report = score(["", "no story at all."], story)
    assert set(report) == KEYS
    assert (report["valid"], report["parsed"], report["broken"]["form"]) == (0.0, 0.0, 1.0)
    for key in ("slot_tv", "slot_tv_max", "slot_tv_floor", "pair_tv", "pair_tv_max", "pair_tv_floor"):
        assert report[key] is None
    assert (report["slot_coverage"], report["pair_coverage"]) == (0.0, 0.0)
    assert report["intervals"]["nll_per_token"] is None
    low, high = report["intervals"]["valid"]
    assert low == 0 < high
    assert report["slot_tv_by_slot"] == {}


def test_distances_by_hand() -> None:
    """coin 3/4, 1/4; bet won 7/8; pairs (heads won) 3/4, (tails won) 1/8, (tails lost) 1/8."""
    grammar = Grammar(COINS)
    assert pairs(grammar) == [("coin", "bet"), ("coin", "again"), ("bet", "again")]
    report = score(["heads and won.", "heads and lost again.", "tails and lost.", "tails and won."], grammar)
    assert report["broken"] == {"form": 0.0, "bet": 0.25}
    assert report["slot_tv_by_slot"] == pytest.approx({"coin": 1 / 4, "bet": 3 / 8, "again": 1 / 4})
    assert report["slot_tv"] == pytest.approx((1 / 4 + 3 / 8 + 1 / 4) / 3)
    # each pair has one quarter of the stories, or two in one cell:
    coin_bet = (abs(1 / 4 - 3 / 4) + 1 / 4 + 2 * abs(1 / 4 - 1 / 8)) / 2
    coin_again = (2 * abs(1 / 4 - 3 / 8) + abs(2 / 4 - 1 / 8) + 1 / 8) / 2
    bet_again = (abs(2 / 4 - 7 / 16) + 7 / 16 + 2 * abs(1 / 4 - 1 / 16)) / 2
    assert report["pair_tv"] == pytest.approx((coin_bet + coin_again + bet_again) / 3)
    assert report["pair_tv_max"] == pytest.approx(max(coin_bet, coin_again, bet_again))
    assert report["nll_per_story"] == pytest.approx((math.log(8 / 3) + 2 * math.log(16)) / 3)


def test_coverage_by_hand() -> None:
    """coin 3/4, 1/4; bet won 7/8; again 1/2. What is told counts once, and what cannot be told not at all."""
    grammar = Grammar(COINS)
    report = score(["heads and won."] * 3, grammar)
    assert report["slot_coverage"] == pytest.approx((3 / 4 + 7 / 8 + 1 / 2) / 3)
    # heads won 3/4, heads without again 3/8, won without again 7/16
    assert report["pair_coverage"] == pytest.approx((3 / 4 + 3 / 8 + 7 / 16) / 3)
    report = score(["heads and lost again.", "nonsense"], grammar)  # impossible, and yet of slots that are
    assert report["slot_coverage"] == pytest.approx((3 / 4 + 1 / 8 + 1 / 2) / 3)
    assert report["pair_coverage"] == pytest.approx((0 + 3 / 8 + 1 / 16) / 3)
    whole = [
        f"{coin} and {bet}{end}"
        for coin, bet in (("heads", "won"), ("tails", "won"), ("tails", "lost"))
        for end in (".", " again.")
    ]
    report = score(whole, grammar)
    assert (report["slot_coverage"], report["pair_coverage"]) == (pytest.approx(1), pytest.approx(1))


def test_coverage_of_exact_samples(story: Grammar, texts: list[str]) -> None:
    """As expected of n of them: sum p (1 - (1 - p)^n); of one story, far from it."""
    for num in (100, 1000):
        expected = [
            sum(p * (1 - (1 - p) ** num) for p in story.pair_marginal(a, b).values()) for a, b in pairs(story)
        ]
        assert score(texts[:num], story)["pair_coverage"] == pytest.approx(np.mean(expected), abs=0.01)
    assert score(texts[:1] * 100, story)["pair_coverage"] < 0.2


def test_intervals(story: Grammar, texts: list[str]) -> None:
    report = score([*texts[:300], *(["nonsense"] * 100)], story)
    low, high = report["intervals"]["valid"]
    assert low < 0.75 < high < low + 0.1
    low, high = report["intervals"]["nll_per_token"]
    assert low < report["nll_per_token"] < high
    assert high - low == pytest.approx(
        2 * 1.96 * np.std([-story.log_prob(t) / (len(tokenize(t)) + 1) for t in texts[:300]]) / 300**0.5,
        rel=0.2,
    )


def test_a_law_of_one_slot_has_no_pairs() -> None:
    report = score(["so x."], Grammar(Spec((Slot("a", {"x": 1, "y": 1}),), "so {a}.")))
    assert report["slot_tv"] == 0.5
    assert report["pair_tv"] is report["pair_tv_max"] is report["pair_tv_floor"] is None


def test_pairs_hold_all_kin_and_only_small_joints(story: Grammar) -> None:
    chosen = set(pairs(story))
    kin = {(slot.parent, slot.name) for slot in story.spec.slots if slot.parent}
    assert kin <= chosen
    assert {("hero", "time"), ("visitor", "activity")} & chosen
    for a, b in chosen - kin:
        assert len(story.pair_marginal(a, b)) <= MAX_JOINT_VALUES


def test_floor_is_what_exact_samples_show() -> None:
    rng = np.random.default_rng(0)
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    for num in (200, 5000):
        shares = rng.multinomial(num, probs, size=2000) / num
        seen = 0.5 * np.abs(shares - probs).sum(axis=1).mean()
        assert tv_floor(probs, num) == pytest.approx(seen, rel=0.05)
    assert tv_floor(np.array([1.0]), 10) == 0.0


def test_errors(story: Grammar) -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        score([], story)
    with pytest.raises(ValueError, match="single string 'Anna was"):
        score("Anna was a kind girl.", story)


def test_even_distances_do_not_depend_on_how_many_there_are(story: Grammar) -> None:
    """Of exact stories, and of stories that are half one child's: the same of 100 of them as of 1,000."""
    exact = story.sample(1000, 3)
    same = [text for text in story.sample(4000, 4) if text.startswith("Finn ")][:300]
    for texts in (exact, exact[:300] + same):
        few, many = score(texts[:: len(texts) // 150], story), score(texts, story)
        for key in ("slot_tv_even", "pair_tv_even"):
            assert few[key] == pytest.approx(many[key], abs=0.015)
        assert few["pair_tv"] > many["pair_tv"] + 0.05
    assert many["slot_tv_even"] > score(exact, story)["slot_tv_even"] + 0.005
    assert score(exact[:99], story)["pair_tv_even"] is None
    assert score(texts, story) == many
