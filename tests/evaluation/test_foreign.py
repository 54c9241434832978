"""Sample files of any program, judged by a text that is given beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowlm.data.grammar import Grammar
from flowlm.evaluation.runs import evaluate_file
from helpers import LINES, command, corpus, flm, said


def foreign(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def measured(path: Path, *args: Any) -> list[dict[str, Any]]:
    out = path.with_suffix(".rows")
    assert command("evaluate", path, "--json", out, "--force", *args) == 0
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def test_without_a_text_what_needs_none(tmp_path: Path) -> None:
    (row,) = measured(foreign(tmp_path / "a.jsonl", [f"a{i} b{i} c{i} d{i} e{i}" for i in range(120)]))
    assert row["perplexity"] is row["copied"] is row["known"] is None
    assert row["self_bleu"] < 0.1
    (same,) = measured(foreign(tmp_path / "b.jsonl", ["the same words each time"] * 120))
    assert same["self_bleu"] == pytest.approx(1.0)


def test_by_a_text(tmp_path: Path) -> None:
    """What stands in the text is copied and known; other words are not; beside it what is no model."""
    text = ("--data.path", corpus())
    own, held, ngram = measured(foreign(tmp_path / "a.jsonl", LINES), *text)
    assert (own["known"], own["num"]) == (1.0, len(LINES))
    assert own["copied"] > 0.8  # all but what is held out
    assert (held["model"], ngram["model"]) == ("held-out", "5-gram")
    assert ngram["num"] == len(LINES)
    assert own["scorer"] == held["scorer"] == ngram["scorer"]
    other = measured(foreign(tmp_path / "b.jsonl", ["quite xyzzy plugh indeed"] * 120), *text)[0]
    assert other["copied"] == 0
    assert other["known"] < 0.5
    assert other["perplexity"] > 5 * own["perplexity"]


def test_by_the_text_of_a_run(tmp_path: Path) -> None:
    """A run stands for its text, in the same rows; the seed is of what the file is compared with."""
    path = foreign(tmp_path / "a.jsonl", LINES)
    rows = measured(path, "--data.path", flm())
    assert [row["model"] for row in rows[1:]] == ["held-out", "5-gram"]
    assert rows[0]["known"] == 1.0
    again = measured(path, "--data.path", flm(), "--seed", "5")
    assert again[0]["perplexity"] == rows[0]["perplexity"]
    assert again[2]["perplexity"] != rows[2]["perplexity"]


def test_by_a_scorer_too(tmp_path: Path) -> None:
    from flowlm.evaluation.scorers import ARScorer
    from helpers import settings, trained

    run = trained(tmp_path / "ar", settings({"objective": "ar"}))
    rows = evaluate_file(
        foreign(tmp_path / "a.jsonl", LINES), text=str(corpus()), scorer=ARScorer(run, device="cpu")
    )
    assert len({row["scorer"] for row in rows}) == 1
    assert all(row["perplexity"] != row["ngram_perplexity"] for row in rows)
    assert all(row["frechet"] is not None for row in rows[:2])


def test_a_law_and_a_text(tmp_path: Path) -> None:
    """A file that names the law is judged by it; its text is asked for beside."""
    from flowlm.evaluation.samples import Header, Record, write_samples

    path, text = tmp_path / "stories.jsonl", tmp_path / "text.txt"
    stories = Grammar().sample(120, seed=1)
    records = [Record(i, story, [], 1, 0) for i, story in enumerate(stories)]
    write_samples(path, Header(model="m", extra={"law": Grammar().hash}), records)
    text.write_text("\n".join(Grammar().sample(300, seed=2)))
    own, held, ngram, law = measured(path, "--data.path", text)
    assert own["valid"] == held["valid"] == law["valid"] == 1.0
    assert own["ngram_perplexity"] < 20
    assert ngram["valid"] < 1


def test_what_is_wrong_is_told_before_the_text_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": 3}\n')
    with monkeypatch.context() as patch:
        patch.setattr("flowlm.evaluation.runs.load_corpus", lambda *a, **k: pytest.fail("read"))
        assert command("evaluate", broken, "--data.path", corpus()) == 1
    assert "broken.jsonl" in said(capsys)
    good = foreign(tmp_path / "a.jsonl", LINES)
    assert command("evaluate", good, "--data.path", tmp_path / "gone.txt") == 1
    assert "gone.txt' does not exist" in said(capsys)
