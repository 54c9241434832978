"""How good stories are, by the exact law of their language: no other model's opinion enters.

Validity says whether single stories are right; likelihood, whether they are the likely ones; the distances of
slots and of pairs of slots, whether all stories are told as often as they should be; coverage, how much of the
language is told at all. A sampler that repeats one perfect story is valid throughout, far off in the distances, and
covers next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlm.data.grammar import Grammar, tokenize
from flowlm.evaluation.bootstrap import mean_interval, share_interval
from flowlm.rng import key

__all__ = ["EVEN", "MAX_JOINT_VALUES", "pairs", "score", "tv_floor"]

MAX_JOINT_VALUES = 200
EVEN, DRAWS = 100, 50
"""Parsed stories of which a distance is taken that compares whatever their number, and how often they are drawn."""


def pairs(grammar: Grammar) -> list[tuple[str, str]]:
    """The pairs of slots that are compared: every (parent, child), and every other pair whose joint law has
    at most `MAX_JOINT_VALUES` values of positive probability (larger ones would measure little but noise)."""
    kin = {(slot.parent, slot.name) for slot in grammar.spec.slots}
    return [
        (a, b)
        for a, b in combinations(grammar.slots, 2)  # parents are declared before their children
        if (a, b) in kin or len(grammar.pair_marginal(a, b)) <= MAX_JOINT_VALUES
    ]


def tv_floor(probs: NDArray[np.float64], num: int) -> float:
    """Total variation to be expected of `num` exact draws from `probs`, by the normal approximation:

    E TV = 1/2 sum_v E|p_hat(v) - p(v)| ~ 1/2 sum_v sqrt(2 p(v) (1 - p(v)) / (pi num)).
    """
    p = np.clip(probs, 0.0, 1.0)
    return float(0.5 * np.sqrt(2.0 * p * (1.0 - p) / (math.pi * num)).sum())


def _tv(codes: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    counts = np.bincount(codes, minlength=probs.size)
    return float(0.5 * np.abs(counts / codes.size - probs).sum())


def _coverage(codes: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """The law's probability of the values that occur at least once."""
    return min(1.0, float(probs[np.unique(codes)].sum()))  # rounding aside


def score(texts: Sequence[str], grammar: Grammar) -> dict[str, Any]:
    """Compare stories with the law of their language.

    Shares are of all stories, likelihoods in nats over the valid ones, distances over the parsed ones:

    - ``num``; ``parsed``, ``valid``: share whose skeleton parses, share with no broken rule;
    - ``broken``: rule -> share of stories breaking it (a story may break several);
    - ``nll_per_story``: mean of -log p(story); in exact samples its expectation is ``grammar.entropy``;
    - ``nll_per_token``: mean of -log p(story) / (tokens + 1), tokens being words and punctuation, 1 the end;
    - ``slot_tv``, ``slot_tv_max``, ``slot_tv_by_slot``: total variation 1/2 sum_v |p_hat(v) - p(v)| between
      the slot's frequencies (read at first mention) and its exact marginal: mean, greatest, each;
    - ``pair_tv``, ``pair_tv_max``: the same of the joint law of the `pairs` of slots;
    - ``slot_tv_floor``, ``pair_tv_floor``: what as many exact samples as stories were parsed would give for
      the two means (see `tv_floor`);
    - ``slot_tv_even``, ``pair_tv_even``: the two means of `EVEN` parsed stories, the mean over `DRAWS` draws of so
      many. The fewer stories, the farther chance alone puts them, so ``slot_tv`` and ``pair_tv`` compare at equal
      numbers of parsed ones alone; these always do. None for fewer than `EVEN`;
    - ``slot_coverage``, ``pair_coverage``: the law's probability of the values that parsed stories show at least
      once, mean over slots, and over the same pairs of slots. It rises with the number of stories: compare at equal
      numbers, and with as many exact samples, whose expectation is sum_v p(v) (1 - (1 - p(v))^n);
    - ``intervals``: 95 % intervals of ``valid`` (Wilson's) and ``nll_per_token`` (bootstrap), None where unknown.

    Likelihoods are None if no story is valid; if none parses, distances and floors are None (``slot_tv_by_slot``
    is then empty) and coverage is 0. ValueError: no stories.
    """
    if isinstance(texts, str):
        raise ValueError(
            f"texts is the single string {texts[:40]!r}: give a sequence of stories, e.g. [text]"
        )
    num = len(texts)
    if num < 1:
        raise ValueError("texts is empty: shares of no stories are undefined; give at least one story")

    broken = dict.fromkeys(grammar.rules, 0)
    values = {slot: {v: k for k, v in enumerate(grammar.marginal(slot))} for slot in grammar.slots}
    rows: list[list[int]] = []
    nll: list[float] = []
    nll_per_token: list[float] = []
    for text in texts:
        verdict = grammar.judge(text)
        for rule in verdict.broken:
            broken[rule] += 1
        if verdict.slots is not None:
            rows.append([values[slot][v] for slot, v in verdict.slots.items()])
        if verdict.valid:
            nll.append(-grammar.log_prob(text))
            nll_per_token.append(nll[-1] / (len(tokenize(text)) + 1))

    report: dict[str, Any] = {
        "num": num,
        "parsed": len(rows) / num,
        "valid": len(nll) / num,
        "broken": {rule: count / num for rule, count in broken.items()},
        "nll_per_story": math.fsum(nll) / len(nll) if nll else None,
        "nll_per_token": math.fsum(nll_per_token) / len(nll) if nll else None,
        "slot_tv_by_slot": {},
        "slot_coverage": 0.0,
        "pair_coverage": 0.0,
        "intervals": {
            "valid": list(share_interval(len(nll) / num, num)),
            "nll_per_token": mean_interval(nll_per_token),
        },
    }
    names = ("slot_tv", "slot_tv_max", "slot_tv_floor", "pair_tv", "pair_tv_max", "pair_tv_floor")
    even = ("slot_tv_even", "pair_tv_even")
    if not rows:
        return report | dict.fromkeys((*names, *even))
    source = np.random.Generator(np.random.Philox(key("parsed stories", len(rows))))
    drawn = [source.choice(len(rows), EVEN, replace=False) for _ in range(DRAWS)] if len(rows) >= EVEN else []

    codes = dict(zip(grammar.slots, np.array(rows, np.int64).T, strict=True))
    slot_tv: dict[str, float] = {}
    slot_floor: list[float] = []
    slot_even: list[float] = []
    slot_coverage: list[float] = []
    for slot in grammar.slots:
        probs = np.array(list(grammar.marginal(slot).values()))
        slot_tv[slot] = _tv(codes[slot], probs)
        slot_floor.append(tv_floor(probs, len(rows)))
        slot_even += [_tv(codes[slot][some], probs) for some in drawn]
        slot_coverage.append(_coverage(codes[slot], probs))
    pair_tv: list[float] = []
    pair_floor: list[float] = []
    pair_even: list[float] = []
    pair_coverage: list[float] = []
    for a, b in pairs(grammar):
        joint = np.zeros((len(values[a]), len(values[b])))
        for (x, y), p in grammar.pair_marginal(a, b).items():
            joint[values[a][x], values[b][y]] = p
        # impossible pairs keep their place in the table: telling them is part of the distance
        told = codes[a] * joint.shape[1] + codes[b]
        pair_tv.append(_tv(told, joint.ravel()))
        pair_coverage.append(_coverage(told, joint.ravel()))
        pair_floor.append(tv_floor(joint, len(rows)))
        pair_even += [_tv(told[some], joint.ravel()) for some in drawn]
    measured = (
        _mean(list(slot_tv.values())),
        max(slot_tv.values()),
        _mean(slot_floor),
        _mean(pair_tv),
        max(pair_tv, default=None),
        _mean(pair_floor),
    )
    report |= {"slot_tv_by_slot": slot_tv} | dict(zip(names, measured, strict=True))
    report |= dict(zip(even, map(_mean, (slot_even, pair_even)), strict=True))
    return report | {"slot_coverage": _mean(slot_coverage), "pair_coverage": _mean(pair_coverage)}


def _mean(numbers: Sequence[float]) -> float | None:
    """None for no numbers: a law of one slot has no pairs."""
    return math.fsum(numbers) / len(numbers) if numbers else None
