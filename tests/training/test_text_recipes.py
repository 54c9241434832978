"""Every recipe for text, as it stands but for its size: trained, distilled, and written from in one call."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from flowlm.data import docs
from helpers import REAL, command, said

pytestmark = pytest.mark.slow

SHAPE = {"width": 32, "depth": 1, "heads": 2}
SMALL = [part for name, n in SHAPE.items() for part in (f"--model.backbone.{name}", str(n))]
TRAIN = {"steps": 2, "batch": 4, "eval-every": 0, "device": "cpu", "dtype": "float32"}
SHORT = [part for name, value in TRAIN.items() for part in (f"--train.{name}", str(value))]
WHO = ("The old teacher", "A young sailor", "My brother", "Their neighbour")
DID = ("has written", "was reading", "will send", "never opened")
WHAT = ("the letter about the harbour.", "a book of long stories.", "the list of all names.")
SENTENCES = [" ".join(words) for words in itertools.product(WHO, DID, WHAT)]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few modules in place of the installed ones."""
    files = []
    for number in range(12):
        path = tmp_path / f"module{number}.py"
        path.write_text(f'"""{" ".join(SENTENCES[4 * number : 4 * number + 4])}"""\n')
        files.append((f"lib/{path.name}", path))
    monkeypatch.setattr(docs, "sources", lambda: files)
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("recipe", ["docs", "captions", "news", "text", "tinystories"])
def test_a_recipe_does_its_work(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    text = [] if recipe == "docs" else ["--data.path", tmp_path / "text.txt"]
    run, student = tmp_path / "run", tmp_path / "student"
    assert command("train", recipe, *text, "--data.held-out", "4", "--out", run, *SMALL, *SHORT) == 0, said(
        capsys
    )
    rollouts = ("--flow-map.rollout-steps", "2")
    assert command("distill", "text-fmlm", "--teacher", run, "--out", student, *SHORT, *rollouts) == 0
    capsys.readouterr()
    assert command("generate", student, "--num", "3", "--seed", "1", "--dtype", "float32") == 0
    assert capsys.readouterr().out.count("\n\n") == 3


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "teacher", "student"),
    [
        ("lm1b", "bert-base-uncased/vocab.txt", "flm", "fmlm"),
        ("owt", "gpt2/encoder.json", "flm", None),
        ("lm1b", "bert-base-uncased/vocab.txt", "mdlm", "sdtt"),
        ("lm1b", "bert-base-uncased/vocab.txt", "duo", "duo-dcd"),
        ("lm1b", "bert-base-uncased/vocab.txt", "ar", None),
    ],
)
def test_a_preset_does_its_work(
    corpus: str,
    tokenizer: str,
    teacher: str,
    student: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it stands but for its shape and its steps: with the published tokenizer, and the teacher that it names.

    Its text is the corpus's in form alone.
    """
    if not (REAL / tokenizer).exists():
        pytest.skip(f"the published tokenizer is not there: {tokenizer}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = tmp_path / "texts"
    texts.mkdir()
    table = arrow.table({"text": SENTENCES})
    for name in ("train-00000-of-00001", "test-00000-of-00001")[: 2 if corpus == "lm1b" else 1]:
        parquet.write_table(table, texts / f"{name}.parquet")
    small = [*SMALL, "--model.length", "16"]
    short = [*SHORT, "--train.steps", "7", "--train.micro-batch", "2"]
    data = ["--data.path", texts, "--data.tokenizer", REAL / tokenizer, "--data.held-out", "4"]
    assert command("train", f"{corpus}-{teacher}", *data, *small, *short) == 0, said(capsys)
    if student is not None:
        assert command("distill", f"{corpus}-{student}", *short) == 0, said(capsys)
    run = tmp_path / "runs" / f"{corpus}-{student or teacher}"
    assert command("generate", run, "--num", "2", "--steps", "2", "--dtype", "float32") == 0, said(capsys)


def test_a_preset_asks_for_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("distill", "lm1b-fmlm") == 1
    assert "no run at runs/lm1b-flm: train the teacher first, or name another one with --teacher" in said(
        capsys
    )
