"""Text to token ids and back: whole words with punctuation, or byte-level pieces.

[EOS] and [PAD] are ordinary tokens of every vocabulary: the flow writes them like any other. They come from
no text; a text that spells "[EOS]" is encoded as what it spells.

    words   a word (with its inner apostrophes and hyphens), a number, or one sign is a token; spacing is not
            kept, decoding sets it by rule, so that encode(decode(ids)) == ids
    bpe     pieces of UTF-8 bytes; decode(encode(text)) == text for every text
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlm.files import write_data

if TYPE_CHECKING:
    import tokenizers

__all__ = ["EOS", "PAD", "UNK", "Tokenizer"]

EOS, PAD, UNK = "[EOS]", "[PAD]", "[UNK]"
FILE = "tokenizer.json"
MIN_BPE = 256 + 2  # every byte, [EOS], [PAD]

# Oniguruma: words, numbers, dashes, and any other sign alone. No alternative matches a space.
_WORD = r"\w+(?:['’\-]\w+|(?<=\d)[.,]\d\w*)*|-{2,}|[^\w\s]"
_CHUNK = 8192  # texts handed to the library at a time: bounds memory
_CACHED = 1 << 20

_GLUE_LEFT = frozenset(".,!?;:)]}%”’…")
_GLUE_RIGHT = frozenset("([{“‘$£€¿¡")
_QUOTES = frozenset("\"'")


def _is_word(token: str) -> bool:
    return token[-1].isalnum()


def _join(tokens: Iterable[str]) -> str:
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
    """Token ids of texts, and texts of token ids. Made by `train_words`, `train_bpe` or `load`.

    ``vocab_size`` counts the special tokens; ``eos_id``, ``pad_id``, ``unk_id`` (None without [UNK]);
    ``kind`` is "words" or "bpe"; ``sha256`` identifies the vocabulary and its rules,
    ``vocabulary_sha256`` the tokens in the order of their ids alone.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        """Wraps a tokenizer of the `tokenizers` library. ValueError: [EOS] or [PAD] missing, other kinds."""
        described = json.loads(model.to_str())
        canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        kinds = {"WordLevel": "words", "BPE": "bpe"}
        found = described["model"].get("type")
        if found not in kinds:
            raise ValueError(f"the tokenizer is a {found} model: only {', '.join(kinds)} are read here")
        eos, pad = model.token_to_id(EOS), model.token_to_id(PAD)
        if eos is None or pad is None:
            raise ValueError(
                f"the tokenizer has no {EOS if eos is None else PAD} token: every passage ends with {EOS} "
                f"and is filled with {PAD}; add both to its vocabulary, or train a new one"
            )
        self._check_lossless(model, kinds[found], described)
        size = model.get_vocab_size()
        tokens = [model.id_to_token(i) for i in range(size)]
        if any(token is None for token in tokens):
            raise ValueError(f"the tokenizer's ids are not 0..{size - 1}: id {tokens.index(None)} is missing")
        if size - 2 < 2:
            raise ValueError(
                f"the vocabulary has {size - 2} token(s) beside {EOS} and {PAD}: a model has nothing to "
                "choose; give text with at least two different words"
            )
        # what a text spells is text, even where it spells the name of a special token
        model.encode_special_tokens = True
        self._model = model
        self._tokens: list[str] = [str(token) for token in tokens]
        self._cache: dict[str, list[int]] = {}
        self.kind: str = kinds[found]
        self.vocab_size: int = size
        self.eos_id: int = eos
        self.pad_id: int = pad
        self.unk_id: int | None = model.token_to_id(UNK) if self.kind == "words" else None
        self.sha256: str = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocabulary_sha256: str = hashlib.sha256("\0".join(self._tokens).encode()).hexdigest()

    @staticmethod
    def _check_lossless(model: tokenizers.Tokenizer, kind: str, described: dict[str, Any]) -> None:
        """A tokenizer made elsewhere may lose text without a word: those are refused."""
        if kind == "words":
            split = described["pre_tokenizer"] or {}
            if split.get("pattern") != {"Regex": _WORD} or described["normalizer"] is not None:
                raise ValueError(
                    "the tokenizer's words are not split as here, so that decoding would not fit encoding: "
                    "train one with Tokenizer.train_words"
                )
            return
        from tokenizers import pre_tokenizers

        missing = [sign for sign in pre_tokenizers.ByteLevel.alphabet() if model.token_to_id(sign) is None]
        if missing:
            raise ValueError(
                f"the tokenizer is not byte-level ({len(missing)} of 256 bytes have no piece), so that some "
                "text could not be written: train one with Tokenizer.train_bpe"
            )

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]!r})"

    # ------------------------------------------------------------------------------------------- text and ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, no special token added. ValueError: words outside a vocabulary without [UNK]."""
        if isinstance(texts, str):
            raise ValueError(
                f"encode takes a list of texts, got the one text {texts[:40]!r}: wrap it in a list"
            )
        return self._encode_words(texts) if self.kind == "words" else self._encode_all(texts)

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            batch = list(texts[start : start + _CHUNK])
            ids.extend(
                encoding.ids for encoding in self._model.encode_batch_fast(batch, add_special_tokens=False)
            )
        return ids

    def _encode_words(self, texts: Sequence[str]) -> list[list[int]]:
        # tokens never contain a space, so that each space-separated chunk needs to be read only once
        cache = self._cache
        if len(cache) > _CACHED:
            cache.clear()
        split = [text.split(" ") for text in texts]
        new = list(dict.fromkeys(chunk for chunks in split for chunk in chunks if chunk not in cache))
        try:
            cache.update(zip(new, self._encode_all(new), strict=True))
        except Exception:  # the library raises nothing narrower
            self._refuse_unknown(new)
            raise
        rows: list[list[int]] = []
        for chunks in split:
            row: list[int] = []
            for chunk in chunks:
                row += cache[chunk]
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
        """The text of `ids` (a list, an array, a tensor) up to the first [EOS].

        A [PAD] before it, which no encoded text has, is shown: it is a fault of the model that wrote it.

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
        if self.kind == "words":
            return _join(self._tokens[i] for i in kept)
        return str(self._model.decode(kept, skip_special_tokens=False))

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it. ValueError: an id outside 0..V-1."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} lies outside the vocabulary, 0..{self.vocab_size - 1}")
        return self._tokens[id]

    # ------------------------------------------------------------------------------------------------- files

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json into `folder`, whole or not at all."""
        write_data(Path(folder) / FILE, self._model.to_str(pretty=True))

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Reads `folder`/tokenizer.json. ValueError: missing, damaged, or without [EOS] or [PAD]."""
        from tokenizers import Tokenizer as Model

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
        try:
            model = Model.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is damaged or no tokenizer file ({error}): save it again") from error
        try:
            return cls(model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

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
        for text in texts:
            chunks.update(text.split(" "))
        counts: Counter[str] = Counter()
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


def _words(model: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """The words and signs of texts, as the tokenizer splits them."""
    splitter = model.pre_tokenizer
    assert splitter is not None
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(text):
            yield word
