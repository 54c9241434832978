"""Measuring samples: files of samples go in, numbers that carry their own circumstances come out.

Nothing here knows a training object: whatever writes a samples file (see `samples`) can be scored.
"""

from flowlm.evaluation.copying import Copies, Copying
from flowlm.evaluation.diversity import corpus_entropy, distinct_n, self_bleu, unigram_entropy, unique
from flowlm.evaluation.metrics import ROW, evaluate_texts, law_row, make_row, samples_row
from flowlm.evaluation.ngram import KneserNey
from flowlm.evaluation.oracle import score
from flowlm.evaluation.samples import Header, Record, current_commit, read_samples, write_samples

__all__ = [
    "ROW",
    "Copies",
    "Copying",
    "Header",
    "KneserNey",
    "Record",
    "corpus_entropy",
    "current_commit",
    "distinct_n",
    "evaluate_texts",
    "law_row",
    "make_row",
    "read_samples",
    "samples_row",
    "score",
    "self_bleu",
    "unigram_entropy",
    "unique",
    "write_samples",
]
