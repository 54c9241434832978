"""BERT's and GPT-2's tokenizers in plain Python, written from their descriptions: what the library has to agree with.

Slow and short. Neither knows special tokens: a text is text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

# ------------------------------------------------------------------------------------------------------ WordPiece

_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_ideograph(sign: str) -> bool:
    return any(low <= ord(sign) <= high for low, high in _IDEOGRAPHS)


def _is_punctuation(sign: str) -> bool:
    # all ASCII that is no letter, digit, space or control counts, such as $ and ^
    return ("!" <= sign <= "~" and not sign.isalnum()) or unicodedata.category(sign).startswith("P")


def _clean(text: str) -> Iterator[str]:
    for sign in text:
        if sign in "\t\n\r" or unicodedata.category(sign) == "Zs":
            yield " "
        elif sign not in "\0\ufffd" and not unicodedata.category(sign).startswith("C"):
            yield f" {sign} " if _is_ideograph(sign) else sign


def bert_words(text: str, lower: bool = True) -> list[str]:
    """The basic tokenizer: words and signs, lower-cased and without accents if `lower`."""
    words: list[str] = []
    for word in "".join(_clean(text)).split():
        if lower:
            # Sign by sign, so that a sigma stays σ at the end of a word too.
            word = "".join(sign.lower() for sign in word)
            word = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
        start = 0
        for i, sign in enumerate(word):
            if _is_punctuation(sign):
                words += [word[start:i], sign]
                start = i + 1
        words.append(word[start:])
    return [word for word in words if word]


def wordpiece(text: str, vocab: Mapping[str, int], lower: bool = True, unk: str = "[UNK]") -> list[int]:
    """Ids by the longest piece that matches, from the left; a word that does not come out even is unknown."""
    ids: list[int] = []
    for word in bert_words(text, lower):
        pieces: list[int] = []
        start = 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            fits = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocab)
            end = next(fits, None)
            if end is None:
                break
            pieces.append(vocab[prefix + word[start:end]])
            start = end
        ids += pieces if start == len(word) else [vocab[unk]]
    return ids


# ---------------------------------------------------------------------------------------------------------- GPT-2

# White space by Unicode; str.isspace has four controls more.
_SPACE = frozenset("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(i) for i in range(0x2000, 0x200B)
}
_ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_signs() -> list[str]:
    """The sign that stands for each byte: itself where it prints, else the next one from U+0100."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte if byte in printing else 0x100 + others.index(byte)) for byte in range(256)]


_SIGNS = byte_signs()


def _class(sign: str) -> str:
    if sign in _SPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(sign)[0], "other")


def gpt2_words(text: str) -> Iterator[str]:
    """GPT-2's splitting: 's|'t|'re|'ve|'m|'ll|'d| ?letters| ?numbers| ?others|spaces not before a word|spaces."""
    at = 0

    def run(start: int) -> int:
        end = start
        while end < len(text) and _class(text[end]) == _class(text[start]):
            end += 1
        return end

    while at < len(text):
        ending = next((e for e in _ENDINGS if text.startswith(e, at)), None)
        if ending:
            end = at + len(ending)
        elif text[at] == " " and at + 1 < len(text) and text[at + 1] not in _SPACE:
            end = run(at + 1)
        else:
            end = run(at)
            if text[at] in _SPACE and end < len(text) and end - at > 1:
                end -= 1  # the last space is left to the word after it
        yield text[at:end]
        at = end


class Gpt2:
    """Byte pair encoding as GPT-2 does it.

    Args:
        vocab: ids of the pieces.
        merges: pairs of pieces, the first joined first.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self.vocab = vocab
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return [id for word in gpt2_words(text) for id in self._word(word)]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = {id: piece for piece, id in self.vocab.items()}
        return bytes(_SIGNS.index(sign) for id in ids for sign in pieces[id]).decode()

    def _word(self, word: str) -> list[int]:
        if word not in self.known:
            pieces = [_SIGNS[byte] for byte in word.encode()]
            while True:
                pairs = [pair for pair in pairwise(pieces) if pair in self.ranks]
                if not pairs:
                    break
                pieces = self._join(pieces, min(pairs, key=self.ranks.__getitem__))
            self.known[word] = [self.vocab[piece] for piece in pieces]
        return self.known[word]

    @staticmethod
    def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
        joined: list[str] = []
        i = 0
        while i < len(pieces):
            both = tuple(pieces[i : i + 2]) == pair
            joined.append("".join(pair) if both else pieces[i])
            i += 2 if both else 1
        return joined
