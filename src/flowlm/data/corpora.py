"""Corpora as matrices of token ids: the language with a known law, or any text file.

A passage is its ids, then [EOS], then [PAD] up to the model's length L. What does not fit is cut or split,
and said; held-out passages are never training passages, copies included.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlm.data.grammar import Grammar
from flowlm.data.tokens import MIN_BPE, Tokenizer
from flowlm.rng import key

__all__ = ["Corpus", "DataConfig", "load_corpus"]

Report = Callable[[str], None]

_KNOWN = {
    "corpus": ("grammar", "text"),
    "unit": ("line", "paragraph", "wrap"),
    "tokenizer": ("words", "bpe"),
    "long": ("cut", "split"),
}
_CHUNK = 1 << 14  # passages worked on at a time: bounds memory, changes nothing


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from: a corpus, how it is cut into passages, and how passages become tokens."""

    corpus: str = "grammar"
    """"grammar" (stories whose law is known exactly) or "text" (a file of your own)."""
    path: str = ""
    """text: a plain text file, UTF-8."""
    unit: str = "line"
    """text: a passage is a "line", a "paragraph" (blank lines between), or "wrap": lines joined by [EOS] and
    cut into full blocks."""
    tokenizer: str = "words"
    """"words" (words and punctuation) or "bpe" (byte-level pieces)."""
    vocab_size: int = 0
    """bpe: number of tokens; words: at most this many words, the rest [UNK]; 0 keeps all words."""
    num: int = 200_000
    """grammar: stories drawn for training."""
    held_out: int = 2_000
    """Passages held out; of a text at most a tenth."""
    long: str = "cut"
    """A passage longer than the model: "cut" drops its end, "split" makes several passages of it."""
    seed: int = 0
    """grammar: which stories are drawn. The split of a text does not depend on it."""

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known:
                nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"data.{name} = {value!r} is unknown: the nearest known name is {nearest!r}; known: "
                    f"{', '.join(known)}"
                )
        for name, least in (("num", 1), ("held_out", 1), ("vocab_size", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
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


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids `train` (N, L) and `held_out` (M, L), their `tokenizer`, and `meta`: what was counted."""

    train: NDArray[Any] = field(repr=False)
    held_out: NDArray[Any] = field(repr=False)
    tokenizer: Tokenizer
    meta: dict[str, Any]


def load_corpus(
    config: DataConfig, length: int, tokenizer: Tokenizer | None = None, report: Report | None = None
) -> Corpus:
    """The corpus of `config` in rows of `length` tokens; what is worth knowing goes to `report` by lines.

    A given `tokenizer` is used instead of training one. A new one is trained on the whole text, so that a
    held-out passage has no unknown words. ValueError: whatever is wrong with the file, the length, the words.
    """
    say: Report = report or (lambda line: None)
    if length < 2:
        raise ValueError(f"length is {length}: a passage needs room for a token and [EOS]; give at least 2")
    if config.corpus == "grammar":
        return _grammar(config, length, tokenizer, say)
    return _text(config, length, tokenizer, say)


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
    flat = [_encode(tokenizer, texts) for texts in (train, held_out)]
    longest = max(int(lengths.max()) for _, lengths in flat)
    if longest + 1 > length:
        raise ValueError(
            f"length is {length}: the stories have up to {longest} of this tokenizer's tokens and [EOS], and "
            f"none may be cut; give at least {longest + 1}"
        )
    drawn = set(train)
    source = {
        "corpus": "grammar",
        "law_sha256": grammar.hash,
        "entropy": grammar.entropy,  # nats a story
        "seed": config.seed,
        "bytes": _bytes(train),
        "passages": len(train),
        "duplicates": len(train) - len(drawn),
        "held_out_in_train": sum(text in drawn for text in held_out),  # honest draws: kept
    }
    say(f"grammar: {len(train):,} stories and {len(held_out):,} held out, {grammar.entropy:.4f} nats a story")
    rows = [_rows(ids, lengths, length, tokenizer, "cut") for ids, lengths in flat]
    return _corpus(rows[0], rows[1], flat, tokenizer, source, say)


# ------------------------------------------------------------------------------------------------- text files


def _text(config: DataConfig, length: int, tokenizer: Tokenizer | None, say: Report) -> Corpus:
    text, sha256, size = _read(config.path)
    passages = _passages(text, config)
    del text
    train, held_out, duplicates = _split(passages, config)
    if tokenizer is None:
        if config.tokenizer == "words":
            tokenizer = Tokenizer.train_words(passages, max_vocab=config.vocab_size)
        else:
            tokenizer = Tokenizer.train_bpe(passages, vocab_size=config.vocab_size)
            if tokenizer.vocab_size < config.vocab_size:
                say(f"the text gives only {tokenizer.vocab_size} of {config.vocab_size} byte-level pieces")
    source: dict[str, Any] = {
        "corpus": "text",
        "path": config.path,
        "sha256": sha256,
        "unit": config.unit,
        "bytes": size,
        "passages": len(passages),
        "duplicates": duplicates,
    }
    del passages
    say(
        f"{config.path}: {source['passages']:,} passages, {len(held_out):,} of them held out; {duplicates:,} "
        "are copies of others and lie on the same side"
    )
    flat = [_encode(tokenizer, texts) for texts in (train, held_out)]
    distinct = np.unique(np.concatenate([np.unique(ids) for ids, _ in flat]))
    if len(distinct) < 2:
        what = repr(tokenizer.token(int(distinct[0]))) if len(distinct) else "no token"
        raise ValueError(
            f"{config.path} holds {what} and nothing else: there is nothing to learn; give a text with at "
            "least two different tokens"
        )
    if tokenizer.unk_id is not None:
        source["unknown"] = int(sum(np.count_nonzero(ids == tokenizer.unk_id) for ids, _ in flat))
        share = source["unknown"] / sum(len(ids) for ids, _ in flat)
        say(f"{source['unknown']:,} words ({share:.2%}) lie outside the vocabulary and became [UNK]")
    if config.unit == "wrap":
        rows = [_wrap(ids, lengths, length, tokenizer) for ids, lengths in flat]
    else:
        source |= _overlong(flat, length, config.long, say)
        rows = [_rows(ids, lengths, length, tokenizer, config.long) for ids, lengths in flat]
    return _corpus(rows[0], rows[1], flat, tokenizer, source, say)


def _read(name: str) -> tuple[str, str, int]:
    """The text of a file (lines end with "\\n"), the sha256 of its bytes, their number."""
    if not name:
        raise ValueError("data.path is empty: data.corpus = 'text' needs a plain text file")
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"data.path = {name!r} is a folder: give one plain text file")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"data.path = {name!r} does not exist (read from {Path.cwd()}): check it") from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"data.path = {name!r} cannot be read ({reason}): check its permissions") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # a byte order mark is removed before decoding, and its bytes are not counted by the codec
        at = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, at) + 1
        raise ValueError(
            f"data.path = {name!r} is not UTF-8: byte 0x{data[at]:02x} at offset {at}, line {line}; convert "
            "it (for example: iconv -f latin1 -t utf8) or remove the byte"
        ) from error
    if not text.strip():
        raise ValueError(f"data.path = {name!r} holds no text ({len(data)} bytes): give a file with passages")
    return text.replace("\r\n", "\n").replace("\r", "\n"), hashlib.sha256(data).hexdigest(), len(data)


def _passages(text: str, config: DataConfig) -> list[str]:
    pieces = re.split(r"\n\s*\n", text) if config.unit == "paragraph" else text.split("\n")
    passages = [stripped for piece in pieces if (stripped := piece.strip())]
    if len(passages) < 2:
        unit, fix = "line", "break the text into lines"
        if config.unit == "paragraph":
            unit, fix = "paragraph", "leave blank lines between paragraphs, or use data.unit = 'line'"
        raise ValueError(
            f"data.path = {config.path!r} is a single {unit}: one passage is needed to train on and one to "
            f"hold out; {fix}"
        )
    return passages


def _split(passages: Sequence[str], config: DataConfig) -> tuple[list[str], list[str], int]:
    """Train, held out, number of copies. The order of hashes decides, whatever else the file holds."""
    counts = Counter(passages)
    texts = list(counts)
    if len(texts) < 2:
        raise ValueError(
            f"data.path = {config.path!r}: all {len(passages)} passages are the same, {texts[0][:40]!r}; "
            "held-out text must differ from training text: give at least two different passages"
        )
    digests = np.fromiter(
        (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts),
        np.uint64,
        len(texts),
    )
    quota = max(1, min(config.held_out, len(passages) // 10))
    held: set[str] = set()
    for i in np.argsort(digests, kind="stable").tolist():
        if quota == 0:
            break
        if counts[texts[i]] <= quota:  # copies stay together: a passage with too many of them is for training
            held.add(texts[i])
            quota -= counts[texts[i]]
    if not held:
        held.add(min(texts, key=lambda text: (counts[text], text)))
    train = [text for text in passages if text not in held]
    return train, [text for text in passages if text in held], len(passages) - len(texts)


# ---------------------------------------------------------------------------------------------- ids to rows


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All ids in one row, and how many each text has."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    parts, lengths = [], []
    for start in range(0, len(texts), _CHUNK):
        ids = tokenizer.encode(texts[start : start + _CHUNK])
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))
        parts.append(np.fromiter(chain.from_iterable(ids), dtype, int(lengths[-1].sum())))
    return np.concatenate(parts), np.concatenate(lengths)


def _rows(
    flat: NDArray[Any], lengths: NDArray[np.int64], length: int, tokenizer: Tokenizer, long: str
) -> NDArray[Any]:
    """Passages as rows (N, L) of ids, [EOS], [PAD]; a long one is cut, or goes on in the next row."""
    room = length - 1
    pieces = np.maximum(1, -(-lengths // room)) if long == "split" else np.ones_like(lengths)
    first, ends = np.cumsum(pieces) - pieces, np.cumsum(lengths)
    rows = np.full((int(pieces.sum()), length), tokenizer.pad_id, flat.dtype)
    for a in range(0, len(lengths), _CHUNK):
        n = lengths[a : a + _CHUNK]
        ids = flat[ends[a] - n[0] : ends[a + len(n) - 1]]
        at = np.arange(len(ids)) - np.repeat(np.cumsum(n) - n, n)
        row = np.repeat(first[a : a + _CHUNK], n)
        if long == "split":
            row, at = row + at // room, at % room
        else:
            fits = at < room
            row, at, ids = row[fits], at[fits], ids[fits]
        rows[row, at] = ids
    used = np.full(len(rows), room)
    used[first + pieces - 1] = np.minimum(lengths - room * (pieces - 1), room)
    rows[np.arange(len(rows)), used] = tokenizer.eos_id
    return rows


def _wrap(flat: NDArray[Any], lengths: NDArray[np.int64], length: int, tokenizer: Tokenizer) -> NDArray[Any]:
    """Passages, each closed by [EOS], end to end in blocks (N, L); the last one is filled with [PAD]."""
    stream = np.insert(flat, np.cumsum(lengths), tokenizer.eos_id)
    rows = np.full((-(-len(stream) // length), length), tokenizer.pad_id, flat.dtype)
    rows.reshape(-1)[: len(stream)] = stream
    return rows


def _overlong(
    flat: Sequence[tuple[NDArray[Any], NDArray[np.int64]]], length: int, long: str, say: Report
) -> dict[str, int]:
    """Counts, and says, how many passages do not fit."""
    lengths = np.concatenate([n for _, n in flat])
    over = lengths[lengths > length - 1]
    if not len(over):
        return {"cut": 0, "cut_tokens": 0, "split": 0}
    what = f"{len(over):,} of {len(lengths):,} passages are longer than {length - 1} tokens and [EOS]"
    if long == "cut":
        lost = int(over.sum() - len(over) * (length - 1))
        say(f"{what}: cut, {lost / lengths.sum():.1%} of all tokens; data.long = 'split' keeps them")
        return {"cut": len(over), "cut_tokens": lost, "split": 0}
    pieces = int((-(-over // (length - 1))).sum())
    say(f"{what}: split into {pieces:,} rows")
    return {"cut": 0, "cut_tokens": 0, "split": len(over)}


def _corpus(
    train: NDArray[Any],
    held_out: NDArray[Any],
    flat: Sequence[tuple[NDArray[Any], NDArray[np.int64]]],
    tokenizer: Tokenizer,
    source: dict[str, Any],
    say: Report,
) -> Corpus:
    lengths = np.concatenate([n for _, n in flat])
    meta = source | {
        "tokenizer": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "length": train.shape[1],
        "train": len(train),
        "held_out": len(held_out),
        "tokens": int(np.count_nonzero(train != tokenizer.pad_id)),  # [EOS] counts, [PAD] does not
        "held_out_tokens": int(np.count_nonzero(held_out != tokenizer.pad_id)),
        "mean_tokens": float(lengths.mean()),  # of a passage as it stands in the source, without [EOS]
        "max_tokens": int(lengths.max()),
    }
    say(
        f"{len(train):,} + {len(held_out):,} rows of {train.shape[1]} tokens, V = {tokenizer.vocab_size}; a "
        f"passage has {meta['mean_tokens']:.1f} tokens, at most {meta['max_tokens']}"
    )
    return Corpus(train, held_out, tokenizer, meta)
