"""Ids and texts of a library that is no part of flowlm: transformers' tokenizers of the same files.

The references of `tests/references.py` are written from descriptions; these are what others load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowlm.data.tokens import Tokenizer
from helpers import REAL
from references import byte_signs

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: it comes with .[dev]"
)

TEXTS = ("news.txt", "wiki.valid.raw", "tinystories.txt")
LINES = 1000  # of each text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# Sentences as people write them, and what they do not: other scripts, odd spaces, signs of several bytes, long words.
ODD = [
    "The café's naïve owner paid $3.50 (twice!) for crème brûlée…",
    "It's we'll they've I'm  don't 'S x's 1,000.25 --- _a_ ^b^",
    " two  leading and trailing spaces  ",
    "tab\tnew\nline\r\nand\u00a0no-break \u3000wide",
    "北京 is 東京 not ソウル; σίσυφος ΣΊΣΥΦΟΣ Straße İstanbul",
    "e\u0301 combined, zero\u200bwidth, soft\u00adhyphen, 👩\u200d👩\u200d👧 emoji",
    "a" * 99 + " " + "b" * 101,
    "",
]


def _real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{name} is not here: real files are used where they lie beside the project")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A WordPiece vocabulary and a pair of GPT-2's kind, of a few pieces that the texts above are made of."""
    bert, gpt2 = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("gpt2")
    words = [
        "the",
        "cafe",
        "owner",
        "paid",
        "bru",
        "tab",
        "new",
        "line",
        "is",
        "we",
        "'",
        "’",
        "北",
        "京",
        "σ",
    ]
    pieces = [*SPECIAL, *words, *"abcdefghilmnorstu.,!?$01235", *(f"##{sign}" for sign in "abelnoσς")]
    (bert / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("Ã", "©"),
        ("'", "s"),
        ("Ġ", "Ġ"),
        ("0", "0"),
        ("a", "a"),
    ]
    signs = {piece: id for id, piece in enumerate([*byte_signs(), *map("".join, merges), "<|endoftext|>"])}
    (gpt2 / "encoder.json").write_text(json.dumps(signs), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (gpt2 / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"small bert": bert, "small gpt2": gpt2}


def _both(name: str, small: dict[str, Path]) -> tuple[Tokenizer, Any]:
    """Our tokenizer and theirs, of the same files."""
    folder = small.get(name) or _real(name)
    if "bert" in name:
        return Tokenizer.read(folder), transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    files = {"vocab": str(folder / "encoder.json"), "merges": str(folder / "vocab.bpe")}
    return Tokenizer.read(folder), transformers.GPT2TokenizerFast(**files)


@pytest.fixture(scope="module", params=["small bert", "small gpt2", "bert-base-uncased", "gpt2"])
def both(request: pytest.FixtureRequest, small: dict[str, Path]) -> tuple[Tokenizer, Any]:
    return _both(request.param, small)


@pytest.fixture(scope="module", params=["small gpt2", "gpt2"])
def byte_level(request: pytest.FixtureRequest, small: dict[str, Path]) -> tuple[Tokenizer, Any]:
    return _both(request.param, small)


def _texts(name: str) -> list[str]:
    return ODD if name == "odd" else _real(name).read_text(encoding="utf-8").split("\n")[:LINES]


def _ids(theirs: Any, texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in theirs(texts, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("name", ["odd", *TEXTS])
def test_ids_are_those_of_transformers(both: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = both
    texts = _texts(name)
    assert ours.encode(texts) == _ids(theirs, texts)


@pytest.mark.parametrize("name", ["odd", *TEXTS])
def test_byte_level_text_is_that_of_transformers(byte_level: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = byte_level
    for ids in ours.encode(_texts(name)):
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_a_saved_tokenizer_is_read_by_transformers(both: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, _ = both
    ours.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert _ids(theirs, ODD) == ours.encode(ODD)
    assert len(theirs) == ours.vocab_size
