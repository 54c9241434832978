"""Ids and texts of a library that is no part of flowlm: transformers' tokenizers of the same files.

The references of `tests/references.py` are written from descriptions; these are what others load.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flowlm.data.tokens import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed: it comes with .[dev]")

DATA = Path(os.environ.get("FLOWLM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXTS = ("news.txt", "wiki.valid.raw", "tinystories.txt")
LINES = 1000  # of each text

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
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here: real files are used where they lie beside the project")
    return path


@pytest.fixture(scope="module")
def bert() -> tuple[Tokenizer, Any]:
    folder = _real("bert-base-uncased")
    return Tokenizer.read(folder), transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))


@pytest.fixture(scope="module")
def gpt2() -> tuple[Tokenizer, Any]:
    folder = _real("gpt2")
    files = {"vocab": str(folder / "encoder.json"), "merges": str(folder / "vocab.bpe")}
    return Tokenizer.read(folder), transformers.GPT2TokenizerFast(**files)


def _texts(name: str) -> list[str]:
    return ODD if name == "odd" else _real(name).read_text(encoding="utf-8").split("\n")[:LINES]


def _ids(theirs: Any, texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in theirs(texts, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("name", ["odd", *TEXTS])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_ids_are_those_of_transformers(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(kind)
    texts = _texts(name)
    assert ours.encode(texts) == _ids(theirs, texts)


@pytest.mark.parametrize("name", ["odd", *TEXTS])
def test_gpt2_text_is_that_of_transformers(gpt2: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = gpt2
    for ids in ours.encode(_texts(name)):
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_a_saved_tokenizer_is_read_by_transformers(
    bert: tuple[Tokenizer, Any], gpt2: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    for name, (ours, _) in {"bert": bert, "gpt2": gpt2}.items():
        ours.save(tmp_path / name)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / name / "tokenizer.json"))
        assert _ids(theirs, ODD) == ours.encode(ODD)
        assert len(theirs) == ours.vocab_size
