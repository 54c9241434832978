"""One row of numbers per model and step count: texts in, quality and circumstances out.

Entropy is the mean per-sample unigram entropy in nats, as in the papers on these models, here over words and
punctuation, so that models with different tokenizers can stand in one table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowlm.data.grammar import Grammar
from flowlm.data.tokens import UNK
from flowlm.evaluation import diversity, oracle
from flowlm.evaluation.bootstrap import mean_interval
from flowlm.evaluation.samples import Header, Record, current_commit

__all__ = [
    "END",
    "ROW",
    "evaluate_texts",
    "law_row",
    "make_row",
    "merged",
    "passage",
    "samples_row",
    "words",
]

END = "[EOS]"
"""Where a text ends: what a model writes after it is not part of the passage."""

ROW = (
    "model",
    "nfe",
    "num",
    "valid",
    "broken",
    "nll_per_token",
    "perplexity_at_data_entropy",
    "perplexity",
    "frechet",
    "known",
    "entropy",
    "unique",
    "distinct_2",
    "self_bleu",
    "copied",
    "longest_copy",
    "slot_tv",
    "pair_tv",
    "pair_coverage",
    "seconds",
    "tokens_per_second",
    "latency",
    "seed",
    "dtype",
    "commit",
    "law",
    "scorer",
    "cut",
    "intervals",
)
"""The keys every row has, in order; None where something is not known or does not apply. ``intervals`` has the 95 %
intervals, [low, high], of some of the others."""

# the grammar's words and punctuation, and whatever else another text or a bad sample may hold
_WORD = re.compile(re.escape(UNK) + r"|[\w']+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and punctuation marks; on stories the same as the grammar's `tokenize`."""
    return _WORD.findall(text)


def passage(text: str) -> str:
    """`text` before its first `END`, without the white space around it."""
    return text.split(END, 1)[0].strip()


def evaluate_texts(texts: Sequence[str], grammar: Grammar | None = None) -> dict[str, Any]:
    """Numbers of the passages in `texts`.

    Always: ``num``, ``entropy``, ``corpus_entropy`` (nats), ``unique``, ``distinct_1`` to ``distinct_3``,
    ``mean_length`` (words and punctuation), ``intervals``. With a grammar also what `oracle.score` gives. ValueError:
    no texts.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is the single string {texts[:40]!r}: give a sequence of texts, e.g. [text]")
    if len(texts) < 1:
        raise ValueError("texts is empty: there is nothing to evaluate; give at least one text")
    passages = [passage(text) for text in texts]
    split = [words(text) for text in passages]
    report: dict[str, Any] = {
        "num": len(passages),
        "entropy": diversity.unigram_entropy(split),
        "unique": diversity.unique(split),
        "distinct_1": diversity.distinct_n(split, 1),
        "distinct_2": diversity.distinct_n(split, 2),
        "distinct_3": diversity.distinct_n(split, 3),
        "corpus_entropy": diversity.corpus_entropy(split),
        "mean_length": sum(map(len, split)) / len(split),
        "intervals": {"entropy": mean_interval(diversity.entropies(split))},
    }
    return report if grammar is None else merged(report, oracle.score(passages, grammar))


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of several, the later ones first; their ``intervals`` together."""
    whole: dict[str, Any] = {}
    for part in parts:
        both = {**(whole.get("intervals") or {}), **(part.get("intervals") or {})}
        whole |= {**part, "intervals": both}
    return whole


def make_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in the order of `ROW`, None for what is missing, all other keys after it."""
    return {key: values.get(key) for key in ROW} | {key: values[key] for key in values if key not in ROW}


def samples_row(
    header: Header,
    records: Sequence[Record],
    grammar: Grammar | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The row of one samples file, with what else was measured. ValueError: no records.

    ``tokens_per_second`` counts all token ids written, also those after the end, since each was computed.
    """
    metrics = evaluate_texts([record.text for record in records], grammar)
    tokens = sum(len(record.tokens) for record in records)
    return make_row(
        {
            "model": header.model,
            "nfe": header.nfe,
            **merged(metrics, more or {}),
            "seconds": header.seconds,
            "tokens_per_second": tokens / header.seconds if header.seconds and tokens else None,
            "latency": header.extra.get("latency"),
            "seed": header.seed,
            "dtype": header.dtype,
            "commit": header.commit,
            "law": grammar.hash if grammar is not None else None,
            "recipe": header.recipe,
            "sampler": header.sampler,
            "tokenizer": header.tokenizer,
            "extra": header.extra,
        }
    )


def law_row(grammar: Grammar, num: int, seed: int) -> dict[str, Any]:
    """The row of `num` exact samples of the law: what a perfect model of it would score.

    Its distances are not 0: they are what `num` samples leave to chance, so compare at equal `num`.
    ValueError: num < 1, seed < 0.
    """
    return make_row(
        {
            "model": "law",
            "nfe": 0,
            **evaluate_texts(grammar.sample(num, seed), grammar),
            "seed": seed,
            "commit": current_commit(),
            "law": grammar.hash,
        }
    )
