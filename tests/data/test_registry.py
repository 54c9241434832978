"""Corpora by name: rows as they are published, from files of the same form; what is missing is said."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as draws
from hypothesis import strategies as st

from flowlm import files
from flowlm.config import load_recipe
from flowlm.data import download, preparation, registry, remote
from flowlm.data.corpora import DataConfig, load_corpus, prepare_corpus
from flowlm.data.detokenize import lm1b
from flowlm.data.prepared import META, Recipe
from flowlm.data.readers import TextReader
from flowlm.data.registry import CORPORA, TOKENIZERS
from flowlm.data.remote import UnreadableError
from flowlm.data.tokens import Tokenizer
from flowlm.evaluation.judge import TextJudge
from flowlm.model import FlowLM
from flowlm.provenance import command_of
from helpers import REAL, command, said, settings, trained

arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with flowlm[data]")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = ["the", "a", "cat", "dog", "hen", "saw", "met", "old", "big", "red", "ran", "far"]
SENTENCES = [
    f"{a} {b} {c} , {d} ." for a, b, c, d in itertools.product(WORDS[:2], WORDS[2:5], WORDS[5:7], WORDS)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Tokenizers of the same kinds with a few words and letters, in place of those of 30,000 and 50,000 pieces."""
    bert = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ",", ".", "£", *"bcdefghijklmnopqrstuvwxyz"]
    bert.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    gpt2 = tmp_path / "tokenizer.json"
    made = Tokenizer.train_bpe(SENTENCES, vocab_size=300)
    described = json.loads(made._model.to_str())
    text = json.dumps(described).replace("[EOS]", "<|endoftext|>")
    gpt2.write_text(text)
    sizes = {"bert-base-uncased": len(pieces), "gpt2": made.vocab_size}
    for name, size in sizes.items():
        monkeypatch.setitem(TOKENIZERS, name, dataclasses.replace(TOKENIZERS[name], vocab_size=size))
    return {"bert-base-uncased": str(bert), "gpt2": str(gpt2), "characters": "characters"}


def write(path: Path, texts: Sequence[str], column: str = "text", rows: int = 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({column: list(texts)}), path, row_group_size=rows)
    return path


def lm1b_files(folder: Path, train: Sequence[str] = SENTENCES, test: Sequence[str] = SENTENCES[:9]) -> Path:
    """The form of the hub's own conversion, in two files."""
    half = len(train) // 2
    write(folder / "plain_text" / "train" / "0000.parquet", train[:half])
    write(folder / "plain_text" / "train" / "0001.parquet", train[half:])
    write(folder / "plain_text" / "test" / "0000.parquet", test)
    return folder


def wrapped(ids: Iterable[list[int]], inner: int, begin: int, end: int) -> list[list[int]]:
    """Rows by the definition: everything concatenated, cut, framed, the rest left out."""
    stream = [i for own in ids for i in [*own, end]]
    full = len(stream) // inner * inner
    return [[begin, *stream[a : a + inner], end] for a in range(0, full, inner)]


# ---------------------------------------------------------------------------------------------------- their rows


@pytest.mark.parametrize("length", [5, 16, 128])
def test_lm1b_is_wrapped_and_framed(tmp_path: Path, small: dict[str, str], length: int) -> None:
    path = lm1b_files(tmp_path / "lm1b", test=[f"{s} {s} {s}" for s in SENTENCES[:40]])
    config = DataConfig(corpus="lm1b", path=str(path), tokenizer=small["bert-base-uncased"])
    corpus = load_corpus(config, length)
    tokenizer = corpus.tokenizer
    cls, sep = tokenizer.id("[CLS]"), tokenizer.id("[SEP]")
    for side, texts in (
        (corpus.train, SENTENCES),
        (corpus.held_out, [f"{s} {s} {s}" for s in SENTENCES[:40]]),
    ):
        ids = tokenizer.encode([lm1b(text) for text in texts])
        assert side.tolist() == wrapped(ids, length - 2, cls, sep)
    meta = corpus.meta
    assert (meta["corpus"], meta["rows"], meta["bos"]) == ("lm1b", "wrap", "[CLS]")
    assert (meta["held_out_by"], meta["held_out_documents"], meta["detokenizer"]) == ("test", 40, "lm1b")
    assert "wrapped" in meta["label"]
    assert meta["licence"] == CORPORA["lm1b"].licence
    total = sum(len(own) + 1 for text in SENTENCES for own in tokenizer.encode([text]))
    held = sum(len(own) + 1 for text in SENTENCES[:40] for own in tokenizer.encode([f"{text} {text} {text}"]))
    used = (length - 2) * (meta["train"] + meta["held_out"])
    assert meta["left_over"] == total + held - used > 0


def test_lm1b_unwrapped_has_a_sentence_a_row(tmp_path: Path, small: dict[str, str]) -> None:
    train = [*SENTENCES, "the cat " * 30]
    path = lm1b_files(tmp_path / "lm1b", train)
    config = DataConfig(corpus="lm1b-unwrapped", path=str(path), tokenizer=small["bert-base-uncased"])
    corpus = load_corpus(config, 12)
    tokenizer = corpus.tokenizer
    cls, sep, pad = (tokenizer.id(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    expected = [[cls, *own[:10], sep] for own in tokenizer.encode([lm1b(text) for text in train])]
    assert corpus.train.tolist() == [row + [pad] * (12 - len(row)) for row in expected]
    assert len(corpus.held_out) == 9
    assert corpus.meta["cut"] == 1
    assert "unwrapped" in corpus.meta["label"]
    assert "left_over" not in corpus.meta


def test_openwebtext_holds_the_last_documents_out(tmp_path: Path, small: dict[str, str]) -> None:
    documents = [f"\n{a}\n\n {b}\t" for a, b in zip(SENTENCES, reversed(SENTENCES))]  # kept as they are
    for n in range(3):
        write(tmp_path / "owt" / f"train-0000{n}-of-00003.parquet", documents[n * 48 : (n + 1) * 48])
    (tmp_path / "owt" / "README.md").write_text("no text of the corpus")
    config = DataConfig(
        corpus="openwebtext", path=str(tmp_path / "owt"), tokenizer=small["gpt2"], held_out=50
    )
    corpus = load_corpus(config, 32)
    tokenizer = corpus.tokenizer
    eos = tokenizer.eos_id
    assert tokenizer.id("<|endoftext|>") == eos
    for side, texts in ((corpus.train, documents[:94]), (corpus.held_out, documents[94:])):
        assert side.tolist() == wrapped(tokenizer.encode(texts), 30, eos, eos)
    assert corpus.meta["held_out_documents"] == 50
    assert corpus.meta["documents"] == 144
    assert DataConfig(corpus="openwebtext").held_out == 100_000
    with pytest.raises(
        ValueError, match=r"has 144 documents, and the last 144 of them are held out: none is left"
    ):
        load_corpus(dataclasses.replace(config, held_out=144), 32)


def test_text8_is_a_stream_of_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flowlm.data.readers._PIECE", 1000
    )  # of one record of the real one there are 90,000,000
    draw = random.Random(0)
    text = {
        name: "".join(draw.choices(" abcdefghijklmnopqrstuvwxyz", k=k))
        for name, k in (("train", 5003), ("validation", 777))
    }
    for name, own in text.items():
        write(tmp_path / "text8" / f"{name}-00000-of-00001.parquet", [own])
    write(tmp_path / "text8" / "test-00000-of-00001.parquet", ["never read"])
    corpus = load_corpus(DataConfig(corpus="text8", path=str(tmp_path / "text8")), 256)
    assert corpus.tokenizer.vocab_size == 29
    for side, name in ((corpus.train, "train"), (corpus.held_out, "validation")):
        own = text[name]
        assert [corpus.tokenizer.decode(row) for row in side] == [
            own[a : a + 256] for a in range(0, len(own) // 256 * 256, 256)
        ]
    assert corpus.meta["left_over"] == 5003 % 256 + 777 % 256
    assert not corpus.tokenizer.losses
    write(tmp_path / "text8" / "train-00000-of-00001.parquet", ["Upper case"] * 300)
    with pytest.raises(ValueError, match="has no token for something in the text"):
        load_corpus(DataConfig(corpus="text8", path=str(tmp_path / "text8")), 256)


@pytest.mark.parametrize("name", ["wikitext", "tinystories"])
def test_corpora_with_a_validation_split(tmp_path: Path, small: dict[str, str], name: str) -> None:
    lines = ["", *(f" {line}\n" for line in SENTENCES)]
    write(tmp_path / "own" / "train.parquet", lines)
    write(tmp_path / "own" / "validation.parquet", lines[40:80])
    corpus = load_corpus(DataConfig(corpus=name, path=str(tmp_path / "own"), tokenizer=small["gpt2"]), 64)
    tokenizer, eos = corpus.tokenizer, corpus.tokenizer.eos_id
    assert corpus.train.tolist() == wrapped(tokenizer.encode(lines[1:]), 62, eos, eos)
    assert corpus.held_out.tolist() == wrapped(tokenizer.encode(lines[40:80]), 62, eos, eos)
    assert corpus.meta["held_out_in_train"] == 40  # a split that is given is not made anew


def test_the_real_tokenizers(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip(f"no real text in {REAL}: set FLOWLM_TEST_DATA")
    news = (REAL / "news.txt").read_text(encoding="utf-8").splitlines()
    path = lm1b_files(tmp_path / "lm1b", news[:-500], news[-500:])
    tokenizer = str(REAL / "bert-base-uncased" / "vocab.txt")
    corpus = load_corpus(DataConfig(corpus="lm1b", path=str(path), tokenizer=tokenizer), 128)
    assert corpus.tokenizer.vocab_size == 30_522
    assert set(corpus.train[:, 0]) == {101}
    assert set(corpus.train[:, -1]) == {102}
    assert not (corpus.train == 0).any()
    # sentences and their ends, all but what fills no row
    assert len(news) - 510 < (corpus.train[:, 1:-1] == 102).sum() <= len(news) - 500
    bert = corpus.tokenizer
    assert (
        bert.decode_all([int(i) for i in corpus.train[0, 1:-1]])[0]
        == bert.decode_all(bert.encode([lm1b(news[0])])[0])[0]
    )
    with zipfile.ZipFile(REAL / "movie_reviews.zip") as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith(".txt")]
        reviews = [archive.read(name).decode("latin-1") for name in names]
    assert len(reviews) == 2000
    write(tmp_path / "owt" / "train-00000.parquet", reviews[:1500])
    write(tmp_path / "owt" / "train-00001.parquet", reviews[1500:])
    config = DataConfig(
        corpus="openwebtext", path=str(tmp_path / "owt"), tokenizer=str(REAL / "gpt2"), held_out=10
    )
    corpus = load_corpus(config, 1024)
    assert corpus.tokenizer.vocab_size == 50_258
    assert corpus.tokenizer.pad_id == 50_257
    assert set(corpus.train[:, 0]) == set(corpus.train[:, -1]) == {50_256}
    assert corpus.train.dtype == np.uint16
    inner = [int(i) for i in corpus.held_out[:, 1:-1].reshape(-1)]
    texts = corpus.tokenizer.decode_all(inner)
    assert texts[:9] == reviews[-10:-1]  # to the byte
    assert reviews[-1].startswith(texts[9])


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["lm1b", "owt"])
def test_the_presets_learn_from_such_files(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From Parquet with the real tokenizer to text and its figures, by the commands; only the network is small."""
    if not REAL.exists():
        pytest.skip(f"no real text in {REAL}: set FLOWLM_TEST_DATA")
    if corpus == "lm1b":
        news = (REAL / "news.txt").read_text(encoding="utf-8").splitlines()
        path = lm1b_files(tmp_path / "text", news[:400], news[400:500])
        given = ["--data.path", path, "--data.tokenizer", REAL / "bert-base-uncased" / "vocab.txt"]
    else:
        with zipfile.ZipFile(REAL / "movie_reviews.zip") as archive:
            names = [name for name in sorted(archive.namelist()) if name.endswith(".txt")][:20]
            write(
                tmp_path / "text" / "train-00000.parquet", [archive.read(n).decode("latin-1") for n in names]
            )
        given = ["--data.path", tmp_path / "text", "--data.tokenizer", REAL / "gpt2", "--data.held-out", "10"]
    small = "--model.backbone.width 16 --model.backbone.heads 2 --model.backbone.depth 1 --train.device cpu"
    short = (
        "--train.steps 2 --train.batch 2 --train.micro-batch 1 --train.eval-every 0 --train.sample-steps 2"
    )
    flow, student = tmp_path / "flm", tmp_path / "fmlm"
    assert command("train", f"{corpus}-flm", *given, *small.split(), *short.split(), "--out", flow) == 0
    assert (
        command(
            "distill",
            f"{corpus}-fmlm",
            "--teacher",
            flow,
            *short.split(),
            "--device",
            "cpu",
            "--out",
            student,
        )
        == 0
    )
    capsys.readouterr()
    assert command("generate", student, "--num", "2", "--seed", "1") == 0
    assert capsys.readouterr().out.strip()
    if corpus == "owt":
        return  # passages of 1,024 tokens take long to compare
    assert command("evaluate", student, "--steps", "1", "--num", "4", "--report", tmp_path / "report") == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    own = next(row for row in found["rows"] if row.get("nfe") == 1)
    assert own["entropy"] > 0


# ----------------------------------------------------------------------------------------------- the detokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He 's here , is n 't he ?", "He's here, is n't he?"),
        ('" It is , " he said : " no ! "', '"It is," he said: "no!"'),
        ("the ( old ) one [ sic ] ; it cost $ 5 / £ 4 .", "the (old) one [sic]; it cost $5/£4."),
        ("see http : / / a.b / c . Then go .", "see http://a.b/c. Then go."),
        ("wait . . . what", "wait... what"),
        ("3.5 and 1,000 -- as it is", "3.5 and 1,000 -- as it is"),
        ("", ""),
    ],
)
def test_detokenized(text: str, expected: str) -> None:
    assert lm1b(text) == expected


@draws(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, *",.:;?!\"'()[]/$", "'s", "n", "5"]), max_size=25))
def test_detokenizing_moves_spaces_only(parts: list[str]) -> None:
    text = " ".join(parts)
    assert lm1b(text).replace(" ", "") == text.replace(" ", "")


def test_bert_reads_the_same_either_way() -> None:
    if not REAL.exists():
        pytest.skip(f"no real text in {REAL}: set FLOWLM_TEST_DATA")
    tokenizer = Tokenizer.read(REAL / "bert-base-uncased" / "vocab.txt")
    lines = (REAL / "news.txt").read_text(encoding="utf-8").splitlines()[:2000]
    plain = [line for line in lines if "£" not in line]
    undone = [lm1b(line) for line in plain]
    assert sum(a != b for a, b in zip(plain, undone)) > 1000
    assert tokenizer.encode(undone) == tokenizer.encode(plain)
    pound = tokenizer.encode(["it costs £ 5 .", lm1b("it costs £ 5 .")])
    assert pound[0] != pound[1]


# ------------------------------------------------------------------------------------------------ configuration


def test_a_name_decides_the_form() -> None:
    config = DataConfig(corpus="lm1b")
    assert (config.unit, config.rows, config.bos, config.detokenizer, config.split) == (
        "record",
        "wrap",
        "[CLS]",
        "lm1b",
        "test",
    )
    assert config.tokenizer == "bert-base-uncased"
    assert dataclasses.replace(config, path="somewhere") == DataConfig(corpus="lm1b", path="somewhere")
    assert DataConfig(corpus="lm1b", rows="wrap") == config
    with pytest.raises(ValueError, match=r"data\.rows = 'split', and lm1b is made with 'wrap': leave it out"):
        DataConfig(corpus="lm1b", rows="split")
    with pytest.raises(ValueError, match=r"data\.rows = 'cut', and lm1b is made with 'wrap'"):
        dataclasses.replace(config, rows="cut")  # the default of others, said on top of what was filled in
    with pytest.raises(
        ValueError, match=r"data\.tokenizer = 'words', and lm1b is made with 'bert-base-uncased'"
    ):
        dataclasses.replace(config, tokenizer="words")
    with pytest.raises(ValueError, match=r"data\.eos and data\.pad: lm1b has its tokenizer's own"):
        DataConfig(corpus="lm1b", pad="[UNK]")
    with pytest.raises(ValueError, match="an existing tokenizer has the size it has"):
        DataConfig(corpus="lm1b", vocab_size=500)
    with pytest.raises(ValueError, match="the nearest known name is 'lm1b'"):
        DataConfig(corpus="lmb1")


def test_parts_of_it_on_ones_own_text(tmp_path: Path, small: dict[str, str]) -> None:
    path = write(tmp_path / "a.parquet", SENTENCES)
    config = DataConfig(
        corpus="text", path=str(path), unit="document", rows="split", split="last", held_out=4,
        tokenizer=small["bert-base-uncased"], bos="[CLS]", detokenizer="lm1b",
    )  # fmt: skip
    corpus = load_corpus(config, 6)
    assert set(corpus.train[:, 0]) == {corpus.tokenizer.id("[CLS]")}
    ids = corpus.tokenizer.encode([lm1b(text) for text in SENTENCES[-4:]])
    held = [[2, *own[a : a + 4], 3] for own in ids for a in range(0, len(own), 4)]
    assert [row[row != 0].tolist() for row in corpus.held_out] == held
    assert "label" not in corpus.meta
    with pytest.raises(ValueError, match=r"the tokenizer has no token '\[BOS\]'"):
        load_corpus(dataclasses.replace(config, bos="[BOS]"), 6)
    with pytest.raises(ValueError, match=r"length is 2: rows have a token between data\.bos and the end"):
        load_corpus(config, 2)
    with pytest.raises(ValueError, match=r"data\.rows = 'chunk' puts nothing between and around"):
        dataclasses.replace(config, rows="chunk")
    with pytest.raises(
        ValueError, match=r"data\.eos, data\.pad and data\.bos name tokens of an existing tokenizer"
    ):
        DataConfig(corpus="text", path=str(path), bos="[CLS]")
    with pytest.raises(ValueError, match=r"data\.split = 'test' is unknown"):
        DataConfig(corpus="text", path=str(path), split="test")


def test_what_was_prepared_before_is_found_again() -> None:
    """Recipes are told apart by what is written down: without the later fields, as before them."""
    first = {
        "unit": "line", "field": "text", "encoding": "utf-8", "rows": "cut", "unknown": "keep", "tokenizer": "words",
        "vocab_size": 0, "held_out": 2000, "length": 64,
    }  # fmt: skip
    recipe = Recipe(**first)
    assert list(recipe.written()) == list(first)
    assert recipe.written() == first
    assert recipe.differences(first) == []
    framed = dataclasses.replace(recipe, bos="[CLS]")
    assert framed.written() == first | {"bos": "[CLS]"}
    assert framed.differences(first) == ["bos was '', is '[CLS]'"]
    assert recipe.differences(framed.written()) == ["bos was '[CLS]', is ''"]


def test_a_generated_row_is_shown_without_its_frame(small: dict[str, str]) -> None:
    tokenizer = Tokenizer.read(small["bert-base-uncased"])
    row = [tokenizer.id(name) for name in ("[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]")]
    model = FlowLM.__new__(FlowLM)
    model.tokenizer, model.data = tokenizer, {"rows": "wrap", "bos": "[CLS]"}
    assert model._text(row) == "the cat\na dog"
    model.data = {"rows": "cut", "bos": "[CLS]"}
    assert model._text(row) == "the cat"
    model.data = {"rows": "cut"}
    assert model._text(row) == "[CLS] the cat"


def test_a_model_learns_from_it(
    tmp_path: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, resumed, generating and judged, with a token that both begins and ends a row."""
    write(tmp_path / "owt" / "train-00000-of-00001.parquet", SENTENCES)
    data = {
        "corpus": "openwebtext",
        "path": str(tmp_path / "owt"),
        "tokenizer": small["gpt2"],
        "held_out": 30,
    }
    run = trained(tmp_path / "run", settings({f"data.{name}": value for name, value in data.items()}))
    described = json.loads((run / "data.json").read_text())
    assert described["label"] == CORPORA["openwebtext"].label
    assert described["bos"] == "<|endoftext|>"
    assert not any("<|endoftext|>" in text for text in FlowLM.from_pretrained(run).generate(4, steps=2))
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    assert command("train", "--resume", run) == 0
    assert (
        command(
            "evaluate", run, "--steps", "1", "--num", "10", "--device", "cpu", "--json", tmp_path / "rows"
        )
        == 0
    )
    rows = json.loads((tmp_path / "rows").read_text())
    assert {row["model"] for row in rows} >= {"held-out"}
    corpus = load_corpus(DataConfig(**data), 12)
    texts = TextJudge(corpus)._texts(corpus.held_out)
    assert not any("<|endoftext|>" in text for text in texts)
    assert "".join(SENTENCES[-30:]).startswith("".join(texts[0].splitlines()))
    said(capsys)


# ------------------------------------------------------------------------------------------ the files of a corpus


def test_files_by_their_splits(tmp_path: Path) -> None:
    def names(folder: Path) -> list[list[str]]:
        return [
            [f.relative_to(folder).as_posix() for f in side] for side in registry.local_files("lm1b", folder)
        ]

    for n, (train, test) in enumerate(
        [
            ("train.parquet", "test.parquet"),
            ("train/a.parquet", "test/a.parquet"),
            ("train-00000-of-00002.parquet", "test-00000-of-00001.parquet"),
            ("plain_text/train/0000.parquet", "plain_text/test/0000.parquet"),
        ]
    ):
        folder = tmp_path / str(n)
        write(folder / train, ["a"])
        write(folder / test, ["b"])
        write(folder / "training notes.parquet", ["of no split"])
        assert names(folder) == [[train], [test]]
    only = tmp_path / "only"
    write(only / "train" / "a.parquet", ["a"])
    with pytest.raises(
        ValueError, match=r"has no split 'test' among train/a\.parquet: lm1b learns from its split"
    ):
        names(only)
    with pytest.raises(ValueError, match=r"has no split 'train' among test\.parquet"):
        registry.local_files("lm1b", write(tmp_path / "test.parquet", ["a"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"holds no \.parquet file: lm1b is read from files like those of billion-word"
    ):
        names(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"does not exist \(seen from .*\): say with --data\.path"):
        names(tmp_path / "nowhere")


def test_errors_leave_nothing(tmp_path: Path, small: dict[str, str], cache: Path) -> None:
    folder = lm1b_files(tmp_path / "lm1b")
    config = DataConfig(corpus="lm1b", path=str(folder), tokenizer=small["bert-base-uncased"])
    with pytest.raises(
        ValueError, match=r"0000\.parquet has no field 'body': set data\.field to one of 'text'"
    ):
        load_corpus(dataclasses.replace(config, field="body"), 16)
    write(folder / "plain_text" / "test" / "0000.parquet", SENTENCES[:9], column="sentence")
    with pytest.raises(ValueError, match=r"test/0000\.parquet has no field 'text'"):
        load_corpus(config, 16)
    write(folder / "plain_text" / "test" / "0000.parquet", ["", " "])
    with pytest.raises(ValueError, match="there is no text in the split 'test'"):
        load_corpus(config, 16)
    write(folder / "plain_text" / "test" / "0000.parquet", ["the cat"])
    with pytest.raises(ValueError, match=r"the 3 tokens held out do not fill a row of 16"):
        load_corpus(config, 16)
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, '<\|endoftext\|>' the last .* lm1b is made with the \d+ of"
    ):
        load_corpus(dataclasses.replace(config, tokenizer=small["gpt2"]), 16)
    with pytest.raises(ValueError, match=r"the model's tokenizer has \d+ tokens, .* and lm1b is made with"):
        load_corpus(config, 16, tokenizer=Tokenizer.read(small["gpt2"]))
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_a_disk_that_is_too_small_is_told_before(
    tmp_path: Path, small: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lm1b_files(tmp_path / "lm1b", SENTENCES * 200, SENTENCES * 2)
    config = DataConfig(corpus="lm1b", path=str(folder), tokenizer=small["bert-base-uncased"])
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []

    def disk(free: int) -> Any:
        return lambda path: asked.append(path) or usage._replace(free=free)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", disk(100_000))
        patch.setattr(TextReader, "sha256", lambda self: pytest.fail("hours of hashing came first"))
        with pytest.raises(
            OSError, match=r"will take about 0\.00 GB, .* left: free some space, or choose"
        ) as error:
            load_corpus(config, 128)
        assert error.value.errno == errno.ENOSPC
        assert asked == [cache]
    assert not [p for p in cache.iterdir() if p.is_dir()]
    corpus = load_corpus(config, 128)  # what it expects is what it takes
    need = corpus.train.nbytes + corpus.held_out.nbytes + 9 * corpus.meta["passages"]
    for free, fits in ((need * 1.1, True), (need * 0.9, False)):
        shutil.rmtree(cache)
        with monkeypatch.context() as patch:
            patch.setattr(preparation, "_WIDEST", 10**9)
            patch.setattr(shutil, "disk_usage", disk(int(free)))
            if fits:
                load_corpus(config, 128)
            else:
                with pytest.raises(OSError, match="will take about"):
                    load_corpus(config, 128)


# ------------------------------------------------------------------------------------- prepared, killed, elsewhere

KILLED = """
import os, signal, sys
from flowlm.data import preparation, registry
import dataclasses
from flowlm.data.corpora import DataConfig, load_corpus
preparation._CHUNK, preparation._KEEP_EVERY = 16, 0.0
path, tokenizer, size = sys.argv[1:]
registry.TOKENIZERS["bert-base-uncased"] = dataclasses.replace(
    registry.TOKENIZERS["bert-base-uncased"], vocab_size=int(size)
)
whole, calls = preparation._Side._write, 0
def dying(self, *args):
    global calls
    calls += 1
    if calls > 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args)
preparation._Side._write = dying
load_corpus(DataConfig(corpus="lm1b", path=path, tokenizer=tokenizer), 9)
"""


def test_a_killed_preparation_goes_on_to_the_same_rows(
    tmp_path: Path, small: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lm1b_files(tmp_path / "lm1b", test=SENTENCES[:77])
    tokenizer = small["bert-base-uncased"]
    size = str(TOKENIZERS["bert-base-uncased"].vocab_size)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), tokenizer, size], env=os.environ, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    said: list[str] = []
    config = DataConfig(corpus="lm1b", path=str(folder), tokenizer=tokenizer)
    resumed = load_corpus(config, 9, report=said.append)
    assert any("going on with a preparation that was interrupted" in line for line in said)
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "other"))
    whole = load_corpus(config, 9)
    assert np.array_equal(resumed.train, whole.train)
    assert np.array_equal(resumed.held_out, whole.held_out)
    assert resumed.meta == whole.meta


def test_rows_taken_elsewhere_say_what_they_are(tmp_path: Path, small: dict[str, str]) -> None:
    folder = lm1b_files(tmp_path / "lm1b", test=SENTENCES[:20])
    config = DataConfig(corpus="lm1b", path=str(folder), tokenizer=small["bert-base-uncased"])
    out = prepare_corpus(config, 16, tmp_path / "rows", lambda line: None)
    shutil.rmtree(folder)
    taken = load_corpus(dataclasses.replace(config, path=str(out)), 16)
    assert taken.meta["label"] == CORPORA["lm1b"].label
    assert json.loads((out / META).read_text())["origin"]["licence"] == CORPORA["lm1b"].licence
    rows = json.loads((out / META).read_text())
    (out / META).write_text(
        json.dumps(rows | {"origin": rows["origin"] | {"label": CORPORA["wikitext"].label}})
    )
    with pytest.raises(
        ValueError, match=r"rows of another text than lm1b.* name theirs, with data\.corpus = 'wikitext'"
    ):
        load_corpus(dataclasses.replace(config, path=str(out)), 16)
    with pytest.raises(ValueError, match=r"was prepared otherwise: rows was 'wrap', is 'cut'"):
        load_corpus(
            DataConfig(corpus="lm1b-unwrapped", path=str(out), tokenizer=small["bert-base-uncased"]), 16
        )


def test_the_command(tmp_path: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = lm1b_files(tmp_path / "lm1b", SENTENCES * 2, SENTENCES)
    options = (
        "--data.path",
        folder,
        "--data.tokenizer",
        small["bert-base-uncased"],
        "--out",
        tmp_path / "rows",
    )
    assert command("prepare", "lm1b-unwrapped", *options) == 0
    meta = json.loads((tmp_path / "rows" / META).read_text())
    assert (meta["length"], meta["train"], meta["held_out"]) == (128, 288, 144)
    assert "144 of the held-out ones are also training passages" in said(capsys)
    assert command("prepare", "lm1b-unwrapped", *options[:4], "--data.rows", "split") == 2
    assert "data.rows = 'split', and lm1b-unwrapped is made with 'cut'" in said(capsys)
    assert command("prepare", "tinystories") == 1
    assert "of that name is --data.corpus tinystories" in said(capsys)
    assert command("prepare", "nothing") == 1
    assert "no recipe named 'nothing'" in said(capsys)


def test_any_recipe_takes_a_corpus_by_name(tmp_path: Path, small: dict[str, str]) -> None:
    """Whatever the recipe says of a text of its own; and what made the run is told so that it makes it again."""
    folder = lm1b_files(tmp_path / "lm1b", SENTENCES * 2, SENTENCES)
    tiny = "--train.steps 2 --train.batch 4 --train.device cpu --train.eval-every 0 --train.sample-steps 2"
    tiny += " --model.length 64 --model.backbone.width 32 --model.backbone.heads 2 --model.backbone.depth 1"
    given = ["--data.corpus", "lm1b-unwrapped", "--data.path", folder]
    given += ["--data.tokenizer", small["bert-base-uncased"], *tiny.split()]
    run, again = tmp_path / "run", tmp_path / "again"
    assert command("train", "tinystories", *given, "--out", run) == 0
    config = load_recipe(run / "config.toml")
    assert (config.data.corpus, config.data.rows, config.data.unit) == ("lm1b-unwrapped", "cut", "record")
    words = shlex.split(command_of(run))
    assert "--data.rows" not in words
    words[words.index(str(run))] = str(again)
    assert command(*words[1:]) == 0
    assert load_recipe(again / "config.toml") == config


# ----------------------------------------------------------------------------------------------------- the hub


class Hub:
    """Stands for `datasets` and the hub's file system: files of a folder, copied when they are downloaded."""

    def __init__(self, repositories: Path, cache: Path):
        self.repositories, self.cache = repositories, cache
        self.asked: list[str] = []
        self.opened: list[str] = []
        self.reads, self.broken = 0, ""

    def load_dataset_builder(self, kind: str, *, data_files: dict[str, list[str]]) -> Any:
        assert kind == "parquet"
        found: dict[str, list[str]] = {}
        for side, patterns in data_files.items():
            self.asked += patterns
            for pattern in patterns:
                repository, revision, inside = self.parts(pattern)
                files = sorted((self.repositories / repository).glob(inside), reverse=True)
                found[side] = [
                    f"hf://datasets/{repository}@{revision}/{f.relative_to(self.repositories / repository).as_posix()}"
                    for f in files
                ]
        return SimpleNamespace(config=SimpleNamespace(data_files=found))

    @staticmethod
    def parts(url: str) -> tuple[str, str, str]:
        repository, _, rest = url.removeprefix("hf://datasets/").partition("@")
        known = next(c for c in CORPORA.values() if c.repository == repository)
        return repository, known.revision, rest.removeprefix(known.revision + "/")

    def DownloadManager(self) -> Any:
        return SimpleNamespace(download=lambda urls: [self.download(url) for url in urls])

    def download(self, url: str) -> str:
        repository, commit, inside = self.parts(url)
        target = self.cache / f"datasets--{repository.replace('/', '--')}" / "snapshots" / commit / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.repositories / repository / inside, target)
        return str(target)

    def resolve_path(self, url: str) -> Any:
        repository, revision, inside = self.parts(url)
        return SimpleNamespace(
            repo_id=repository, revision=revision, path_in_repo=inside, repo_type="dataset"
        )

    def info(self, url: str) -> dict[str, int]:
        repository, _, inside = self.parts(url)
        path = self.repositories / repository / inside
        return {"size": path.stat().st_size, "lfs": {"sha256": files.sha256(path)}}

    def open(self, url: str, mode: str) -> Any:
        assert mode == "rb"
        repository, _, inside = self.parts(url)
        hub = self
        self.opened.append(inside)

        class Reading(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                hub.reads += 1
                if hub.broken and hub.broken in inside:
                    raise ConnectionError("the line is dead")
                return super().read(size)

        return Reading(self.repositories / repository / inside)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    out = Hub(tmp_path / "hub", tmp_path / "hub-cache")
    module = ModuleType("datasets")
    vars(module).update(load_dataset_builder=out.load_dataset_builder, DownloadManager=out.DownloadManager)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: out)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(out.cache))
    return out


def test_from_the_hub(
    hub: Hub, small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lm1b_files(hub.repositories / "billion-word-benchmark" / "lm1b", test=SENTENCES[:20])
    said: list[str] = []
    config = DataConfig(corpus="lm1b", tokenizer=small["bert-base-uncased"])
    corpus = load_corpus(config, 16, report=said.append)
    commit = CORPORA["lm1b"].revision
    place = f"hf://datasets/billion-word-benchmark/lm1b@{commit}/plain_text"
    assert hub.asked == [f"{place}/train/*.parquet", f"{place}/test/*.parquet"]
    assert any("lm1b: 3 files of billion-word-benchmark/lm1b" in line for line in said)
    assert (corpus.meta["repository"], corpus.meta["commit"]) == ("billion-word-benchmark/lm1b", commit)
    local = load_corpus(dataclasses.replace(config, path=str(folder)), 16)
    assert np.array_equal(corpus.train, local.train)
    assert np.array_equal(corpus.held_out, local.held_out)
    assert "commit" not in local.meta
    # what is here is used without the hub, and without the library
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert np.array_equal(load_corpus(config, 16).train, corpus.train)
    assert len(load_corpus(config, 32).train) < len(corpus.train)
    shutil.rmtree(hub.cache)
    assert np.array_equal(load_corpus(config, 16).train, corpus.train)
    with pytest.raises(
        ImportError, match=r"pip install 'flowlm\[data\]'; or give a folder .* with --data\.path"
    ):
        load_corpus(config, 20)


def test_a_hub_without_the_files(hub: Hub, small: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(corpus="lm1b", tokenizer=small["bert-base-uncased"])
    folder = hub.repositories / "billion-word-benchmark" / "lm1b"
    write(folder / "plain_text" / "train" / "0000.parquet", SENTENCES)
    with pytest.raises(
        ValueError,
        match=rf"at {CORPORA['lm1b'].revision} has no files plain_text/test/\*\.parquet: give a folder",
    ):
        load_corpus(config, 16)
    lm1b_files(folder)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        OSError,
        match=r"the files of lm1b take 0\.0 GB, and the rows made of them about 1\.8 GB on the same disk, and .* has "
        r"0\.0 GB left: .*HF_HOME, or .* flowlm prepare --data\.corpus lm1b --streaming; nothing was fetched",
    ):
        load_corpus(config, 16)
    assert not hub.cache.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))  # for the files alone
    with pytest.raises(OSError, match="nothing was fetched"):
        load_corpus(config, 16)
    # the hub's cache on another disk: the rows' own room is judged when they are made
    monkeypatch.setattr(download, "_disk", lambda place: place == folder)
    download._check_room("lm1b", 100, folder)
    with pytest.raises(OSError, match=r"lm1b take 2\.0 GB, and .* has 1\.0 GB left"):
        download._check_room("lm1b", 2 * 10**9, folder)


def test_read_on_the_hub(
    hub: Hub, small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of the files; rows and what is said of them are those of files that are fetched."""
    monkeypatch.setattr(remote, "PAUSES", ())
    folder = lm1b_files(hub.repositories / "billion-word-benchmark" / "lm1b", SENTENCES * 40, SENTENCES[:20])
    config = DataConfig(corpus="lm1b", tokenizer=small["bert-base-uncased"])
    said: list[str] = []

    def stream() -> Path:
        said.clear()
        hub.opened.clear()
        return prepare_corpus(config, 16, None, said.append, streaming=True)

    hub.broken = "test"  # the last file of the first of two passes
    with pytest.raises(UnreadableError, match=r"the hub cannot be reached.*lm1b@8d52.*parquet.*run it again"):
        stream()
    hub.broken = ""
    made = stream()
    assert any("going on with a preparation that was interrupted" in line for line in said)
    first, second, last = (f"plain_text/{name}.parquet" for name in ("train/0000", "train/0001", "test/0000"))
    # its beginning, what was not looked at yet, and all of it, to be tokenised
    assert list(dict.fromkeys(hub.opened[:-3])) == [first, last]
    assert hub.opened[-3:] == [first, second, last]
    assert not hub.cache.exists()
    corpus = load_corpus(config, 16)
    assert made.name in str(corpus.train.filename)  # type: ignore[attr-defined]
    local = load_corpus(dataclasses.replace(config, path=str(folder)), 16)
    assert np.array_equal(corpus.train, local.train)
    assert np.array_equal(corpus.held_out, local.held_out)
    assert corpus.meta["commit"] == CORPORA["lm1b"].revision
    assert corpus.meta["documents"] == local.meta["documents"]
    # the hub is asked once
    reads, asked = hub.reads, len(hub.asked)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert np.array_equal(load_corpus(config, 16).train, corpus.train)
    assert (hub.reads, len(hub.asked)) == (reads, asked)


def test_a_line_that_breaks_for_a_while(
    hub: Hub, small: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm1b_files(hub.repositories / "billion-word-benchmark" / "lm1b", test=SENTENCES[:20])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        hub.broken = ""

    monkeypatch.setattr(remote.time, "sleep", sleep)
    hub.broken = "train/0001"
    config = DataConfig(corpus="lm1b", tokenizer=small["bert-base-uncased"])
    prepare_corpus(config, 16, None, lambda line: None, streaming=True)
    assert slept == [remote.PAUSES[0]]
    assert sum(remote.PAUSES) > 300


def test_rows_are_the_same_however_the_hub_is_read(hub: Hub, small: dict[str, str], tmp_path: Path) -> None:
    lm1b_files(hub.repositories / "billion-word-benchmark" / "lm1b", test=SENTENCES[:20])
    config = DataConfig(corpus="lm1b", tokenizer=small["bert-base-uncased"])
    load_corpus(config, 16)
    prepare_corpus(config, 16, None, lambda line: None, streaming=True)
    assert hub.reads == 0
    assert len(list((tmp_path / "cache").glob("lm1b-*"))) == 1
    # a folder that holds other rows is told before anything is fetched
    shutil.rmtree(hub.cache)
    prepare_corpus(config, 32, tmp_path / "rows", lambda line: None, streaming=True)
    with pytest.raises(
        ValueError, match="holds prepared text already, of another kind: length was 32, is 16"
    ):
        prepare_corpus(config, 16, tmp_path / "rows", lambda line: None)
    assert not hub.cache.exists()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        (["text", "--data.path", "a.txt", "--data.vocab-size", "300"], "data.path = 'a.txt'"),
        (["lm1b", "--data.path", "folder"], "data.path = 'folder'"),
        (["docs"], "data.corpus = 'docs'"),
    ],
)
def test_only_the_hub_streams(given: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prepare", *given, "--streaming") == 1
    assert "--streaming reads a corpus by its name on the hub" in (text := said(capsys))
    assert f"{where} is here: leave it out" in text


def test_the_command_streams(hub: Hub, small: dict[str, str], tmp_path: Path) -> None:
    lm1b_files(hub.repositories / "billion-word-benchmark" / "lm1b", test=SENTENCES[:20])
    given = [
        "--data.tokenizer",
        small["bert-base-uncased"],
        "--model.length",
        "16",
        "--out",
        tmp_path / "rows",
    ]
    assert command("prepare", "--data.corpus", "lm1b", "--streaming", *given) == 0
    assert not hub.cache.exists()
    assert (tmp_path / "rows" / META).exists()


def test_the_hubs_own_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's file, with what it would fetch in place of the line."""
    hf = pytest.importorskip("huggingface_hub.hf_file_system")
    write(tmp_path / "a.parquet", SENTENCES)
    data, fetched = (tmp_path / "a.parquet").read_bytes(), []
    system = hf.HfFileSystem
    monkeypatch.setattr(
        system, "info", lambda self, path, **_: {"name": path, "size": len(data), "type": "file"}
    )
    monkeypatch.setattr(
        system,
        "resolve_path",
        lambda self, path, **_: SimpleNamespace(
            unresolve=lambda: path, revision="r", path_in_repo="a.parquet"
        ),
    )

    def fetch(self: Any, start: int, end: int) -> bytes:
        fetched.append((start, end))
        if len(fetched) == 2:
            raise ConnectionError("the line is dead")
        return data[start:end]

    monkeypatch.setattr(hf.HfFileSystemFile, "_fetch_range", fetch)
    monkeypatch.setattr(hf.HfFileSystemFile, "__del__", lambda self: None)
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    file = remote.HubFile("somebody/texts", "r", "a.parquet", len(data), files.sha256(tmp_path / "a.parquet"))
    reader = TextReader("hf://datasets/somebody/texts@r", "record", sides=([file], []))
    assert [passages[0] for passages in reader.documents()] == SENTENCES
    assert fetched
    assert len(slept) == (len(fetched) > 1)
    assert reader.sha256() != file.sha256  # of names and hashes, as of a folder
    with file.open() as raw:
        assert raw.seek(-4, 2) == len(data) - 4
        assert (raw.read(), raw.tell()) == (b"PAR1", len(data))


def test_no_way_to_the_hub(hub: Hub, small: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    class TransportError(Exception):
        """As the libraries that speak HTTP call it."""

    class ConnectError(TransportError):
        pass

    config = DataConfig(corpus="lm1b", tokenizer=small["bert-base-uncased"])
    for error in (
        ConnectError("Name or service not known"),
        OfflineModeIsEnabled("offline"),
        ConnectionError("none"),
    ):

        def fail(*args: Any, error: Exception = error, **options: Any) -> Any:
            raise error

        monkeypatch.setattr(sys.modules["datasets"], "load_dataset_builder", fail)
        with pytest.raises(ValueError, match=r"the hub cannot be reached.*Parquet files with --data\.path"):
            load_corpus(config, 16)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        ValueError, match=r"cannot be reached.*give a folder that has vocab\.txt with --data\.tokenizer"
    ):
        load_corpus(DataConfig(corpus="lm1b"), 16)


@pytest.mark.parametrize(
    "wrong", ['{"sides": [["/nowhere/a.parquet"], []], "folder": "/"}', '{"sides": 3}', "[[{}], []]", "{"]
)
def test_what_was_noted_is_not_believed_blindly(
    hub: Hub, small: dict[str, str], tmp_path: Path, wrong: str
) -> None:
    lm1b_files(hub.repositories / "billion-word-benchmark" / "lm1b")
    cache = tmp_path / "cache"
    for how in ("hub", "stream"):
        note = download._note("lm1b", cache, how)
        note.parent.mkdir(exist_ok=True)
        note.write_text(wrong)
    (train, held), folder = download.fetch("lm1b", cache, cache, lambda line: None)
    assert [path.relative_to(folder).as_posix() for path in (*train, *held)] == [
        "plain_text/train/0000.parquet",
        "plain_text/train/0001.parquet",
        "plain_text/test/0000.parquet",
    ]
    assert [[len(side) for side in download.listed("lm1b", cache)] for _ in range(2)] == [[2, 1], [2, 1]]


def test_real_datasets_reads_such_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the library, asked of it: local files in place of the hub's."""
    datasets = pytest.importorskip("datasets", reason="datasets comes with flowlm[data]")
    write(tmp_path / "train" / "0001.parquet", ["b"])
    write(tmp_path / "train" / "0000.parquet", ["a"])
    builder = datasets.load_dataset_builder(
        "parquet", data_files={"train": [str(tmp_path / "train" / "*.parquet")]}
    )
    found = sorted(map(str, builder.config.data_files["train"]))
    assert [Path(path).name for path in datasets.DownloadManager().download(found)] == [
        "0000.parquet",
        "0001.parquet",
    ]
    none = datasets.load_dataset_builder(
        "parquet", data_files={"train": [str(tmp_path / "test" / "*.parquet")]}
    )
    assert list(none.config.data_files["train"]) == []
