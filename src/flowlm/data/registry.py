"""Corpora by name: where each is published, under what licence, and in what form the literature uses it.

`data.corpus = "lm1b"` stands for all of an entry: text, split, tokenizer, framing. The text is Parquet, from the
Hugging Face hub or from a folder of the same files (data.path).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from flowlm.data.remote import HubFile
from flowlm.data.tokens import Tokenizer
from flowlm.hub import fetch_file

__all__ = [
    "CORPORA",
    "TOKENIZERS",
    "NamedCorpus",
    "NamedTokenizer",
    "Sides",
    "described",
    "local_files",
    "own_tokenizer",
    "refuse_other",
]

Sides = tuple[Sequence[Path | HubFile], Sequence[Path | HubFile]]
"""Files of the text, and those of its held-out split, if it has one, in the order in which they are read."""


@dataclass(frozen=True)
class NamedTokenizer:
    """A tokenizer by name: files on the hub, or an alphabet."""

    vocab_size: int
    """With its end token and pad, added where it has none."""
    repository: str = ""
    revision: str = ""
    files: tuple[str, ...] = ()
    eos: str = ""
    licence: str = ""
    alphabet: str = ""
    """Of characters that are tokens; nothing is fetched."""


TOKENIZERS = {
    "bert-base-uncased": NamedTokenizer(
        vocab_size=30_522,
        repository="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        files=("vocab.txt",),
        eos="[SEP]",
        licence="Apache-2.0",
    ),
    "gpt2": NamedTokenizer(
        vocab_size=50_258,  # 50,257, and [PAD]
        repository="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        files=("vocab.json", "merges.txt"),
        eos="<|endoftext|>",
        licence="MIT",
    ),
    "characters": NamedTokenizer(vocab_size=29, alphabet=" " + ascii_lowercase),  # 27, [EOS] and [PAD]
}


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus by name. Fields that a configuration has too are those of `DataConfig`."""

    label: str
    """What its rows are, for data.json."""
    repository: str
    """On the hub."""
    revision: str
    """Its commit: what is learnt from is the same whenever it is fetched."""
    train: str
    """Its Parquet files there: a pattern."""
    licence: str
    """As its source states it."""
    tokenizer: str
    length: int
    """L with which the literature uses it."""
    rows_size: float
    """Bytes of its rows of that length, about, by counts of its tokens."""
    held: str = ""
    """Pattern of the files of the split that is held out; empty: the last documents are."""
    split: str = "last"
    held_out: int = 0
    """Documents, where the last are held out."""
    unit: str = "record"
    rows: str = "wrap"
    bos: str = ""
    detokenizer: str = ""

    @property
    def decided(self) -> dict[str, Any]:
        """Fields of the configuration that the name decides."""
        names = ("unit", "rows", "bos", "detokenizer", "split")
        return {name: getattr(self, name) for name in names}


_LM1B: dict[str, Any] = {
    "repository": "billion-word-benchmark/lm1b",
    # Of its branch refs/convert/parquet: the repository's own holds a loading script and no text.
    "revision": "8d52bfd3cc2819fc1166dbb8144c328e2690de3e",
    "train": "plain_text/train/*.parquet",
    "held": "plain_text/test/*.parquet",
    "split": "test",
    "licence": "none stated by its source",
    "tokenizer": "bert-base-uncased",
    "length": 128,
    "bos": "[CLS]",
    "detokenizer": "lm1b",
}

CORPORA = {
    "lm1b": NamedCorpus(
        label="One Billion Word Benchmark, wrapped: detokenized sentences, each closed by [SEP], all concatenated, "
        "cut into L-2 tokens, framed [CLS] … [SEP]; held out is the test split",
        rows_size=1.8e9,
        **_LM1B,
    ),
    "lm1b-unwrapped": NamedCorpus(
        label="One Billion Word Benchmark, unwrapped: a detokenized sentence a row, [CLS] … [SEP], cut at L, filled "
        "with [PAD]; held out is the test split",
        rows="cut",
        rows_size=7.8e9,
        **_LM1B,
    ),
    "openwebtext": NamedCorpus(
        label="OpenWebText: documents, each closed by <|endoftext|>, all concatenated, cut into L-2 tokens, framed by "
        "<|endoftext|> on both sides; held out are the last documents",
        repository="Skylion007/openwebtext",
        revision="79d93d786212f7344586290adb811d4ae6a1762c",
        train="plain_text/train-*.parquet",
        licence="CC0-1.0 (of the packaging; the texts belong to their authors)",
        tokenizer="gpt2",
        length=1024,
        rows_size=18e9,
        held_out=100_000,
        bos="<|endoftext|>",
    ),
    "text8": NamedCorpus(
        label="text8: a stream of a-z and spaces, cut into L characters, nothing added; held out is the validation "
        "split, characters 90 to 95 million",
        repository="afmck/text8",
        revision="58c74e966ccc66eab2de6b52fad5b14ddb259fa4",
        train="data/train-*.parquet",
        held="data/validation-*.parquet",
        split="validation",
        licence="none stated by its source (Wikipedia's text: CC BY-SA)",
        tokenizer="characters",
        length=256,
        rows_size=0.19e9,
        unit="piece",
        rows="chunk",
    ),
    "wikitext": NamedCorpus(
        label="WikiText-103 raw: lines as published, each closed by <|endoftext|>, all concatenated, cut into L-2 "
        "tokens, framed by <|endoftext|> on both sides; held out is the validation split",
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        train="wikitext-103-raw-v1/train-*.parquet",
        held="wikitext-103-raw-v1/validation-*.parquet",
        split="validation",
        licence="CC BY-SA 3.0 and GFDL",
        tokenizer="gpt2",
        length=1024,
        rows_size=0.24e9,
        bos="<|endoftext|>",
    ),
    "tinystories": NamedCorpus(
        label="TinyStories: stories, each closed by <|endoftext|>, all concatenated, cut into L-2 tokens, framed by "
        "<|endoftext|> on both sides; held out is the validation split",
        repository="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        train="data/train-*.parquet",
        held="data/validation-*.parquet",
        split="validation",
        licence="CDLA-Sharing-1.0",
        tokenizer="gpt2",
        length=512,
        rows_size=0.95e9,
        bos="<|endoftext|>",
    ),
}


def own_tokenizer(corpus: str, tokenizer: str) -> Tokenizer:
    """The tokenizer of a named corpus: by its name, from the hub, or from files.

    ValueError: there is no way to the hub, nothing known in the path, another vocabulary than the corpus is made with.
    """
    known = TOKENIZERS.get(tokenizer)
    if known is None:
        made = Tokenizer.read(tokenizer)
    elif known.alphabet:
        made = Tokenizer.of_characters(known.alphabet)
    else:
        instead = f"give a folder that has {' and '.join(known.files)} with --data.tokenizer"
        fetched = [fetch_file(f"{known.repository}@{known.revision}", name, instead) for name in known.files]
        made = Tokenizer.read(fetched[0], eos=known.eos)
    refuse_other(corpus, made, f"data.tokenizer = {tokenizer!r}")
    return made


def refuse_other(corpus: str, made: Tokenizer, name: str) -> None:
    """ValueError: a tokenizer, called `name`, has another vocabulary than a named corpus is made with."""
    expected, end = TOKENIZERS[CORPORA[corpus].tokenizer], made.token(made.eos_id)
    if made.vocab_size != expected.vocab_size or (expected.eos and end != expected.eos):
        raise ValueError(
            f"{name} has {made.vocab_size:,} tokens, {end!r} the last of a passage, and "
            f"{corpus} is made with the {expected.vocab_size:,} of {CORPORA[corpus].tokenizer}: give that one, or take "
            "the text as data.corpus = 'text', under no name"
        )


def described(corpus: str, *, own: bool) -> dict[str, str]:
    """What a named corpus is, for data.json: of its repository, or someone's `own` copy."""
    named = CORPORA[corpus]
    source = {} if own else {"repository": named.repository, "commit": named.revision}
    return {"label": named.label, **source, "licence": named.licence}


def local_files(corpus: str, path: Path) -> tuple[list[Path], list[Path]]:
    """The Parquet files of a named corpus in `path`: a copy of its repository, or files named by their splits.

    A file is of a split if it, or a folder around it, is called so: test.parquet, test-00000.parquet,
    test/0000.parquet. Without a split of its own, all files are read.

    ValueError: nothing there, no Parquet file, a split that is missing.
    """
    named = CORPORA[corpus]
    if not path.exists():
        raise ValueError(
            f"data.path = {str(path)!r} does not exist (seen from {Path.cwd()}): say with --data.path where it is"
        )
    if path.is_dir() and (published := sorted(path.glob(named.train))):
        held = sorted(path.glob(named.held)) if named.held else []
        if held or not named.held:
            return published, held
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    found = [file for file in found if file.suffix.lower() == ".parquet"]
    if not found:
        raise ValueError(
            f"data.path = {str(path)!r} holds no .parquet file: {corpus} is read from files like those of "
            f"{named.repository} on the hub; another kind of text is data.corpus = 'text'"
        )
    if not named.held:
        return found, []
    root = path if path.is_dir() else path.parent
    sides = [
        [file for file in found if _is_of(split, file.relative_to(root))] for split in ("train", named.split)
    ]
    for split, files in zip(("train", named.split), sides):
        if not files:
            raise ValueError(
                f"data.path = {str(path)!r} has no split {split!r} among "
                f"{_shown([f.relative_to(root) for f in found])}: "
                f"{corpus} learns from its split 'train' and holds out {named.split!r}; call the files, or a folder "
                f"around them, {split}"
            )
    return sides[0], sides[1]


def _is_of(split: str, file: Path) -> bool:
    return split in file.parts[:-1] or re.match(rf"{split}(?:[-_.]|$)", file.stem) is not None


def _shown(files: Sequence[Path]) -> str:
    names = [file.as_posix() for file in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
