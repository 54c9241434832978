"""Every recipe for text, as it stands but for its size: trained, distilled, and written from in one call."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from flowlm.data import docs
from helpers import command, said

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
