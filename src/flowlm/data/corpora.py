"""Corpora as matrices of token ids: the language with a known law, English from docstrings, or anyone's text.

A passage is its ids, then [EOS], then [PAD] up to the model's length L. What does not fit is cut, split, dropped or
wrapped, and said; held-out documents are never training documents, copies included.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlm.data import docs, download
from flowlm.data.detokenize import DETOKENIZERS
from flowlm.data.grammar import Grammar
from flowlm.data.preparation import prepare, refuse
from flowlm.data.prepared import Prepared, Recipe, is_prepared, open_prepared, reuse, token_dtype
from flowlm.data.readers import TextReader
from flowlm.data.registry import (
    CORPORA,
    TOKENIZERS,
    Sides,
    described,
    local_files,
    own_tokenizer,
    refuse_other,
)
from flowlm.data.tokens import MIN_BPE, Tokenizer
from flowlm.rng import key

__all__ = ["Corpus", "DataConfig", "cache_folder", "load_corpus", "prepare_corpus"]

Report = Callable[[str], None]

_KNOWN = {
    "corpus": ("grammar", "docs", "text", *CORPORA),
    "unit": ("line", "paragraph", "document", "record", "piece"),
    "rows": ("cut", "split", "drop", "wrap", "chunk"),
    "unknown": ("keep", "drop"),
    "detokenizer": ("", *DETOKENIZERS),
    "split": ("hash", "last"),
}
_TRAINED = ("words", "bpe")
_CHUNK = 1 << 14  # passages worked on at a time: bounds memory, changes nothing


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from: a corpus, how it is cut into passages, and how passages become tokens."""

    corpus: str = "grammar"
    """"grammar" (stories whose law is known exactly), "docs" (English sentences from the docstrings of Python's
    library and of torch's packages), "text" (your own), or a published one by its name: "lm1b", "lm1b-unwrapped",
    "openwebtext", "text8", "wikitext", "tinystories". A name decides unit, rows, bos, detokenizer and split, and the
    tokenizer and what is held out unless they are given."""
    path: str = ""
    """text: a file or folder of .txt, .jsonl or .csv, plain or in .gz, .xz, .bz2 or .zip, or of .parquet; or a folder
    that `flowlm prepare` wrote. docs: such a folder alone. A corpus by name: a folder of its Parquet
    files, in place of the hub's."""
    field: str = "text"
    """text: the field of .jsonl, or column of .csv and .parquet, that is read."""
    encoding: str = "utf-8"
    """text: of its files."""
    unit: str = "line"
    """text: a passage is a "line", a "paragraph" (blank lines between) or a "document" (a file, or a record of
    .jsonl, .csv, .parquet); a "record" is a document exactly as it stands, a "piece" a part of one that is cut every
    65,536 characters."""
    rows: str = "cut"
    """A passage of more than L-1 tokens: "cut" drops its end, "split" makes several rows of it, "drop" leaves it
    out. "wrap" joins all passages, each closed by [EOS], and cuts them into full rows; "chunk" joins them with
    nothing between, and leaves out what fills no row."""
    bos: str = ""
    """existing tokenizer: its token that begins every row, which [EOS] then ends, wrapped ones too; what fills no row
    is left out of those. None when empty."""
    detokenizer: str = ""
    """text: how the spacing of tokenised text is undone first: "lm1b", or not at all when empty."""
    tokenizer: str = "words"
    """"words" (words and punctuation), "bpe" (byte-level pieces, trained on the text), or the path of an existing
    one: tokenizer.json, WordPiece's vocab.txt, or GPT-2's encoder.json or vocab.json with its merges."""
    eos: str = ""
    """existing tokenizer: its token that ends a passage; found by its usual names when empty."""
    pad: str = ""
    """existing tokenizer: its token that fills rows; found, or added, when empty."""
    vocab_size: int = 0
    """bpe: number of tokens; words: at most this many words, the rest [UNK]; 0 keeps all words."""
    unknown: str = "keep"
    """words outside the vocabulary: "keep" them as [UNK], or "drop" the passages that have any."""
    num: int = 200_000
    """grammar: stories drawn for training."""
    held_out: int = 2_000
    """Passages held out, in whole documents; of a text at most a tenth. With split = "last", documents."""
    split: str = "hash"
    """text: held-out documents are chosen by their "hash", or are the "last" ones. A corpus by name may have files of
    its own for them: "test", "validation"."""
    seed: int = 0
    """grammar: which stories are drawn. The split of a text does not depend on it."""

    def __post_init__(self) -> None:
        if self.corpus in CORPORA:
            self._take_own()
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known and not (name == "split" and self.corpus in CORPORA):
                nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"data.{name} = {value!r} is unknown: the nearest known name is {nearest!r}; known: "
                    f"{', '.join(known)}"
                )
        for name, least in (("num", 1), ("held_out", 1), ("vocab_size", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        existing = self.tokenizer not in _TRAINED
        place = Path(self.tokenizer)
        named = self.corpus in CORPORA and self.tokenizer in TOKENIZERS
        if existing and not (named or place.suffix or place.exists() or {"/", os.sep} & {*self.tokenizer}):
            nearest = difflib.get_close_matches(self.tokenizer, _TRAINED, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"data.tokenizer = {self.tokenizer!r} is unknown: the nearest known name is {nearest!r}; known: "
                f"{', '.join(_TRAINED)}, or the path of an existing tokenizer, such as ./vocab.txt"
            )
        if existing and self.vocab_size:
            raise ValueError(
                f"data.vocab_size = {self.vocab_size}: an existing tokenizer has the size it has; leave it 0"
            )
        if not existing and (self.eos or self.pad or self.bos):
            raise ValueError(
                f"data.eos, data.pad and data.bos name tokens of an existing tokenizer, and data.tokenizer = "
                f"{self.tokenizer!r} makes its own: leave them empty"
            )
        if self.bos and self.rows == "chunk":
            raise ValueError(
                f"data.rows = 'chunk' puts nothing between and around, and data.bos = {self.bos!r} would: leave it "
                "empty, or use data.rows = 'wrap'"
            )
        if self.tokenizer == "bpe" and self.vocab_size == 0:
            raise ValueError(
                f"data.tokenizer = 'bpe' needs data.vocab_size, at least {MIN_BPE}: 1024 to 8192 suits a few "
                "megabytes of text"
            )
        if self.tokenizer == "bpe" and self.vocab_size < MIN_BPE:
            raise ValueError(
                f"data.vocab_size = {self.vocab_size}: byte-level pieces need at least {MIN_BPE}, the 256 "
                "bytes with [EOS] and [PAD]"
            )
        if self.corpus == "grammar" and self.tokenizer == "words" and self.vocab_size:
            raise ValueError(
                f"data.vocab_size = {self.vocab_size}: the grammar needs all of its known words; leave it 0"
            )
        if self.corpus == "grammar" and existing:
            raise ValueError(
                f"data.tokenizer = {self.tokenizer!r}: the grammar is told in its own words or in byte-level pieces "
                "trained on it; use 'words' or 'bpe'"
            )
        if self.corpus == "grammar" and self.path:
            raise ValueError(self._own_text())

    def _own_text(self) -> str:
        return (
            f"data.path = {self.path!r}, but data.corpus = {self.corpus!r} brings its own text: set data.corpus = "
            "'text' to learn from the path, or leave it out"
        )

    def _take_own(self) -> None:
        """Fill in what the corpus's name decides, where it was left at its default.

        ValueError: it was set to something else.
        """
        named, default = CORPORA[self.corpus], type(self)
        begun = self.unit == named.unit  # filled in before: what stands at a default now was set to it
        for name, own in named.decided.items():
            value = getattr(self, name)
            if value != own and (begun or value != getattr(default, name)):
                raise ValueError(
                    f"data.{name} = {value!r}, and {self.corpus} is made with {own!r}: leave it out, or take the text "
                    "as data.corpus = 'text', under no name"
                )
            object.__setattr__(self, name, own)
        if self.eos or self.pad:
            raise ValueError(
                f"data.eos and data.pad: {self.corpus} has its tokenizer's own; leave them empty"
            )
        if begun and self.tokenizer in _TRAINED:
            raise ValueError(
                f"data.tokenizer = {self.tokenizer!r}, and {self.corpus} is made with {named.tokenizer!r}: leave it "
                "out, or give the path of that one"
            )
        if not begun and self.tokenizer == default.tokenizer:
            object.__setattr__(self, "tokenizer", named.tokenizer)
        if not begun and named.held_out and self.held_out == default.held_out:
            object.__setattr__(self, "held_out", named.held_out)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids `train` (N, L) and `held_out` (M, L), their `tokenizer`, and `meta`: what was counted."""

    train: NDArray[Any] = field(repr=False)
    held_out: NDArray[Any] = field(repr=False)
    tokenizer: Tokenizer
    meta: dict[str, Any]


#: Bytes of text that one word of it has at most on average, in scripts that part words.
LONG_WORD = 20


def _hints(config: DataConfig, meta: Mapping[str, Any]) -> Iterable[str]:
    """What of settings and text goes badly together, and what would do instead."""
    filling = 1 - meta["tokens"] / (meta["train"] * meta["length"])
    if filling > 0.5 and config.rows not in ("wrap", "chunk") and config.corpus not in CORPORA:
        longest = meta["max_tokens"] + 1
        instead = (
            f"--model.length {longest} holds every passage"
            if longest <= 0.75 * meta["length"]
            else "--data.rows wrap fills them, with several passages in a row"
        )
        yield f"{filling:.0%} of the rows is filling, which is computed like text: {instead}"
    tokens = meta["mean_tokens"] * meta["passages"]
    if config.tokenizer == "words" and 0 < meta["mean_tokens"] < 3 and meta["bytes"] / tokens > LONG_WORD:
        yield (
            f"a word of this text has {meta['bytes'] / tokens:.0f} bytes: where words are not parted by spaces, take "
            "pieces of them, --data.tokenizer bpe --data.vocab-size 4096"
        )


def load_corpus(
    config: DataConfig,
    length: int,
    tokenizer: Tokenizer | None = None,
    report: Report | None = None,
    like: Mapping[str, Any] | None = None,
    *,
    counts: bool = True,
) -> Corpus:
    """The corpus of `config` in rows of `length` tokens; how that goes, and what was counted, is reported by lines.

    A text is prepared once, in the cache, and mapped from there as long as nothing changes.

    A given `tokenizer` is used instead of training one. A new one is trained on the whole text, so that a
    held-out passage has no unknown words. `like` is data.json of the run that learned the corpus, if one did: `docs`
    is then that of the same versions, if it was made here. Without `counts`, only how it goes is reported.

    ValueError: whatever is wrong with the files, the length, the words.
    """
    say: Report = report or _silent
    _check_length(length)
    if config.corpus == "grammar":
        return _grammar(config, length, tokenizer, say if counts else _silent)
    found, origin = _text(config, length, tokenizer, None, say, (like or {}).get("versions"))
    meta = _described(config, found, origin, say if counts else _silent)
    return Corpus(found.train, found.held_out, found.tokenizer, meta)


def upgraded(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ " (docs was made of …, now …)" where the packages behind two descriptions of `docs` differ; else empty."""
    was, there = before.get("versions") or {}, now.get("versions") or {}
    other = [
        f"{name} {version}, is {there.get(name)}"
        for name, version in was.items()
        if there.get(name) != version
    ]
    return f" (its packages: was {'; was '.join(other)})" if other else ""


def prepare_corpus(
    config: DataConfig, length: int, folder: Path | None, report: Report, *, streaming: bool = False
) -> Path:
    """Prepare a text into `folder` (None: where `load_corpus` looks for it); returns where it is.

    With `streaming` the files of a corpus by name are read on the hub, twice, and none is kept here; the rows are the
    same.

    ValueError: the grammar, which needs none; a folder that holds something else; `streaming` of what is here.
    """
    _check_length(length)
    if config.corpus == "grammar":
        raise ValueError("data.corpus = 'grammar' is drawn anew in seconds: there is nothing to prepare")
    if streaming and (config.path or config.corpus not in CORPORA):
        where = f"data.path = {config.path!r}" if config.path else f"data.corpus = {config.corpus!r}"
        raise ValueError(
            f"--streaming reads a corpus by its name on the hub, one of {', '.join(CORPORA)}, and {where} is here: "
            "leave it out"
        )
    found, origin = _text(config, length, None, folder, report, streaming=streaming)
    _described(config, found, origin, report)
    return found.folder


def _silent(line: str) -> None:
    """For what no one listens to."""


def cache_folder() -> Path:
    """Where texts are kept prepared: $FLOWLM_CACHE, or flowlm in the user's folder for caches."""
    if own := os.environ.get("FLOWLM_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowlm"
    except RuntimeError:
        raise ValueError(
            "there is no home folder to keep prepared text in: set the variable FLOWLM_CACHE to a folder"
        ) from None


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"length is {length}: a passage needs room for a token and [EOS]; give at least 2")


# ------------------------------------------------------------------------------------------------ the grammar


def _grammar(config: DataConfig, length: int, tokenizer: Tokenizer | None, say: Report) -> Corpus:
    grammar = Grammar()
    by_words = config.tokenizer == "words" if tokenizer is None else tokenizer.kind == "words"
    if by_words and length < grammar.max_tokens + 1:
        raise ValueError(
            f"length is {length}: the grammar's stories have up to {grammar.max_tokens} tokens and [EOS], "
            f"and none may be cut; give at least {grammar.max_tokens + 1}"
        )
    train = grammar.sample(config.num, config.seed)
    held_out = grammar.sample(config.held_out, key(config.seed, "held out"))
    if tokenizer is None:
        if by_words:
            tokenizer = Tokenizer.train_words((), vocab=grammar.vocabulary)
        else:
            tokenizer = Tokenizer.train_bpe(train, vocab_size=config.vocab_size)
    rows = [_rows(tokenizer, texts, length) for texts in (train, held_out)]
    drawn = set(train)
    lengths = np.concatenate([np.count_nonzero(side != tokenizer.pad_id, axis=1) - 1 for side in rows])
    say(f"grammar: {len(train):,} stories and {len(held_out):,} held out, {grammar.entropy:.4f} nats a story")
    say(
        f"{len(train):,} + {len(held_out):,} rows of {length} tokens, V = {tokenizer.vocab_size}; a story has "
        f"{lengths.mean():.1f} tokens, at most {lengths.max()}"
    )
    meta = {
        "corpus": "grammar",
        "law_sha256": grammar.hash,
        "entropy": grammar.entropy,  # nats a story
        "seed": config.seed,
        "bytes": sum(len(text.encode()) for text in train),
        "passages": len(train),
        "duplicates": len(train) - len(drawn),
        "held_out_in_train": sum(text in drawn for text in held_out),  # honest draws: kept
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "length": length,
        "train": len(train),
        "held_out": len(held_out),
        "tokens": int(np.count_nonzero(rows[0] != tokenizer.pad_id)),  # [EOS] counts, [PAD] does not
        "held_out_tokens": int(np.count_nonzero(rows[1] != tokenizer.pad_id)),
        "mean_tokens": float(lengths.mean()),  # of a story, without [EOS]
        "max_tokens": int(lengths.max()),
    }
    return Corpus(rows[0], rows[1], tokenizer, meta)


def _rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> NDArray[Any]:
    """Stories as rows (N, L) of ids, [EOS], [PAD]. ValueError: one does not fit."""
    rows: NDArray[Any] = np.full((len(texts), length), tokenizer.pad_id, token_dtype(tokenizer.vocab_size))
    for start in range(0, len(texts), _CHUNK):
        ids = tokenizer.encode(texts[start : start + _CHUNK])
        n = np.fromiter(map(len, ids), np.int64, len(ids))
        if n.max() + 1 > length:
            raise ValueError(
                f"length is {length}: the stories have up to {n.max()} of this tokenizer's tokens and [EOS], and "
                f"none may be cut; give at least {n.max() + 1}, or more"
            )
        at = np.arange(length)
        block = rows[start : start + len(ids)]
        block[at < n[:, None]] = np.fromiter(chain.from_iterable(ids), rows.dtype, int(n.sum()))
        block[np.arange(len(ids)), n] = tokenizer.eos_id
    return rows


# ------------------------------------------------------------------------------------------------------- text


def _text(
    config: DataConfig,
    length: int,
    tokenizer: Tokenizer | None,
    folder: Path | None,
    say: Report,
    like: Mapping[str, str] | None = None,
    *,
    streaming: bool = False,
) -> tuple[Prepared, dict[str, Any]]:
    """The prepared text: as it was given, from the cache, or made now; and where it comes from, for data.json."""
    if length < 3 and config.bos:
        raise ValueError(
            f"length is {length}: rows have a token between data.bos and the end; give at least 3"
        )
    if config.corpus in CORPORA:
        if tokenizer is None:
            tokenizer = own_tokenizer(config.corpus, config.tokenizer)
        refuse_other(config.corpus, tokenizer, "the model's tokenizer")
    named = config.tokenizer
    if named not in _TRAINED:
        # The file may move or change: what it says counts. A run that goes on has its own copy.
        tokenizer = tokenizer or Tokenizer.read(named, eos=config.eos, pad=config.pad)
        named = f"sha256:{tokenizer.sha256}"
    recipe = Recipe(
        unit=config.unit,
        field=config.field,
        encoding=config.encoding,
        rows=config.rows,
        unknown=config.unknown,
        tokenizer=named,
        vocab_size=config.vocab_size,
        held_out=config.held_out,
        length=length,
        bos=config.bos,
        detokenizer=config.detokenizer,
        split=config.split,
    )
    if tokenizer is not None and config.bos:
        try:
            tokenizer.id(config.bos)  # before anything is fetched or read
        except ValueError as error:
            raise ValueError(f"data.bos = {config.bos!r}: {error}") from None
    path = Path(config.path)
    origin: dict[str, Any] = {}
    if config.corpus == "docs":
        if not config.path:
            path, versions = docs.build(cache_folder(), say, like)
            origin = {"versions": versions, "licences": docs.LICENCES}
        elif not is_prepared(path):
            raise ValueError(
                f"{config._own_text()}, unless it is a folder that `flowlm prepare docs --out` made"
            )
    if config.path and is_prepared(path):
        if folder is not None:
            raise ValueError(
                f"data.path = {config.path!r} is prepared already, and nothing would be written to --out {folder}: "
                "train on it as it is, or give the text that it was made from"
            )
        given = _given(path, recipe, tokenizer)
        said = given.meta.get("origin", {})
        if config.corpus != "text" and (whose := _corpus_of(said)) != config.corpus:
            raise ValueError(
                f"data.path = {config.path!r} holds rows of another text than {config.corpus}, prepared in the same "
                f"way: name theirs, with data.corpus = {whose!r}"
            )
        return given, said

    def reading(where: str | Path, sides: Sides | None = None) -> TextReader:
        undone = DETOKENIZERS.get(config.detokenizer)
        return TextReader(where, config.unit, config.field, config.encoding, sides=sides, detokenize=undone)

    source, on_hub = str(path.resolve()), config.corpus in CORPORA and not config.path
    if on_hub:
        # The same rows, wherever its files are read.
        source = download.address(config.corpus)
        reader = reading(source, download.listed(config.corpus, cache_folder()))
    elif config.corpus in CORPORA:
        reader = reading(path, local_files(config.corpus, path))
    else:
        reader = reading(config.path if config.corpus == "text" else path)
    if config.corpus in CORPORA:
        origin = described(config.corpus, own=not on_hub)
    if reader.left_out:
        say(f"{path}: files of other kinds are left out: {reader.left_out}")
    if len(reader.kinds) > 1:
        counts = ", ".join(f"{n} {kind or 'without a suffix'}" for kind, n in reader.kinds.items())
        say(f"{path}: read are {counts}")
    if folder is not None:
        folder = folder.resolve()  # "." has no name beside which work could lie
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: rows are written into a folder, give a new one")
        if folder.exists() and not is_prepared(folder) and any(folder.iterdir()):
            raise ValueError(f"{folder} holds something else than prepared text: give a new folder")

    def make(passages: Iterable[str]) -> Tokenizer:
        if tokenizer is not None:
            return tokenizer
        if config.tokenizer == "words":
            return Tokenizer.train_words(passages, max_vocab=config.vocab_size)
        made = Tokenizer.train_bpe(passages, vocab_size=config.vocab_size)
        if made.vocab_size < config.vocab_size:
            say(f"the text gives only {made.vocab_size} of {config.vocab_size} byte-level pieces")
        return made

    own = "" if tokenizer is None else tokenizer.sha256
    # Rows that are taken elsewhere say what they are.
    written = origin if config.corpus in (*CORPORA, "docs") else {}

    def place(with_tokenizer: str) -> Path:
        name = json.dumps([source, recipe.written(), with_tokenizer])
        # Names of files are at most 255 bytes long, of all of which a hash and other endings need some.
        stem = config.corpus if config.corpus in CORPORA else path.stem.encode()[:100].decode(errors="ignore")
        return cache_folder() / f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    # A run that goes on, and a student, bring the tokenizer that the same recipe made: it is looked for, and nothing
    # else is ever made, in the recipe's own place.
    if (
        folder is None
        and own
        and (found := reuse(reader, recipe, place(""))) is not None
        and found.tokenizer.sha256 == own
    ):
        return found, origin
    target = folder or place(own)
    if on_hub and not streaming:
        if (found := reuse(reader, recipe, target)) is not None:
            return found, origin  # which the hub's files are not needed for
        if folder is not None and is_prepared(folder):
            refuse(recipe, reader, folder)
        sides, path = download.fetch(config.corpus, cache_folder(), target.parent, say)
        reader = reading(path, sides)
    made = prepare(
        reader,
        recipe,
        target,
        make,
        say,
        tokenizer_sha256=own,
        replace=folder is None,
        origin=written,
    )
    return made, origin


def _corpus_of(said: Mapping[str, Any]) -> str:
    """The corpus that prepared rows are of, by what they say of their origin."""
    if "versions" in said:
        return "docs"
    return next((name for name, known in CORPORA.items() if known.label == said.get("label")), "text")


def _given(folder: Path, recipe: Recipe, tokenizer: Tokenizer | None) -> Prepared:
    """A prepared folder in place of a text: it must be what the recipe would make."""
    found = open_prepared(folder, check=True)
    if differences := recipe.differences(found.meta["recipe"]):
        own = found.meta["recipe"]["tokenizer"]
        own = own if own in _TRAINED else folder / "tokenizer.json"
        raise ValueError(
            f"data.path = {str(folder)!r} was prepared otherwise: {'; '.join(differences)}. Use the same settings "
            f"(its tokenizer is --data.tokenizer {own}), or prepare the text again into another folder"
        )
    if tokenizer is not None and tokenizer.sha256 != found.tokenizer.sha256:
        raise ValueError(
            f"data.path = {str(folder)!r} was prepared with another tokenizer ({found.tokenizer.vocab_size} tokens) "
            f"than the model's ({tokenizer.vocab_size} tokens): prepare the text with the model's tokenizer.json as "
            "data.tokenizer"
        )
    return found


def _described(config: DataConfig, found: Prepared, origin: dict[str, Any], say: Report) -> dict[str, Any]:
    """The counts of a text for data.json; what one should know of them is said."""
    meta, name = found.meta, config.path or config.corpus
    say(
        f"{name}: {meta['passages']:,} passages in {meta['documents']:,} documents; {meta['duplicates']:,} are copies "
        "of others; "
        + (
            f"{meta['held_out_in_train']:,} of the held-out ones are also training passages"
            if meta["held_out_in_train"]
            else "no copy lies on both sides"
        )
    )
    if meta["control_characters"]:
        say(f"{meta['control_characters']:,} control characters became spaces")
    if meta["empty"]:
        say(f"{meta['empty']:,} passages hold nothing that the tokenizer knows, and are left out")
    if meta["unknown"]:
        share = (
            f"{meta['unknown']:,} words ({meta['unknown'] / (meta['mean_tokens'] * meta['passages']):.2%})"
        )
        say(
            f"{share} lie outside the vocabulary; the {meta['dropped_unknown']:,} passages that have any are left out"
            if config.unknown == "drop"
            else f"{share} lie outside the vocabulary and became [UNK]"
        )
    over, room = meta["cut"] + meta["split"] + meta["dropped_long"], meta["length"] - 1 - bool(config.bos)
    if over:
        how = {
            "cut": f"cut, {meta['cut_tokens'] / (meta['mean_tokens'] * meta['passages']):.1%} of all tokens; "
            "data.rows = 'split' keeps them",
            "split": "split into rows; data.rows = 'cut' would drop their ends",
            "drop": "left out",
        }[config.rows]
        around = "its frame" if config.bos else "[EOS]"
        say(f"{over:,} of {meta['passages']:,} passages are longer than {room} tokens and {around}: {how}")
    if meta.get("left_over"):
        say(f"{meta['left_over']:,} tokens at the ends of both sides fill no row, and are left out")
    if found.tokenizer.losses:
        say(f"tokens: {found.tokenizer.losses}")
    say(
        f"{meta['train']:,} + {meta['held_out']:,} rows of {meta['length']} tokens, V = {meta['vocab_size']}; a "
        f"passage has {meta['mean_tokens']:.1f} tokens, at most {meta['max_tokens']}; kept in {found.folder}, "
        f"{(found.train.nbytes + found.held_out.nbytes) / 1e6:,.1f} MB"
    )
    for hint in _hints(config, meta):
        say(hint)
    source: dict[str, Any] = {
        "corpus": config.corpus,
        "path": config.path,
        "unit": config.unit,
        "rows": config.rows,
    }
    source |= {name: value for name in ("bos", "detokenizer") if (value := getattr(config, name))}
    if config.split != "hash":
        source["held_out_by"] = config.split
    source |= origin
    left_out = ("format", "recipe", "files", "dtype", "seconds", "rows_sha256", "origin")
    return source | {key: value for key, value in meta.items() if key not in left_out}
