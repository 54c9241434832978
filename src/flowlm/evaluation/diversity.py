"""How varied samples are. A sample is a sequence of hashable items: words, or token ids before the end.

Entropy within one sample sees a sample that repeats itself; `distinct_n`, `unique`, `self_bleu` and the entropy
of all samples together see samples that repeat one another. These change with the number of samples: compare at
equal numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["corpus_entropy", "distinct_n", "entropies", "self_bleu", "unigram_entropy", "unique"]


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


def entropies(samples: Sequence[Sequence[Hashable]]) -> list[float]:
    """The entropy (nats) of the item counts of each sample. ValueError: no samples."""
    _check(samples)
    return [_entropy(Counter(sample)) for sample in samples]


def unigram_entropy(samples: Sequence[Sequence[Hashable]]) -> float:
    """Mean over samples of the entropy (nats) of the item counts of one sample. ValueError: no samples."""
    return math.fsum(entropies(samples)) / len(samples)


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


def _nearest(lengths: Counter[int], length: int) -> int:
    """The length nearest to `length` when one sample of that length is left out, the shorter of two."""
    if lengths[length] > 1:
        return length
    others = sorted(lengths.keys() - {length})
    at = bisect_left(others, length)
    return min(others[max(at - 1, 0) : at + 1], key=lambda other: (abs(other - length), other))


def self_bleu(samples: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Mean over samples of BLEU-n against all other samples (Zhu et al. 2018): 0 varied, 1 all the same.

    Of a sample of m items, with c(g) the count of an n-gram g in it and c'(g) the greatest in any other sample,

        BLEU = exp(min(0, 1 - r / m)) prod_{k=1..n} p_k^(1/n),  p_k = sum_g min(c(g), c'(g)) / max(1, m - k + 1),

    with r the length nearest to m of another sample, the shorter of two. A sum of 0 is taken as 0.1 (method 1 of
    Chen & Cherry 2014), but BLEU is 0 where no item is in another sample: numbers of nltk with `method1`.
    It rises with the number of samples: compare at equal numbers. ValueError: fewer than two samples, n < 1.
    """
    _check(samples)
    if len(samples) < 2:
        raise ValueError(
            "samples has one sample: self-BLEU compares samples with one another; give at least two"
        )
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one item; give n >= 1")
    log_precision = [0.0] * len(samples)  # sum over k of log p_k
    alone = [False] * len(samples)
    for k in range(1, n + 1):
        counts = [Counter(zip(*(sample[i:] for i in range(k)))) for sample in samples]
        # the greatest count of each gram, whose it is, and the greatest of the others: enough to leave any one out
        top: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}
        for row, grams in enumerate(counts):
            for gram, count in grams.items():
                best, owner, second = top.get(gram, (0, -1, 0))
                if count > best:
                    top[gram] = (count, row, best)
                elif count > second:
                    top[gram] = (best, owner, count)
        for row, grams in enumerate(counts):
            matched = 0
            for gram, count in grams.items():
                best, owner, second = top[gram]
                matched += min(count, second if owner == row else best)
            alone[row] |= k == 1 and not matched
            log_precision[row] += math.log((matched or 0.1) / max(1, len(samples[row]) - k + 1))
    lengths = Counter(map(len, samples))
    bleu = [
        0.0
        if alone[row]
        else math.exp(min(0.0, 1 - _nearest(lengths, len(sample)) / len(sample)) + total / n)
        for row, (sample, total) in enumerate(zip(samples, log_precision))
    ]
    return math.fsum(bleu) / len(bleu)
