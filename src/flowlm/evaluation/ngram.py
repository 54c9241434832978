"""An n-gram model of text: a judge without a network, and the writer of zero network calls.

Interpolated modified Kneser-Ney (Chen & Goodman 1999), as estimated by Heafield et al. (2013). A passage is
begin, its items, end. The adjusted count a of an n-gram of k items is how often it occurs if k is the order of
the model or it starts with begin, else before how many different items it occurs. With t_i n-grams of k items
and a = i, the discounts of k are, for i = 1, 2, 3 (3 stands for all a >= 3, and D_0 = 0),

    D_i = i - (i + 1) (t_1 / (t_1 + 2 t_2)) t_{i+1} / t_i,

and with h' the context h without its first item, and S(h) = sum_x a(h x),

    p(w | h) = (a(h w) - D_{a(h w)}) / S(h)  +  (sum_x D_{a(h x)} / S(h)) p(w | h').

An unseen context leaves all to the shorter one: p(w | h) = p(w | h'). Below the empty context stands the uniform
law over the vocabulary, the unknown and the end, so that nothing is impossible.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowlm.evaluation.sequences import flatten
from flowlm.rng import key

__all__ = ["FALLBACK", "UNKNOWN", "KneserNey"]

UNKNOWN = "[UNK]"
"""What stands for every item outside the vocabulary, in samples too. In training text it is counted as such."""

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of the n-grams of k items where their counts of counts do not give any: D_i outside (0, i], as when
no n-gram occurs i times. Small or very regular texts do that; `KneserNey.fallback` names such k."""

_BEGIN, _END, _UNKNOWN = 0, 1, 2  # symbols before those of the vocabulary

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


def _discounts(counts: _Ints) -> tuple[float, float, float] | None:
    """D_1, D_2, D_3 by the counts of counts; None where they do not give any."""
    t = np.bincount(counts, minlength=5)[:5].astype(float)
    if not t[1:4].all():
        return None
    i = np.arange(1, 4)
    one, two, three = i - (i + 1) * t[1] / (t[1] + 2 * t[2]) * t[2:5] / t[1:4]
    inside = 0 < one <= 1 and 0 < two <= 2 and 0 < three <= 3
    return (float(one), float(two), float(three)) if inside else None


class _Grams:
    """The n-grams of k items. Gram g is its context, a gram of k - 1 items, and a symbol; grams are numbered in
    order of context, then symbol. What is asked of gram or context -1 is the answer for an unseen one."""

    def __init__(
        self, keys: _Ints, counts: _Ints, num_symbols: int, num_contexts: int, discounts: _Floats
    ) -> None:
        """keys (G,): context * num_symbols + symbol, sorted; counts (G,): adjusted; discounts (4,): D_0 to D_3."""
        self.keys, self.counts, self.num_symbols = keys, counts, num_symbols
        contexts = keys // num_symbols
        self.discount = discounts[np.minimum(counts, 3)]  # (G,)
        # weights make bincount count in float64, exact far beyond any text
        self.total = np.bincount(contexts, counts, num_contexts + 1).astype(
            np.int64
        )  # (C + 1,) S(h), 0 at -1
        self.before = np.cumsum(self.total) - self.total  # (C + 1,) counts of all contexts before
        self.cumulative = np.cumsum(counts)  # (G,)
        whole = np.maximum(self.total, 1)
        self.backoff = np.bincount(contexts, self.discount, num_contexts + 1) / whole
        self.backoff[self.total == 0] = 1.0
        self.share = np.append((counts - self.discount) / whole[contexts], 0.0)  # (G + 1,)

    def find(self, contexts: _Ints, symbols: _Ints) -> _Ints:
        """Gram of each context and symbol, -1 where there is none."""
        keys = contexts * self.num_symbols + symbols  # negative for context -1: never found
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def draw(self, contexts: _Ints, which: _Floats, keep: _Floats) -> tuple[_Ints, NDArray[np.bool_]]:
        """A symbol for each context of `total` > 0, and whether it stays or is left to the shorter context.

        Symbol w is chosen in proportion to a(h w), in whole numbers, and stays with 1 - D / a: it is drawn and
        stays with (a - D) / S(h). which, keep: uniform on [0, 1).
        """
        ticket = self.before[contexts] + (which * self.total[contexts]).astype(np.int64)
        gram = np.searchsorted(self.cumulative, ticket, side="right")
        return self.keys[gram] % self.num_symbols, keep * self.counts[gram] >= self.discount[gram]


def _lay_out(symbols: _Ints, lengths: _Ints) -> tuple[_Ints, _Ints]:
    """(T,) each passage as begin, its symbols, end, one after another; (T,) how far each place is from begin."""
    starts = np.cumsum(lengths + 2) - (lengths + 2)
    text = np.empty(int((lengths + 2).sum()), np.int64)
    depth = np.arange(len(text)) - np.repeat(starts, lengths + 2)
    inner = np.ones(len(text), bool)
    text[starts], text[starts + lengths + 1] = _BEGIN, _END
    inner[starts] = inner[starts + lengths + 1] = False
    text[inner] = symbols
    return text, depth


def _before(grams: _Ints, depth: _Ints) -> _Ints:
    """What ends one place earlier in the same passage: -1 at begin."""
    return np.where(depth == 0, -1, np.roll(grams, 1))


@dataclass(frozen=True, eq=False)
class KneserNey:
    """An n-gram model; make one with `fit`.

    Perplexities compare only under one training text, one order and one way of splitting text into items: an
    item outside the vocabulary counts as the unknown. A low perplexity alone is no merit, as a likely phrase said
    over and over has it too: compare with held-out text, and look at diversity. As a mean, it does not depend on
    the number of passages judged but for chance; that of the training text itself is far too low.
    """

    order: int
    """n: an item is predicted from the n - 1 items before it."""
    vocabulary: tuple[Hashable, ...] = field(repr=False)
    """The different items of the training text in order of appearance, without `UNKNOWN` and the end."""
    num_items: int
    """Items of the training text, ends not counted."""
    discounts: tuple[tuple[float, ...], ...]
    """D_1, D_2, D_3 of the n-grams of 1, 2, ... items, as far as the training text has any so long."""
    fallback: tuple[int, ...]
    """The k whose discounts are `FALLBACK`."""
    _symbols: dict[Hashable, int] = field(repr=False)
    _grams: tuple[_Grams, ...] = field(repr=False)

    @classmethod
    def fit(cls, passages: Sequence[Sequence[Hashable]], order: int = 5) -> KneserNey:
        """Count the n-grams of `passages`.

        ValueError: order < 1; passages without an item, strings, or with items other than strings and integers.
        """
        if order < 1:
            raise ValueError(f"order is {order}: an n-gram has at least one item; give order >= 1")
        items, lengths = flatten("passages", passages)
        if not items:
            raise ValueError(
                f"passages: all {len(lengths):,} are empty, there is nothing to count; give one item"
            )
        vocabulary = tuple(item for item in dict.fromkeys(items) if item != UNKNOWN)
        symbols: dict[Hashable, int] = {UNKNOWN: _UNKNOWN}
        symbols |= {item: symbol for symbol, item in enumerate(vocabulary, _UNKNOWN + 1)}
        num_symbols = len(vocabulary) + _UNKNOWN + 1
        text, depth = _lay_out(np.array([symbols[item] for item in items], np.int64), lengths)

        grams: list[_Grams] = []
        discounts: list[tuple[float, ...]] = []
        fallback: list[int] = []
        keys, ending = np.arange(num_symbols), text  # the k-grams, and which of them ends at each place
        num_contexts = 1
        for k in range(1, order + 1):
            if k == order:
                counts = np.bincount(ending[ending >= 0], minlength=len(keys))
            else:
                contexts = _before(ending, depth)
                (places,) = np.nonzero(contexts >= 0)
                # far below 2^63 for any text that fits into memory
                longer, where, which = np.unique(
                    contexts[places] * num_symbols + text[places], return_index=True, return_inverse=True
                )
                # each longer gram is one more item before the k-gram it ends with; before begin there is none
                counts = np.bincount(ending[places[where]], minlength=len(keys))
                counts += np.bincount(ending[depth == k - 1], minlength=len(keys))
            if k == 1:
                counts[_BEGIN] = 0  # a context only
            found = _discounts(counts)
            if found is None:
                fallback.append(k)
            discounts.append(found or FALLBACK)
            grams.append(_Grams(keys, counts, num_symbols, num_contexts, np.array([0.0, *discounts[-1]])))
            if k == order or not len(longer):
                break
            num_contexts, keys = len(keys), longer
            ending = np.full(len(text), -1)
            ending[places] = which

        return cls(
            order=order,
            vocabulary=vocabulary,
            num_items=len(items),
            discounts=tuple(discounts),
            fallback=tuple(fallback),
            _symbols=symbols,
            _grams=tuple(grams),
        )

    @property
    def name(self) -> str:
        """What tables call it, e.g. "Kneser-Ney 5-gram, 292,142 words, vocabulary 4,084"."""
        what = "words" if all(isinstance(item, str) for item in self.vocabulary) else "tokens"
        return f"Kneser-Ney {self.order}-gram, {self.num_items:,} {what}, vocabulary {len(self.vocabulary):,}"

    @property
    def _num_outcomes(self) -> int:
        return len(self.vocabulary) + 2

    def _log_probs(self, name: str, passages: Sequence[Sequence[Hashable]]) -> _Floats:
        """Of all items and ends of all passages, one after another."""
        items, lengths = flatten(name, passages)
        symbols = np.array([self._symbols.get(item, _UNKNOWN) for item in items], np.int64)
        text, depth = _lay_out(symbols, lengths)
        probs = np.full(len(text), 1 / self._num_outcomes)
        contexts = np.zeros(len(text), np.int64)
        for grams in self._grams:
            ending = grams.find(contexts, text)
            probs = grams.share[ending] + grams.backoff[contexts] * probs
            contexts = _before(ending, depth)
        return np.log(probs[depth > 0])

    def log_probs(self, passage: Sequence[Hashable]) -> _Floats:
        """log p in nats of each item given those before it, and of the end, (len(passage) + 1,). Items outside the
        vocabulary have that of the unknown. ValueError: a string, items other than strings and integers."""
        if isinstance(passage, str):
            raise ValueError(f"passage is the string {passage[:40]!r}: split it into words")
        return self._log_probs("passage", [passage])

    def nats(self, passages: Sequence[Sequence[Hashable]]) -> tuple[_Floats, _Ints]:
        """-log p of each passage with its end, and of how many items it is, the end counted: (passages,) each.
        ValueError: as `log_probs`, and no passages."""
        each = -self._log_probs("passages", passages)
        counts = np.array([len(passage) + 1 for passage in passages], np.int64)
        return np.add.reduceat(each, np.cumsum(counts) - counts), counts

    def perplexity(self, passages: Sequence[Sequence[Hashable]]) -> float:
        """exp of the mean of -log p over all items and ends. ValueError: as `nats`."""
        nats, counts = self.nats(passages)
        return float(np.exp(nats.sum() / counts.sum()))

    def sample(self, num: int, seed: int, max_length: int, *, unknown: bool = True) -> list[list[Hashable]]:
        """Exact draws of the model, cut after `max_length` items where the end has not come.

        Passage i is decided by (seed, i) alone, whatever `num`; a longer `max_length` only continues it. The
        unknown, rarely drawn, is written `UNKNOWN`; without `unknown` what the uniform law gives it goes evenly to all
        else, for a reader that cannot read it. ValueError: num < 1, max_length < 1.
        """
        for name, value in (("num", num), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} is {value}: there would be nothing to write; give {name} >= 1")
        names: list[Hashable] = [None, None, UNKNOWN, *self.vocabulary]
        passages: list[list[Hashable]] = [[] for _ in range(num)]
        sources = [np.random.Generator(np.random.Philox(key=key(seed, "n-gram", i))) for i in range(num)]
        rows = np.arange(num)  # of the passages that go on
        # the last 0, 1, 2, ... symbols of each as a gram: none, begin, and nothing longer
        recent = [np.full(num, 0 if k < 2 else -1) for k in range(len(self._grams) + 1)]
        for _ in range(max_length):
            chance = np.stack([sources[row].random(2 * len(self._grams) + 1) for row in rows])
            # the uniform law, if all leave it
            symbols = 1 + (chance[:, -1] * (self._num_outcomes - (not unknown))).astype(np.int64)
            if not unknown:
                symbols += symbols >= _UNKNOWN
            left = np.ones(len(rows), bool)
            for k in reversed(range(len(self._grams))):
                (at,) = np.nonzero(left & (self._grams[k].total[recent[k]] > 0))
                drawn, stays = self._grams[k].draw(recent[k][at], chance[at, 2 * k], chance[at, 2 * k + 1])
                symbols[at[stays]] = drawn[stays]
                left[at[stays]] = False
            going = symbols != _END
            rows, symbols, recent = rows[going], symbols[going], [gram[going] for gram in recent]
            if not len(rows):
                break
            for row, symbol in zip(rows, symbols):
                passages[row].append(names[symbol])
            recent = [
                recent[0],
                *(grams.find(gram, symbols) for grams, gram in zip(self._grams, recent)),
            ]
        return passages
