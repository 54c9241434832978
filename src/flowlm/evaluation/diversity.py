"""How varied samples are. A sample is a sequence of hashable items: words, or token ids before the end.

Entropy within one sample sees a sample that repeats itself; `distinct_n`, `unique` and the entropy of all
samples together see samples that repeat one another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["corpus_entropy", "distinct_n", "unigram_entropy", "unique"]


def _check(samples: Sequence[Sequence[Hashable]]) -> None:
    if isinstance(samples, str) or any(isinstance(sample, str) for sample in samples):
        raise ValueError("a sample is a sequence of words or token ids, got a string: split it into words")
    if len(samples) < 1:
        raise ValueError("samples is empty: diversity of no samples is undefined; give at least one")


def _entropy(counts: Counter[Hashable]) -> float:
    """H = sum_v (n_v / N) log(N / n_v) in nats; 0 for no items."""
    total = counts.total()
    # in this form no term is negative, and one item repeated gives exactly 0
    return math.fsum(n / total * math.log(total / n) for n in counts.values())


def unigram_entropy(samples: Sequence[Sequence[Hashable]]) -> float:
    """Mean over samples of the entropy (nats) of the item counts of one sample. ValueError: no samples."""
    _check(samples)
    return math.fsum(_entropy(Counter(sample)) for sample in samples) / len(samples)


def corpus_entropy(samples: Sequence[Sequence[Hashable]]) -> float:
    """Entropy (nats) of the item counts of all samples together. ValueError: no samples."""
    _check(samples)
    counts: Counter[Hashable] = Counter()
    for sample in samples:
        counts.update(sample)
    return _entropy(counts)


def distinct_n(samples: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams / n-grams over all samples, none across two; 0 if no sample has n items.

    It falls with the number of samples: compare at equal numbers. ValueError: no samples, n < 1.
    """
    _check(samples)
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one item; give n >= 1")
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for sample in samples:
        grams = [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def unique(samples: Sequence[Sequence[Hashable]]) -> float:
    """Distinct samples / samples, in (0, 1]. ValueError: no samples."""
    _check(samples)
    return len({tuple(sample) for sample in samples}) / len(samples)
