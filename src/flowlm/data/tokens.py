"""Text to token ids and back: whole words with punctuation, byte-level pieces, or a tokenizer made elsewhere.

An end token and a pad, [EOS] and [PAD] where they are made here, are ordinary tokens of every vocabulary: the
flow writes them like any other. They come from no text; a text that spells "[EOS]" is encoded as what it spells.

    words   a word (with its inner apostrophes and hyphens), a number, or one sign is a token; spacing is not
            kept, decoding sets it by rule, so that encode(decode(ids)) == ids
    bpe     pieces of UTF-8 bytes; decode(encode(text)) == text for every text

A tokenizer made elsewhere keeps its ids, and says in `Tokenizer.losses` what a text loses by it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlm.data import fidelity, pretrained
from flowlm.data.fidelity import CHARACTER
from flowlm.files import write_data, write_json

if TYPE_CHECKING:
    import tokenizers

__all__ = ["EOS", "PAD", "UNK", "Tokenizer", "join_words"]

EOS, PAD, UNK = "[EOS]", "[PAD]", "[UNK]"
FILE = pretrained.TOKENIZER
MIN_BPE = 256 + 2  # every byte, [EOS], [PAD]

# Oniguruma: words, numbers, dashes, and any other sign alone. No alternative matches a space.
_WORD = r"\w+(?:['’\-]\w+|(?<=\d)[.,]\d\w*)*|-{2,}|[^\w\s]"
_CHUNK = 8192  # texts handed to the library at a time: bounds memory
_CACHED = 1 << 20
_NO_SPACES = "\x1c\x1d\x1e\x1f"
_OFTEN = 32  # characters: longer chunks between spaces are not words that come again

_KINDS = {"WordLevel": "wordlevel", "BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram"}

_GLUE_LEFT = frozenset(".,!?;:)]}%”’…")
_GLUE_RIGHT = frozenset("([{“‘$£€¿¡")
_QUOTES = frozenset("\"'")


def _is_word(token: str) -> bool:
    return token[-1].isalnum()


def join_words(tokens: Iterable[str]) -> str:
    """Words with canonical spacing. Never joins two tokens into what would be read as one."""
    text: list[str] = []
    open_quotes: set[str] = set()
    glue, last = True, ""
    for token in tokens:
        left = glue or token in _GLUE_LEFT
        glue = token in _GLUE_RIGHT
        if token in _QUOTES:
            if token in open_quotes:
                open_quotes.remove(token)
                left = True
            elif token == "'" and last and _is_word(last):
                left = True  # an apostrophe: the dogs' home
            else:
                open_quotes.add(token)
                glue = True
        text.append(token if left else " " + token)
        last = token
    return "".join(text)


class Tokenizer:
    """Token ids of texts, and texts of token ids. Made by `train_words`, `train_bpe`, `load` or `read`.

    ``vocab_size`` counts the special tokens; ``eos_id``, ``pad_id``, ``unk_id`` (None where no text becomes the
    unknown token); ``kind`` is "words" or "bpe", or "wordpiece", "wordlevel" or "unigram" if made elsewhere;
    ``losses`` says what a text loses, empty if decode(encode(text)) == text for every text; ``sha256``
    identifies the vocabulary and its rules, ``vocabulary_sha256`` the tokens in the order of their ids alone.
    It can be pickled, for worker processes.
    """

    def __init__(self, model: tokenizers.Tokenizer, *, eos: str = EOS, pad: str = PAD) -> None:
        """Wraps a tokenizer of the `tokenizers` library, with `eos` the end token and `pad` the pad.

        ValueError: either is missing, ids with gaps, random pieces.
        """
        # Passages are cut and filled elsewhere, and are counted there.
        model.no_truncation()
        model.no_padding()
        # what a text spells is text, even where it spells the name of a special token
        model.encode_special_tokens = True
        described = json.loads(model.to_str())
        canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        if described["model"].get("dropout"):
            raise ValueError(
                f"the tokenizer splits words at random (dropout = {described['model']['dropout']}), so that a text "
                'has no certain ids: set "dropout" to null in its file'
            )
        eos_id, pad_id = model.token_to_id(eos), model.token_to_id(pad)
        if eos_id is None or pad_id is None:
            raise ValueError(
                f"the tokenizer has no {eos if eos_id is None else pad} token: every passage ends with {eos} "
                f"and is filled with {pad}; add both to its vocabulary, or train a new one"
            )
        size = model.get_vocab_size()
        tokens = [model.id_to_token(i) for i in range(size)]
        if any(token is None for token in tokens):
            raise ValueError(f"the tokenizer's ids are not 0..{size - 1}: id {tokens.index(None)} is missing")
        if size - 2 < 2:
            raise ValueError(
                f"the vocabulary has {size - 2} token(s) beside {eos} and {pad}: a model has nothing to "
                "choose; give text with at least two different words"
            )
        self._model = model
        self._names = (eos, pad)
        self._tokens: list[str] = [str(token) for token in tokens]
        self._cache: dict[str, list[int]] = {}
        self.kind: str = "words" if _is_ours(described) else _KINDS[described["model"]["type"]]
        self.vocab_size: int = size
        self.eos_id: int = eos_id
        self.pad_id: int = pad_id
        unk = fidelity.unknown_token(model, described)
        self.unk_id: int | None = None if unk is None else model.token_to_id(unk)
        self.cuts_at_spaces: bool = self.kind == "words" or fidelity.cuts_at_spaces(described)
        """Whether parts of a long text, cut before single spaces, have the ids of the whole."""
        if self.kind == "words":
            self.losses: str = "spacing is set by rule"
            self.losses += f"; words outside the vocabulary become {unk}" if unk else ""
        else:
            self.losses = fidelity.losses(model, described, self._names)
        if not self._is_plain:
            canonical = "\0".join((canonical, eos, pad))
        self.sha256: str = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocabulary_sha256: str = hashlib.sha256("\0".join(self._tokens).encode()).hexdigest()

    @property
    def _is_plain(self) -> bool:
        """Whether tokenizer.json alone says all: as with those made here."""
        return self._names == (EOS, PAD) and self.kind in ("words", "bpe")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model.encode_special_tokens = True  # the library does not keep it

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]!r})"

    # ------------------------------------------------------------------------------------------- text and ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, no special token added. ValueError: words outside a vocabulary without [UNK]."""
        if isinstance(texts, str):
            raise ValueError(
                f"encode takes a list of texts, got the one text {texts[:40]!r}: wrap it in a list"
            )
        if self.kind == "words":
            return self._encode_words(texts)
        try:
            return self._encode_all(texts)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"the tokenizer has no token for something in the text ({error}): use the text that it was made "
                "for, or another tokenizer"
            ) from error

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            batch = list(texts[start : start + _CHUNK])
            ids.extend(
                encoding.ids for encoding in self._model.encode_batch_fast(batch, add_special_tokens=False)
            )
        return ids

    def _encode_words(self, texts: Sequence[str]) -> list[list[int]]:
        # Tokens never contain a space, so that each chunk between spaces needs to be read only once; long ones, of
        # scripts without spaces, do not come again.
        cache = self._cache
        if len(cache) > _CACHED:
            cache.clear()
        split = [_chunks(text) for text in texts]
        new = list(dict.fromkeys(chunk for chunks in split for chunk in chunks if chunk not in cache))
        try:
            read = dict(zip(new, self._encode_all(new), strict=True))
        except Exception:  # the library raises nothing narrower
            self._refuse_unknown(new)
            raise
        cache.update((chunk, ids) for chunk, ids in read.items() if len(chunk) <= _OFTEN)
        rows: list[list[int]] = []
        for chunks in split:
            row: list[int] = []
            for chunk in chunks:
                row += cache[chunk] if chunk in cache else read[chunk]
            rows.append(row)
        return rows

    def _refuse_unknown(self, chunks: Iterable[str]) -> None:
        known = set(self._tokens)
        unknown = list(dict.fromkeys(word for word in _words(self._model, chunks) if word not in known))
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise ValueError(
                f"{len(unknown)} word(s) are not in the vocabulary of {self.vocab_size}, which has no {UNK}: "
                f"{shown}; use the text that the tokenizer was made for, or train a tokenizer on this one"
            )

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of `ids` (a list, an array, a tensor) up to the first end token.

        Pads before it, which no encoded text has, are a fault of the model that wrote them: they are shown within the
        text, and are only the filling that they are at its end.

        ValueError: an id outside 0..V-1.
        """
        kept: list[int] = []
        for value in ids.tolist() if hasattr(ids, "tolist") else ids:
            i = int(value)
            if i == self.eos_id:
                break
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} lies outside the vocabulary, 0..{self.vocab_size - 1}")
            kept.append(i)
        while kept and kept[-1] == self.pad_id:
            kept.pop()
        if self.kind == "words":
            return join_words(self._tokens[i] for i in kept)
        return str(self._model.decode(kept, skip_special_tokens=False))

    def decode_all(self, ids: Iterable[Any], begin: str = "") -> list[str]:
        """The texts of `ids` between end tokens, of a row that holds several; nothing for the pads that fill it.

        Nor for the token `begin` that opens it, if rows have one.
        """
        row = self.opened(ids, begin)
        while row and row[-1] == self.pad_id:
            row.pop()
        texts, at = [], 0
        for end in [i for i, token in enumerate(row) if token == self.eos_id] + [len(row)]:
            if end > at:
                texts.append(self.decode(row[at:end]))
            at = end + 1
        return texts

    def id(self, token: str) -> int:
        """The id of a token. ValueError: it is not in the vocabulary."""
        id = self._model.token_to_id(token)
        if id is None:
            raise ValueError(f"the tokenizer has no token {token!r}: name one of its vocabulary")
        return int(id)

    def opened(self, ids: Iterable[Any], begin: str) -> list[int]:
        """`ids` without the token `begin` at their start, if it is there."""
        row = [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        return row[1:] if begin and row and self.token(row[0]) == begin else row

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it. ValueError: an id outside 0..V-1."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} lies outside the vocabulary, 0..{self.vocab_size - 1}")
        return self._tokens[id]

    # ------------------------------------------------------------------------------------------------- files

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json into `folder`, whole or not at all.

        Beside it, tokenizer_config.json names the end token and the pad where they are not [EOS] and [PAD].
        """
        config = Path(folder) / pretrained.CONFIG
        if not self._is_plain:
            write_json(config, {"eos_token": self._names[0], "pad_token": self._names[1]})
        write_data(Path(folder) / FILE, self._model.to_str(pretty=True))
        if self._is_plain:
            config.unlink(missing_ok=True)  # of another tokenizer

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Reads what `save` wrote. ValueError: missing, damaged, or without its end token or pad."""
        path = Path(folder) / FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} does not exist: give the folder of a saved tokenizer or model"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): give the folder of a saved tokenizer"
            ) from error
        config = pretrained.read_config(path.parent)
        eos, pad = (pretrained.named(config, key) for key in ("eos_token", "pad_token"))
        model = pretrained.parse(text, path)
        try:
            tokenizer = cls(model, eos=eos or EOS, pad=pad or PAD)
            if tokenizer.kind == "wordlevel" and not (eos and pad):
                raise ValueError(
                    "the tokenizer's words are not split as here, so that decoding would not fit encoding: "
                    "train one with Tokenizer.train_words, or take it as it is with Tokenizer.read"
                )
            return tokenizer
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def read(cls, path: Path | str, *, eos: str = "", pad: str = "") -> Tokenizer:
        """Reads a tokenizer made elsewhere, from one of these files or a folder that holds it.

        tokenizer.json: of the `tokenizers` library. vocab.txt: WordPiece, with BERT's splitting; whether it
        lower-cases is said by do_lower_case of a tokenizer_config.json beside it, else by the vocabulary,
        which has upper-case letters or not. encoder.json with vocab.bpe, or vocab.json with merges.txt: GPT-2.

        Ids stay as they are. `eos` is the end token: by default the one that tokenizer_config.json names, else
        the first found of [EOS], <|endoftext|>, </s>, [SEP], <eos>. `pad` is found likewise, [PAD], <|pad|> or
        <pad>; where there is none, it becomes the next id.

        ValueError: nothing known there, damaged, no end token.
        """
        found = pretrained.read_model(Path(path))
        names = pretrained.end_and_pad(found, eos, pad)
        try:
            return cls(found.model, eos=names[0], pad=names[1])
        except ValueError as error:
            raise ValueError(f"{found.path}: {error}") from error

    # ---------------------------------------------------------------------------------------------- training

    @classmethod
    def train_words(
        cls,
        texts: Iterable[str],
        *,
        vocab: Sequence[str] | None = None,
        max_vocab: int = 0,
    ) -> Tokenizer:
        """One token per word: those of `vocab`, in its order, or those of `texts`, most frequent first.

        At most `max_vocab` words (0: no limit). [UNK] is added if and only if `texts` has words that are left out.
        ValueError: fewer than two words, a bad `vocab`.
        """
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Model

        if max_vocab < 0:
            raise ValueError(f"max_vocab must be >= 0, got {max_vocab}")
        splitter = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
        model = Model(models.WordLevel({}, unk_token=UNK))
        model.pre_tokenizer = splitter
        chunks: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for text in texts:
            found = _chunks(text)
            chunks.update(chunk for chunk in found if len(chunk) <= _OFTEN)
            counts.update(_words(model, [chunk for chunk in found if len(chunk) > _OFTEN]))
        for chunk, count in chunks.items():
            for word in _words(model, [chunk]):
                counts[word] += count
        if vocab is None:
            ranked = sorted(counts, key=lambda word: (-counts[word], word))
            words = ranked[: max_vocab or None]
        else:
            if max_vocab:
                raise ValueError("give either vocab or max_vocab, not both")
            words = list(vocab)
            if len(set(words)) < len(words):
                twice = next(word for word, count in Counter(words).items() if count > 1)
                raise ValueError(f"the vocabulary lists {twice!r} twice: a word has one id")
            for word in words:
                if word in (EOS, PAD, UNK):
                    raise ValueError(f"{word!r} is a special token, added by itself: leave it out of vocab")
                if list(_words(model, [word])) != [word]:
                    raise ValueError(
                        f"{word!r} is not one word or sign, so that no text would give it: split it"
                    )
        listed = set(words)
        specials = [EOS, PAD] + [UNK] * any(word not in listed for word in counts)
        model.model = models.WordLevel({word: i for i, word in enumerate(specials + words)}, unk_token=UNK)
        model.add_special_tokens(specials)
        return cls(model)

    @classmethod
    def of_characters(cls, alphabet: str) -> Tokenizer:
        """A token for each character of `alphabet`, in its order, then [EOS] and [PAD]; no text may have others."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Model

        model = Model(models.WordLevel({sign: i for i, sign in enumerate(alphabet)}))
        model.pre_tokenizer = pre_tokenizers.Split(Regex(CHARACTER), "isolated")
        model.decoder = decoders.Fuse()
        model.add_special_tokens([EOS, PAD])
        return cls(model)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Byte pair encoding of UTF-8 bytes, `vocab_size` tokens or fewer where the text has no more pairs.

        ValueError: vocab_size below 258, the bytes and the special tokens.
        """
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < MIN_BPE:
            raise ValueError(
                f"vocab_size is {vocab_size}: byte-level pieces need at least {MIN_BPE}, the 256 bytes with "
                f"{EOS} and {PAD}; 1024 to 8192 suits a few megabytes of text"
            )
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        model.train_from_iterator(iter(texts), trainer)
        return cls(model)


def _is_ours(described: dict[str, Any]) -> bool:
    """Whether words are split as `train_words` does, which `join_words` and the reading by chunks rely on."""
    split = {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Removed", "invert": True}
    return (
        described["model"]["type"] == "WordLevel"
        and described["pre_tokenizer"] == split
        and described["normalizer"] is None
    )


def _chunks(text: str) -> list[str]:
    """What stands between spaces of any kind, as the tokenizer knows them: Python counts four more signs."""
    if any(sign in text for sign in _NO_SPACES):
        return re.findall(rf"[\S{_NO_SPACES}]+", text)
    return text.split()


def _words(model: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """The words and signs of texts, as the tokenizer splits them."""
    splitter = model.pre_tokenizer
    assert splitter is not None
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(text):
            yield word
