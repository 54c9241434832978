"""Corpora, tokenizers and batches."""

from flowlm.data.corpora import Corpus, DataConfig, load_corpus
from flowlm.data.loader import Loader
from flowlm.data.tokens import Tokenizer

__all__ = ["Corpus", "DataConfig", "Loader", "Tokenizer", "load_corpus"]
