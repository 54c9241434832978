"""Tokenizers: what is encoded can be decoded, nothing is dropped silently, files come back the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Model
from tokenizers import models, pre_tokenizers

from flowlm.data.grammar import Grammar, tokenize
from flowlm.data.tokens import EOS, PAD, UNK, Tokenizer
from helpers import REAL

STORY = (
    "Anna's well-known dog (Rex) ran 1,600.5 miles -- \"far!\" said Tom; 'no,' she said. "
    "The dogs' home: $5, 3% off…"
)
SIGNS = [
    "a",
    "b2",
    "7",
    "don't",
    "x-y",
    "3.14",
    ",",
    ".",
    "!",
    "?",
    '"',
    "'",
    "’",
    "“",
    "”",
    "-",
    "--",
    "(",
    ")",
]
SIGNS += ["$", "%", "…", ":", "é", "[", "]", "EOS", "_", "@", "名", "🙂"]

WORDS = Tokenizer.train_words([STORY, "Anna and the others too"])
BPE = Tokenizer.train_bpe(["the cat sat on the mat, the cat sat", "naïve café 名前 " * 3], vocab_size=300)
SIGNED = Tokenizer.train_words((), vocab=SIGNS)


@pytest.fixture(scope="module")
def stories() -> str:
    path = REAL / "tinystories.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: real text is used where it lies beside the project")
    return path.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- words


def test_words_and_signs_are_tokens() -> None:
    ids = WORDS.encode(["Anna's dog ran 1,600.5 miles, well-known."])[0]
    assert [WORDS.token(i) for i in ids] == [
        "Anna's",
        "dog",
        "ran",
        "1,600.5",
        "miles",
        ",",
        "well-known",
        ".",
    ]
    assert WORDS.kind == "words"
    assert WORDS.unk_id is None


def test_signs_are_attached_back() -> None:
    assert WORDS.decode(WORDS.encode([STORY])[0]) == STORY


def test_grammar_texts_come_back_exactly() -> None:
    grammar = Grammar()
    tokenizer = Tokenizer.train_words((), vocab=grammar.vocabulary)
    texts = grammar.sample(2000, 1)
    ids = tokenizer.encode(texts)
    assert tokenizer.vocab_size == len(grammar.vocabulary) + 2
    assert [tokenizer.decode(row) for row in ids] == texts
    assert [[tokenizer.token(i) for i in row] for row in ids] == [tokenize(text) for text in texts]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SIGNS), max_size=12))
def test_decoded_words_are_read_as_the_same_tokens(words: list[str]) -> None:
    ids = [2 + SIGNS.index(word) for word in words]
    assert SIGNED.encode([SIGNED.decode(ids)]) == [ids]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_sign_of_a_text_is_lost(text: str) -> None:
    tokenizer = Tokenizer.train_words([text, "two words"])
    decoded = tokenizer.decode(tokenizer.encode([text])[0])
    assert "".join(decoded.split()) == "".join(text.split())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet=" \n\t.,'-12ab\u00e9\u3000\x1c", max_size=90), max_size=4))
def test_reading_by_chunks_equals_reading_whole(texts: list[str]) -> None:
    tokenizer = Tokenizer.train_words([*texts, "two words"])
    model = Model.from_str(tokenizer._model.to_str())
    assert tokenizer.encode(texts) == [model.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("between", ["\t", "\u3001", "\u00a0"])
def test_words_that_no_space_parts_take_no_memory_of_their_own(between: str) -> None:
    """Lines that differ are not kept, as words are: five words are five, whatever stands between them."""

    def lines(count: int) -> Iterator[str]:
        draw = random.Random(0)
        return (
            between.join(draw.choices(["one", "two", "three", "four", "five"], k=20)) for _ in range(count)
        )

    tokenizer = Tokenizer.train_words(lines(10))

    def added(count: int) -> int:
        tracemalloc.start()
        Tokenizer.train_words(lines(count))
        drawn = lines(count)
        while some := list(itertools.islice(drawn, 100)):
            tokenizer.encode(some)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # As counts of lines the second is nearly a megabyte more, as ids of lines some four.
    assert added(8000) < added(2000) + 100_000


def test_most_frequent_words_come_first() -> None:
    tokenizer = Tokenizer.train_words(["b b b c c a a d"])
    assert [tokenizer.token(i) for i in range(tokenizer.vocab_size)] == [EOS, PAD, "b", "a", "c", "d"]


def test_words_left_out_become_unk() -> None:
    tokenizer = Tokenizer.train_words(["b b b a a c"], max_vocab=2)
    assert tokenizer.vocab_size == 5
    assert tokenizer.unk_id == 2
    assert tokenizer.token(2) == UNK
    assert tokenizer.decode(tokenizer.encode(["a c b zebra"])[0]) == "a [UNK] b [UNK]"


def test_no_unk_where_the_limit_leaves_nothing_out() -> None:
    assert Tokenizer.train_words(["b b a"], max_vocab=2).unk_id is None
    assert Tokenizer.train_words(["b a"], vocab=["a", "b"]).unk_id is None
    assert Tokenizer.train_words(["b a c"], vocab=["a", "b"]).unk_id == 2


def test_unknown_words_without_unk_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 word\(s\) are not in the vocabulary .*'zebra', 'Mars'"):
        WORDS.encode(["Anna ran", "zebra ran zebra Mars"])
    assert WORDS.encode(["Tom ran"])  # and the tokenizer is as before


@pytest.mark.parametrize(
    ("vocab", "reason"),
    [
        (["a", "New York"], "'New York' is not one word"),
        (["a", ""], "'' is not one word"),
        (["a", "b", "a"], "lists 'a' twice"),
        (["a", EOS], "special token"),
        (["a"], r"1 token\(s\) beside"),
        ([], r"0 token\(s\) beside"),
    ],
)
def test_bad_vocabularies(vocab: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tokenizer.train_words((), vocab=vocab)


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match="got -1"):
        Tokenizer.train_words(["a b"], max_vocab=-1)
    with pytest.raises(ValueError, match="not both"):
        Tokenizer.train_words(["a b"], vocab=["a", "b"], max_vocab=1)


def test_one_word_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="at least two different words"):
        Tokenizer.train_words(["a a", "a"])


# --------------------------------------------------------------------------------------------------------- bpe


@settings(max_examples=400, deadline=None)
@given(st.text() | st.sampled_from(["[EOS]", "a[PAD] ", " \n\r\x00", "\ufeff\u200d", "e\u0301", "</s>Ġ"]))
def test_any_text_comes_back_exactly(text: str) -> None:
    assert BPE.decode(BPE.encode([text])[0]) == text


def test_bpe_is_deterministic() -> None:
    texts = ["the cat sat on the mat", "a dog ran after the cat"] * 5
    one, two = (Tokenizer.train_bpe(texts, vocab_size=290) for _ in range(2))
    assert one.sha256 == two.sha256
    assert one.encode(texts) == two.encode(texts)
    assert (one.kind, one.unk_id) == ("bpe", None)


@pytest.mark.parametrize("size", [0, 257])
def test_bpe_needs_all_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size is {size}: .* at least 258"):
        Tokenizer.train_bpe(["a b"], vocab_size=size)
    assert Tokenizer.train_bpe(["a b"], vocab_size=258).vocab_size == 258


def test_bpe_on_real_text(stories: str) -> None:
    paragraphs = stories.split("\n\n")[:4000]
    tokenizer = Tokenizer.train_bpe(paragraphs, vocab_size=2048)
    ids = tokenizer.encode(paragraphs)
    assert tokenizer.vocab_size == 2048
    assert [tokenizer.decode(row) for row in ids] == paragraphs
    assert np.mean([len(row) for row in ids]) < 0.3 * np.mean([len(text) for text in paragraphs])


def test_words_on_real_text(stories: str) -> None:
    paragraphs = [" ".join(text.split()) for text in stories.split("\n\n")[:4000]]
    tokenizer = Tokenizer.train_words(paragraphs)
    ids = tokenizer.encode(paragraphs)
    decoded = [tokenizer.decode(row) for row in ids]
    assert tokenizer.encode(decoded) == ids
    assert np.mean([a == b for a, b in zip(decoded, paragraphs)]) > 0.95


# ------------------------------------------------------------------------------------------------------- both

BOTH = pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])


@BOTH
def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["the dog" if tokenizer is BPE else "Anna ran"])[0]
    e, p = tokenizer.eos_id, tokenizer.pad_id
    text = tokenizer.decode(ids)
    assert e not in ids
    assert tokenizer.decode([*ids, e, p, p]) == text
    assert tokenizer.decode([*ids, e, *ids]) == text
    misplaced = tokenizer.decode([*ids[:1], p, *ids[1:], e])
    assert misplaced.replace(PAD, "").replace(" ", "") == text.replace(" ", "") != misplaced.replace(" ", "")
    assert tokenizer.decode([]) == tokenizer.decode([e, *ids]) == ""
    assert tokenizer.decode(np.array([*ids, e], np.uint16)) == text
    assert tokenizer.decode(torch.tensor([*ids, e])) == text
    assert (tokenizer.token(e), tokenizer.token(p)) == (EOS, PAD)


@BOTH
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"id {bad} lies outside"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match=rf"id {bad} lies outside"):
            tokenizer.token(bad)


@BOTH
def test_encode_takes_a_list(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([]) == []
    assert tokenizer.encode([""]) == [[]]
    with pytest.raises(ValueError, match="wrap it in a list"):
        tokenizer.encode("Anna ran")


@BOTH
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    tokenizer.save(tmp_path / "new")
    again = Tokenizer.load(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    assert (again.sha256, again.kind, again.vocab_size) == (
        tokenizer.sha256,
        tokenizer.kind,
        tokenizer.vocab_size,
    )
    text = "Anna ran: the dogs' home" if tokenizer is WORDS else "the [EOS] naïve cat"
    assert again.encode([text]) == tokenizer.encode([text])
    assert again.decode(again.encode([text])[0]) == text


@BOTH
def test_hashes_are_those_of_the_saved_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They are kept in saved models and runs: however a tokenizer is read, they must stay the same."""
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert tokenizer.sha256 == hashlib.sha256(canonical.encode()).hexdigest()
    ranked = sorted(described["model"]["vocab"], key=described["model"]["vocab"].__getitem__)
    assert tokenizer.vocabulary_sha256 == hashlib.sha256("\0".join(ranked).encode()).hexdigest()


@BOTH
def test_a_pickled_tokenizer_is_the_same(tokenizer: Tokenizer) -> None:
    text = "Anna ran: the dogs' home" if tokenizer is WORDS else "the [EOS] [PAD] naïve cat"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode([text]) == tokenizer.encode([text])
    assert again.decode(again.encode([text])[0]) == text
    assert (again.sha256, again.kind, again.losses) == (tokenizer.sha256, tokenizer.kind, tokenizer.losses)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BPE.save(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        WORDS.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path).sha256 == BPE.sha256


def test_different_vocabularies_have_different_hashes() -> None:
    assert len({t.sha256 for t in (WORDS, BPE, SIGNED)}) == 3


def _write(folder: Path, model: Model) -> Path:
    (folder / "tokenizer.json").write_text(model.to_str(), encoding="utf-8")
    return folder


def test_load_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist: give the folder"):
        Tokenizer.load(tmp_path)


def test_load_damaged(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:-100], encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        Tokenizer.load(tmp_path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        Tokenizer.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", [EOS, PAD])
def test_load_without_special_tokens(tmp_path: Path, name: str) -> None:
    described = json.loads(WORDS._model.to_str())
    described["model"]["vocab"] = {
        ("word" if word == name else word): i for word, i in described["model"]["vocab"].items()
    }
    described["added_tokens"] = []
    model = Model.from_str(json.dumps(described))
    with pytest.raises(ValueError, match=rf"tokenizer.json: the tokenizer has no \{name[:-1]}\] token"):
        Tokenizer.load(_write(tmp_path, model))


def test_load_of_tokenizers_that_lose_text(tmp_path: Path) -> None:
    vocab = {EOS: 0, PAD: 1, "a": 2, "b": 3}
    assert "are dropped" in Tokenizer.load(_write(tmp_path, Model(models.BPE(vocab, [])))).losses
    model = Model(models.WordLevel(vocab, unk_token=UNK))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"not split as here.*or take it as it is with Tokenizer.read"):
        Tokenizer.load(_write(tmp_path, model))
    Tokenizer.read(tmp_path).save(tmp_path)
    assert Tokenizer.load(tmp_path).kind == "wordlevel"


def test_load_with_gaps_in_the_ids(tmp_path: Path) -> None:
    described = json.loads(WORDS._model.to_str())
    described["model"]["vocab"]["late"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ValueError, match=r"ids are not 0\.\."):
        Tokenizer.load(tmp_path)


def test_the_library_is_imported_where_it_is_used() -> None:
    code = "import sys, flowlm, flowlm.data; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_texts_of_a_row() -> None:
    tokenizer = Tokenizer.train_words(["a b c"])
    (ids,) = tokenizer.encode(["a b c"])
    a, b, c = ids
    end, pad = tokenizer.eos_id, tokenizer.pad_id
    assert tokenizer.decode_all([b, c, end, a, end, end, c]) == ["b c", "a", "c"]
    assert tokenizer.decode_all(np.array([a, end, pad, pad])) == ["a"]
    assert tokenizer.decode_all([a, pad, b, end]) == [
        "a [PAD] b"
    ]  # a fault of the model that wrote it is shown
    assert tokenizer.decode_all([a, pad, pad, end, b, pad]) == ["a", "b"]  # only filling
    assert tokenizer.decode_all([end, pad]) == tokenizer.decode_all([]) == []
