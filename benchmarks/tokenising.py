"""`Tokenizer.encode` against the `tokenizers` library it stands on, on stories of the grammar."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import tokenizers
from measure import Row, compare

from flowlm.data.grammar import Grammar
from flowlm.data.tokens import Tokenizer


def measure(quick: bool, say: Callable[[str], None]) -> list[Row]:
    """A row for each way to encode, for words and for byte-level pieces.

    Raises:
        RuntimeError: two ways give different ids.
    """
    num, repeats = (200, 2) if quick else (20_000, 7)
    grammar = Grammar()
    texts = grammar.sample(num, seed=0)
    made = {
        "words": Tokenizer.train_words((), vocab=grammar.vocabulary),
        "bpe": Tokenizer.train_bpe(texts[:2000], vocab_size=300 if quick else 1024),
    }
    rows: list[Row] = []
    for kind, tokenizer in made.items():
        say(f"tokenising: {num:,} stories, {kind}")
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            # A tokenizer remembers the words it has met: each run has one that has met none.
            fresh = iter([Tokenizer.load(folder) for _ in range(repeats + 2)])
            plain = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        plain.encode_special_tokens = True
        arms = encoders(fresh.__next__, plain, texts)
        ids = [encode() for encode in arms.values()]
        if any(other != ids[0] for other in ids[1:]):
            raise RuntimeError(f"the ways to encode {kind} do not agree: they cannot be compared")
        for row in compare(arms, repeats):
            size = {"tokenizer": kind, "vocab": tokenizer.vocab_size, "texts": num}
            rows.append(size | {"texts_per_second": num / row["median"]} | row)
    return rows


def encoders(
    tokenizer: Callable[[], Tokenizer], plain: tokenizers.Tokenizer, texts: list[str]
) -> dict[str, Callable[[], list[list[int]]]]:
    """Three ways to the same ids; the library's plain loop is what the others are divided by."""

    def one_at_a_time() -> list[list[int]]:
        return [plain.encode(text, add_special_tokens=False).ids for text in texts]

    def batch() -> list[list[int]]:
        return [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]

    def package() -> list[list[int]]:
        return tokenizer().encode(texts)

    return {
        "tokenizers, one at a time": one_at_a_time,
        "tokenizers, encode_batch": batch,
        "flowlm, Tokenizer.encode": package,
    }
