"""Corpora: every token of the source is accounted for, sides never share a passage, errors say what to do."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowlm.data.corpora import Corpus, DataConfig, load_corpus
from flowlm.data.grammar import Grammar
from flowlm.data.tokens import Tokenizer
from helpers import REAL

LINES = [
    f"the {a} {b} saw {c}." for a in ("big", "old", "sad") for b in ("cat", "dog") for c in ("a", "me", "us")
]
TINY = Tokenizer.train_words(LINES)
LETTERS = Tokenizer.train_words(["a b c d e f"])
SMALL = DataConfig(num=300, held_out=20)


def _file(folder: Path, text: str | bytes) -> str:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def _text(path: str, **fields: Any) -> DataConfig:
    return DataConfig(corpus="text", path=path, **fields)


def _decoded(corpus: Corpus) -> tuple[list[str], list[str]]:
    decode = corpus.tokenizer.decode
    return [decode(row) for row in corpus.train], [decode(row) for row in corpus.held_out]


def _check_form(rows: np.ndarray, tokenizer: Tokenizer) -> None:
    """ids, one [EOS], then [PAD] only."""
    eos = rows == tokenizer.eos_id
    assert (eos.sum(axis=1) == 1).all()
    at = np.arange(rows.shape[1])[None]
    end = eos.argmax(axis=1)[:, None]
    assert ((rows == tokenizer.pad_id) == (at > end)).all()


# ------------------------------------------------------------------------------------------------ the grammar


def test_grammar() -> None:
    corpus = load_corpus(SMALL, 64)
    grammar = Grammar()
    train, held_out = _decoded(corpus)
    assert train == grammar.sample(300, 0)
    assert all(grammar.judge(text).valid for text in held_out)
    assert len(held_out) == 20
    assert not set(train) & set(held_out)
    assert corpus.tokenizer.vocab_size == len(grammar.vocabulary) + 2
    assert corpus.train.shape == (300, 64)
    assert corpus.meta["law_sha256"] == grammar.hash
    assert corpus.meta["entropy"] == grammar.entropy
    assert corpus.meta["bytes"] == sum(len(text) for text in train)
    _check_form(corpus.train, corpus.tokenizer)
    _check_form(corpus.held_out, corpus.tokenizer)


def test_grammar_seeds() -> None:
    one, two = (load_corpus(SMALL, 64) for _ in range(2))
    np.testing.assert_array_equal(one.train, two.train)
    np.testing.assert_array_equal(one.held_out, two.held_out)
    other = load_corpus(dataclasses.replace(SMALL, seed=1), 64)
    assert (other.train != one.train).any()
    assert (other.held_out != one.held_out).any()
    more = load_corpus(dataclasses.replace(SMALL, num=400), 64)
    np.testing.assert_array_equal(more.train[:300], one.train)


def test_grammar_in_pieces() -> None:
    corpus = load_corpus(dataclasses.replace(SMALL, tokenizer="bpe", vocab_size=400), 160)
    assert _decoded(corpus)[0] == Grammar().sample(300, 0)
    with pytest.raises(ValueError, match=r"length is 8: the stories have up to \d+ .* give at least \d+"):
        load_corpus(SMALL, 8, tokenizer=corpus.tokenizer)


def test_grammar_with_a_given_tokenizer() -> None:
    given_one = load_corpus(SMALL, 64).tokenizer
    assert load_corpus(SMALL, 64, tokenizer=given_one).tokenizer is given_one
    with pytest.raises(ValueError, match=r"not in the vocabulary of \d+"):
        load_corpus(SMALL, 64, tokenizer=TINY)


def test_grammar_is_never_cut() -> None:
    with pytest.raises(ValueError, match=r"length is 63: .* up to 63 tokens .* give at least 64"):
        load_corpus(SMALL, 63)


# ------------------------------------------------------------------------------------------------- text files


def test_the_grammar_has_tokens_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[SEP]\n")
    with pytest.raises(
        ValueError, match=r"data\.tokenizer = .*vocab\.txt': the grammar .* use 'words' or 'bpe'"
    ):
        DataConfig(tokenizer=str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "vocab_size": 280}], ids=["words", "bpe"])
def test_lines(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    path = _file(tmp_path, "\ufeff" + "\r\n\r\n".join(f"  {line} " for line in LINES))
    corpus = load_corpus(_text(path, held_out=3, **tokenizer), 40)
    train, held_out = _decoded(corpus)
    assert (len(train), len(held_out)) == (17, 1)  # a tenth of 18, at least one
    assert sorted(train + held_out) == sorted(LINES)
    assert [line for line in LINES if line in train] == train  # in the order of the file
    for rows in (corpus.train, corpus.held_out):
        _check_form(rows, corpus.tokenizer)


def test_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{a}\n{b}" for a, b in zip(LINES[::2], LINES[1::2])]
    path = _file(tmp_path, "\n \n".join(paragraphs) + "\n\n\n")
    corpus = load_corpus(_text(path, unit="paragraph", tokenizer="bpe", vocab_size=300), 64)
    train, held_out = _decoded(corpus)
    assert sorted(train + held_out) == sorted(paragraphs)


@pytest.mark.parametrize("length", [2, 7, 10, 1000])
def test_wrap_keeps_every_token(tmp_path: Path, length: int) -> None:
    path = _file(tmp_path, "\n".join(LINES))
    corpus = load_corpus(_text(path, rows="wrap"), length)
    tokenizer = corpus.tokenizer
    lines = []
    for rows in (corpus.train, corpus.held_out):
        stream = rows.reshape(-1)
        used = stream[stream != tokenizer.pad_id]
        assert (stream[: len(used)] == used).all()  # [PAD] only at the very end
        assert len(stream) - len(used) < length
        assert used[-1] == tokenizer.eos_id
        cuts = np.flatnonzero(used == tokenizer.eos_id) + 1
        lines += [tokenizer.decode(part) for part in np.split(used, cuts)[:-1]]
    assert sorted(lines) == sorted(LINES)


def test_copies_fall_on_one_side(tmp_path: Path) -> None:
    lines = LINES * 3 + ["the cat"] * 40 + [f"the dog saw {n}" for n in range(100)]
    corpus = load_corpus(_text(_file(tmp_path, "\n".join(lines))), 12)
    train, held_out = _decoded(corpus)
    assert not set(train) & set(held_out)
    assert Counter(train + held_out) == Counter(lines)
    assert corpus.meta["passages"] == len(lines) == 194
    assert corpus.meta["duplicates"] == 18 * 2 + 39
    assert len(held_out) == 19
    assert "the cat" in train  # too many copies to be held out


def test_the_split_depends_on_the_passages_only(tmp_path: Path) -> None:
    lines = [f"the {n} cats" for n in range(200)]
    path = _file(tmp_path, "\n".join(lines))
    held = [
        _decoded(load_corpus(_text(path, seed=seed, held_out=n), 8))[1]
        for seed, n in [(0, 10), (1, 10), (0, 5)]
    ]
    assert held[0] == held[1]
    assert len(held[0]) == 10
    assert set(held[2]) < set(held[0])
    shuffled = _file(tmp_path, "\n".join(reversed(lines)))
    assert _decoded(load_corpus(_text(shuffled, held_out=10), 8))[1] == held[0][::-1]


def test_all_passages_have_copies(tmp_path: Path) -> None:
    corpus = load_corpus(_text(_file(tmp_path, "a b\n" * 5 + "b c\n" * 3)), 4)
    assert (corpus.train.shape, corpus.held_out.shape) == ((5, 4), (3, 4))


# ------------------------------------------------------------------------------------------ too long for L


def test_cut_is_said(tmp_path: Path) -> None:
    path = _file(tmp_path, "\n".join([*LINES[:9], "a b c d e f g h", "a b c d e f g"]))
    said: list[str] = []
    corpus = load_corpus(_text(path), 7, report=said.append)
    assert corpus.meta["cut"] == 2
    assert corpus.meta["cut_tokens"] == 3
    assert corpus.meta["split"] == 0
    assert corpus.meta["max_tokens"] == 8
    assert any("2 of 11 passages are longer than 6 tokens and [EOS]: cut, 4." in line for line in said)
    train, held_out = _decoded(corpus)
    assert len(train + held_out) == 11
    assert sorted(train + held_out)[:2] == ["a b c d e f", "a b c d e f"]
    _check_form(corpus.train, corpus.tokenizer)


def test_split_is_said(tmp_path: Path) -> None:
    path = _file(tmp_path, "\n".join([*LINES[:9], "a b c d e f g h", "a b c d e f g h i j k l"]))
    said: list[str] = []
    corpus = load_corpus(_text(path, rows="split"), 7, report=said.append)
    assert corpus.meta["split"] == 2
    assert corpus.meta["cut"] == corpus.meta["cut_tokens"] == 0
    assert any(
        "2 of 11 passages are longer than 6 tokens and [EOS]: split into rows" in line for line in said
    )
    train, held_out = _decoded(corpus)
    assert len(train + held_out) == 13
    assert {"a b c d e f", "g h", "g h i j k l"} <= set(train + held_out)
    _check_form(corpus.train, corpus.tokenizer)


def test_nothing_too_long(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = load_corpus(_text(_file(tmp_path, "\n".join(LINES))), 7, report=said.append)
    assert corpus.meta["cut"] == corpus.meta["split"] == 0
    assert not any("longer" in line for line in said)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), min_size=2, max_size=8),
    st.integers(2, 9),
    st.sampled_from(["cut", "split", "drop"]),
)
def test_rows_against_the_plain_loop(passages: list[list[str]], length: int, rows: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [" ".join(words) for words in passages]
        assume(len(set(lines)) > 1)
        path = _file(Path(folder), "\n".join(lines))
        try:
            corpus = load_corpus(_text(path, rows=rows), length, tokenizer=LETTERS)
        except ValueError as error:
            assert "nothing is left" in str(error) or "and nothing else" in str(error)  # noqa: PT017
            return
    room = length - 1
    expected = []
    for words in passages:
        pieces = [words[a : a + room] for a in range(0, len(words), room)]
        kept = {"cut": pieces[:1], "split": pieces, "drop": pieces if len(pieces) == 1 else []}[rows]
        ids = [LETTERS.encode([" ".join(piece)])[0] for piece in kept]
        expected += [[*row, LETTERS.eos_id] + [LETTERS.pad_id] * (room - len(row)) for row in ids]
    assert sorted([*corpus.train.tolist(), *corpus.held_out.tolist()]) == sorted(expected)


# -------------------------------------------------------------------------------------- tokenizers and counts


def test_meta(tmp_path: Path) -> None:
    path = _file(tmp_path, "\n".join(LINES))
    corpus = load_corpus(_text(path), 16)
    meta = corpus.meta
    assert json.loads(json.dumps(meta)) == meta
    assert meta["bytes"] == Path(path).stat().st_size
    assert meta["tokens"] + meta["held_out_tokens"] == sum(len(ids) + 1 for ids in TINY.encode(LINES))
    assert (meta["train"], meta["held_out"]) == (len(corpus.train), len(corpus.held_out))
    assert meta["vocab_size"] == corpus.tokenizer.vocab_size
    assert meta["tokenizer_sha256"] == corpus.tokenizer.sha256
    assert len(meta["sha256"]) == 64
    assert math.isclose(meta["mean_tokens"], 6.0)
    assert meta["unknown"] == 0


def test_a_word_limit_counts_the_unknown(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = load_corpus(_text(_file(tmp_path, "\n".join(LINES)), vocab_size=3), 16, report=said.append)
    assert corpus.tokenizer.vocab_size == 6
    assert corpus.meta["unknown"] == 18 * 3
    assert any("54 words (50.00%) lie outside the vocabulary" in line for line in said)


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    path = _file(tmp_path, "the cat saw me.\nthe dog saw us.")
    corpus = load_corpus(_text(path), 16, tokenizer=TINY)
    assert corpus.tokenizer.sha256 == TINY.sha256
    _file(tmp_path, "the cat saw me.\nthe bird saw you.")
    with pytest.raises(ValueError, match=r"2 word\(s\) are not in the vocabulary .*'bird', 'you'"):
        load_corpus(_text(path), 16, tokenizer=TINY)


def test_held_out_words_are_in_the_vocabulary(tmp_path: Path) -> None:
    path = _file(tmp_path, "\n".join(f"word{n} here" for n in range(40)))
    corpus = load_corpus(_text(path), 4)
    assert corpus.tokenizer.unk_id is None
    assert len(corpus.held_out) == 4


def test_fewer_pieces_than_asked_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    load_corpus(_text(_file(tmp_path, "ab\nac"), tokenizer="bpe", vocab_size=500), 8, report=said.append)
    assert any("of 500 byte-level pieces" in line for line in said)


def test_real_text(tmp_path: Path) -> None:
    path = REAL / "tinystories.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: real text is used where it lies beside the project")
    config = _text(str(path), unit="paragraph", tokenizer="bpe", vocab_size=2048, rows="split")
    corpus = load_corpus(config, 64)
    assert corpus.train.dtype == np.uint16
    assert len(corpus.held_out) >= 2000
    assert corpus.meta["tokens"] > 800_000
    _check_form(corpus.train, corpus.tokenizer)


# ----------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("line", "fields", "length", "hint"),
    [
        (
            "a {0} b c",
            {},
            64,
            "92% of the rows is filling, which is computed like text: --model.length 5 holds every",
        ),
        ("a {0} b c", {"rows": "wrap"}, 64, ""),
        ("a {0} b c", {}, 7, ""),
        (
            "漢字仮名交文章例文{0}作成学習用資料全部",
            {},
            8,
            "where words are not parted by spaces, take pieces",
        ),
        ("漢字仮名交文章例文{0}", {"tokenizer": "bpe", "vocab_size": 258}, 8, ""),
    ],
)
def test_what_goes_badly_together_is_said(
    tmp_path: Path, line: str, fields: dict[str, Any], length: int, hint: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(line.format(f"w{i}") for i in range(300)), encoding="utf-8")
    said: list[str] = []
    config = DataConfig(corpus="text", path=str(path), held_out=20, **fields)
    load_corpus(config, length, report=said.append)
    found = [text for text in said if "filling" in text or "parted by spaces" in text]
    assert any(hint in text for text in found) if hint else not found


def test_a_folder_of_several_kinds_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(f"one {i} two" for i in range(50)))
    (folder / "README.md").write_text("what this is\n")
    said: list[str] = []
    load_corpus(DataConfig(corpus="text", path=str(folder), held_out=5), 8, report=said.append)
    assert any("read are 1 .md, 1 .txt" in text for text in said)


def test_a_tokenizer_here_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the present one, by its name alone."""
    monkeypatch.chdir(tmp_path)
    Tokenizer.train_words(["one two three"]).save(tmp_path / "mine")
    for name in ("mine", "./mine"):
        assert DataConfig(corpus="text", path="a.txt", tokenizer=name).tokenizer == name
    with pytest.raises(ValueError, match="is unknown"):
        DataConfig(corpus="text", path="a.txt", tokenizer="theirs")
    assert DataConfig(corpus="text", path="a.txt", tokenizer="./theirs")  # refused when it is read


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"corpus": "txt"}, r"data.corpus = 'txt' is unknown: the nearest known name is 'text'"),
        ({"unit": "lines"}, r"data.unit = 'lines' is unknown: the nearest known name is 'line'"),
        ({"tokenizer": "word"}, r"data.tokenizer = 'word' is unknown: the nearest known name is 'words'"),
        ({"rows": "splitt"}, r"data.rows = 'splitt' is unknown: the nearest known name is 'split'"),
        ({"tokenizer": "bpe"}, r"needs data.vocab_size, at least 258"),
        ({"tokenizer": "bpe", "vocab_size": 257}, r"data.vocab_size = 257: .* at least 258"),
        ({"vocab_size": 50}, r"data.vocab_size = 50: the grammar needs all"),
        ({"num": 0}, r"data.num must be at least 1, got 0"),
        ({"held_out": 0}, r"data.held_out must be at least 1, got 0"),
        ({"seed": -1}, r"data.seed must be at least 0, got -1"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DataConfig(**fields)


@pytest.mark.parametrize("config", [SMALL, _text("nowhere")], ids=["grammar", "text"])
@pytest.mark.parametrize("length", [1, 0, -3])
def test_too_short_a_length(config: DataConfig, length: int) -> None:
    with pytest.raises(
        ValueError, match=rf"length is {length}: a passage needs room for a token and \[EOS\]"
    ):
        load_corpus(config, length)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        load_corpus(_text(""), 8)
    with pytest.raises(ValueError, match=r"data.path = '.*none.txt' does not exist"):
        load_corpus(_text(str(tmp_path / "none.txt")), 8)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no text files \(it is empty\): known are \.txt"):
        load_corpus(_text(str(tmp_path)), 8)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, "a b\nb c")

    def refuse(self: Path, mode: str = "r", **options: Any) -> None:  # chmod would not stop a superuser
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): check its permissions"):
        load_corpus(_text(path), 8)


@pytest.mark.parametrize("text", ["", " \n\t\n", "\ufeff"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(_text(_file(tmp_path, text)), 8)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8(tmp_path: Path, mark: bytes) -> None:
    path = _file(tmp_path, mark + "été\nb c\nd ".encode() + b"\xe9 e\n")
    with pytest.raises(
        ValueError, match=rf"not UTF-8: byte 0xe9 at offset {12 + len(mark)}, line 3; convert it"
    ):
        load_corpus(_text(path), 8)


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ("a b c", {}, "is a single line: .* break the text into lines"),
        ("a b c", {"rows": "wrap"}, "is a single line"),
        ("a b\nb c", {"unit": "paragraph"}, "is a single paragraph: .* use data.unit = 'line'"),
        ("a b\na b\na b", {}, "all 3 passages are the same, 'a b'"),
        ("a a\na", {}, "at least two different words"),
        ("a\n\n" + "é" * 3, {"tokenizer": "bpe", "vocab_size": 260}, None),
    ],
)
def test_too_little_text(tmp_path: Path, text: str, fields: dict[str, Any], reason: str | None) -> None:
    config = _text(_file(tmp_path, text), **fields)
    if reason is None:
        assert load_corpus(config, 8).train.shape == (1, 8)
        return
    with pytest.raises(ValueError, match=reason):
        load_corpus(config, 8)


def test_one_token_only(tmp_path: Path) -> None:
    path = _file(tmp_path, "cat\ncat cat\ncat cat cat")
    with pytest.raises(ValueError, match="holds 'cat' and nothing else: there is nothing to learn"):
        load_corpus(_text(path), 8, tokenizer=TINY)
