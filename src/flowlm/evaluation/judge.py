"""Judging text without a known law, by the text a model was trained on.

Perplexity under an n-gram model of the training text, the share of words it knows, how alike samples are, and how
much of them is copied; beside the two rows without which such numbers mean little: held-out text, and the n-gram
model's own samples, which take no network at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlm.data.corpora import Corpus
from flowlm.data.grammar import Grammar
from flowlm.data.tokens import UNK, join_words
from flowlm.evaluation.copying import Copies
from flowlm.evaluation.diversity import self_bleu, unigram_entropy
from flowlm.evaluation.metrics import evaluate_texts, make_row, merged, passage, words
from flowlm.evaluation.ngram import KneserNey
from flowlm.evaluation.samples import current_commit
from flowlm.evaluation.scorers import Scorer, Scores, distance, scored
from flowlm.rng import key

__all__ = ["TextJudge"]

ORDER = 5
MOST_WORDS = 12_000_000
"""Of the training text that is read: about 200 bytes a word while it is put in order."""
_NONE = "\0"  # in no text
_ROWS = 4096  # decoded at a time


class TextJudge:
    """Measures of texts against a corpus: what they are compared with is its training side.

    Args:
        corpus: of the model that wrote them.
        say: told when only a part of a large corpus is read.

    Attributes:
        scorer: the n-gram model; its name stands in every row.
        passages: how many of the training text it has read.
    """

    def __init__(self, corpus: Corpus, say: Callable[[str], None] | None = None):
        self._held_out = corpus.held_out
        self._tokenizer = corpus.tokenizer
        self._begin = str(corpus.meta.get("bos", ""))
        self._longest = int(corpus.train.shape[1])
        train: list[list[str]] = []
        count = 0
        for start in range(0, len(corpus.train), _ROWS):
            new = [words(passage(t)) for t in self._texts(corpus.train[start : start + _ROWS])]
            train += new
            count += sum(map(len, new))
            if count > MOST_WORDS and start + _ROWS < len(corpus.train):
                if say is not None:
                    say(
                        f"the scorer reads the first {count:,} words of the training text: copies of the rest are "
                        "not seen"
                    )
                break
        self.passages = len(train)
        self.scorer = KneserNey.fit(train, ORDER)
        self._copies = Copies(train)
        every = {word for text in train for word in text}
        self._known, self._has_unknown = every - {UNK}, UNK in every

    @functools.cached_property
    def entropy(self) -> float:
        """That of the data: of all held-out passages, each by itself, in nats."""
        rows = self._held_out
        parts = (self._texts(rows[a : a + _ROWS]) for a in range(0, len(rows), _ROWS))
        return unigram_entropy([words(passage(text)) for part in parts for text in part])

    def scores(self, texts: Sequence[str]) -> Scores:
        """What the n-gram model says of each text; a token is a word or sign, ends are counted."""
        nats, counts = self.scorer.nats([words(passage(text)) for text in texts])
        return Scores(tuple(nats.tolist()), tuple(counts.tolist()))

    def measure(self, texts: Sequence[str]) -> dict[str, Any]:
        """Numbers of `texts`: ``perplexity`` and ``ngram_perplexity`` (a word or sign, ends counted), ``known`` (share
        of words, signs left out, that training text has), ``self_bleu`` (compare at equal numbers), ``copied`` (share
        that stands wholly in a training passage), ``longest_copy`` (words, mean), ``found_8``, ``scorer``."""
        split = [words(passage(text)) for text in texts]
        own = [word for text in split for word in text if any(map(str.isalpha, word))]
        # an unknown word is no copy of another one
        copies = self._copies.of([[_NONE if word == UNK else word for word in text] for text in split])
        scores = self.scores(texts)
        return {
            "perplexity": scores.perplexity,
            "ngram_perplexity": scores.perplexity,  # stays where another scorer's takes the place of the first
            "known": sum(word in self._known for word in own) / len(own) if own else None,
            "self_bleu": self_bleu(split) if len(split) > 1 else None,
            "copied": copies.copied,
            "longest_copy": copies.longest_mean,
            "found_8": copies.found_share,
            "scorer": self.scorer.name,
            "intervals": dict.fromkeys(("perplexity", "ngram_perplexity"), scores.interval),
        }

    def _order(self, seed: int) -> Any:
        """Of held-out rows, so that some of them are from all over: they lie in the order of their sources."""
        source = np.random.Generator(np.random.Philox(key(seed, "held-out passages")))
        return source.permutation(len(self._held_out))

    def halves(self, num: int, seed: int) -> tuple[list[str], list[str]]:
        """Two sets of held-out passages that share none, each of `num`, or of half of all where that is less."""
        order = self._order(seed)
        half = min(num, len(order) // 2)
        first, second = order[:half], order[len(order) - half :]
        return self._texts(self._held_out[first]), self._texts(self._held_out[second])

    def reference_rows(
        self,
        num: int,
        seed: int,
        grammar: Grammar | None = None,
        scorer: Scorer | None = None,
        features: NDArray[np.float64] | None = None,
    ) -> list[dict[str, Any]]:
        """Rows of held-out text, at most `num` passages, and of `num` samples of the n-gram model.

        With the grammar whose stories the text is, judged by its law too; with a scorer, under it; with its features of
        the second of `halves`, how far they are from it, the first half in place of held-out text.
        """
        # Where the training text has nothing unknown, a tokenizer that was made for it may have no token for that.
        drawn = self.scorer.sample(num, seed, self._longest, unknown=self._has_unknown)
        texts = {
            "held-out": self._texts(self._held_out[np.sort(self._order(seed)[:num])]),
            f"{ORDER}-gram": [join_words(map(str, text)) for text in drawn],
        }
        rows = []
        for name, own in texts.items():
            parts = [{"model": name, "nfe": 0}, evaluate_texts(own, grammar), self.measure(own)]
            if scorer is not None:
                parts.append(scored(scorer, own))
                if features is not None:
                    compared = self.halves(num, seed)[0] if name == "held-out" else own
                    parts.append(distance(scorer, compared, features))
            parts.append(
                {
                    "law": grammar.hash if grammar is not None else None,
                    "seed": seed if name != "held-out" else None,
                    "commit": current_commit(),
                }
            )
            rows.append(make_row(merged(*parts)))
        return rows

    def _texts(self, rows: Any) -> list[str]:
        return ["\n".join(self._tokenizer.decode_all(row, self._begin)) for row in rows]
