"""What weakens an evaluation is said or refused: few, empty and cut texts, folders with something else in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flowlm.evaluation import runs
from flowlm.evaluation.run_report import check_report
from flowlm.evaluation.runs import evaluate_run, score_file
from flowlm.evaluation.samples import Header, Record, write_samples
from flowlm.evaluation.scorers import ARScorer
from helpers import LINES, command, flm, grammar_flm, said, settings, trained


def sample_file(path: Path, texts: list[str]) -> Path:
    write_samples(path, Header(model="m"), [Record(i, text, [], 1, 0) for i, text in enumerate(texts)])
    return path


def test_few_samples_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    score_file(sample_file(tmp_path / "few.jsonl", LINES[:99]), say=told.append)
    assert told == [
        "few.jsonl: 99 samples are few, and what they say is loose: take 100 at least, better 1,000"
    ]
    told.clear()
    score_file(sample_file(tmp_path / "enough.jsonl", LINES[:100]), say=told.append)
    assert told == []
    assert command("evaluate", tmp_path / "few.jsonl") == 0
    assert "99 samples are few" in said(capsys)


def test_empty_texts_are_said(tmp_path: Path) -> None:
    told: list[str] = []
    path = sample_file(tmp_path / "some.jsonl", [*LINES[:100], "", " [EOS] late"])
    row = score_file(path, say=told.append)
    assert row["num"] == 102
    assert told == [
        "some.jsonl: 2 of 102 texts are empty: they count as passages with nothing in them, and lower the entropy"
    ]


def test_a_file_of_empty_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sample_file(tmp_path / "none.jsonl", ["", " [EOS] late"])
    assert command("evaluate", path) == 1
    assert "none.jsonl: all 2 texts are empty: there is nothing to measure" in said(capsys)
    with pytest.raises(ValueError, match="texts is empty"):
        score_file(sample_file(tmp_path / "bare.jsonl", []))


def test_a_model_that_writes_nothing_has_a_row_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one step count perhaps, and not at others: the others are not thrown away."""
    shutil.copytree(flm(), tmp_path / "run")
    monkeypatch.setattr("flowlm.model.FlowLM._text", lambda self, row: "")
    told: list[str] = []
    rows = evaluate_run(tmp_path / "run", [1, 2], 4, device="cpu", dtype="float32", say=told.append)
    assert [row["entropy"] for row in rows[:2]] == [0.0, 0.0]
    assert sum("4 of 4 texts are empty" in line for line in told) == 2


def test_a_scorer_that_cuts_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))
    run = trained(tmp_path / "ar", settings({"objective": "ar", "train.steps": 2, "train.eval_every": 0}))
    path = sample_file(tmp_path / "s.jsonl", [*LINES[:100], f"{LINES[0]} {LINES[1]}"])
    for _ in range(2):  # the second time from the cache
        told: list[str] = []
        row = score_file(path, scorer=ARScorer(run, device="cpu"), say=told.append)
        assert row["cut"] == 1
        assert told[-1].startswith("1 of 101 texts are longer than the scorer reads, and were cut: AR ar ")
    assert score_file(path)["cut"] is None


def test_a_scorer_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sample_file(tmp_path / "s.jsonl", LINES)
    assert command("evaluate", path, "--scorer", tmp_path / "gone") == 1
    assert "gone: give a run of objective = 'ar', a folder with a causal model" in said(capsys)


def test_samples_of_another_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"format": "flowlm-samples/2"}\n{"id": 0, "text": "a"}\n')
    assert command("evaluate", path) == 1
    assert "line 1: format 'flowlm-samples/2'; this version reads 'flowlm-samples/1'" in said(capsys)


def test_a_report_replaces_its_own_kind_alone(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    check_report(folder, "a")
    folder.mkdir()
    check_report(folder, "a")
    (folder / "report.json").write_text(json.dumps({"command": "a"}))
    (folder / "README.md").write_text("x")
    check_report(folder, "a")
    with pytest.raises(
        ValueError, match="already holds the report of `a`: choose another folder with --report"
    ):
        check_report(folder, "b")
    check_report(folder, "b", force=True)
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"already holds files that are no report: .* write into it with --force"
    ):
        check_report(folder, "a")
    (folder / "thesis.txt").unlink()
    for content in ("{", "[]", "{}"):
        (folder / "report.json").write_text(content)
        with pytest.raises(ValueError, match="files that are no report"):
            check_report(folder, "a")
    with pytest.raises(ValueError, match=r"README\.md is a file"):
        check_report(folder / "README.md", "a")


def test_a_report_over_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = tmp_path / "run", tmp_path / "report"
    shutil.copytree(flm(), run)
    args: list[Any] = ["evaluate", run, "--steps", "1", "--num", "4", "--report", folder]
    assert command(*args) == 0
    assert command(*args) == 0  # the same again
    other = [*args, "--seed", "1"]
    before = (folder / "report.json").read_text()
    assert command(*other) == 1
    assert "already holds the report of `flowlm evaluate" in said(capsys)
    assert not (run / "samples" / "nfe-0001-seed-1.jsonl").exists()  # said before anything is done
    assert (folder / "report.json").read_text() == before
    assert command(*other, "--force") == 0
    assert command(*other) == 0  # --force is no part of what is measured
    assert json.loads((folder / "report.json").read_text())["command"].endswith("--seed 1")


def test_a_model_s_rows_have_their_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(grammar_flm(), run)
    asked: list[tuple[int, int]] = []
    whole = runs.FlowLM.generate

    def generate(self: Any, num: int, steps: int = 1, **options: Any) -> list[str]:
        asked.append((num, steps))
        return whole(self, num, steps, **options)

    monkeypatch.setattr(runs.FlowLM, "generate", generate)
    # the second to sixth take 4, 1, 3, 2, 5 seconds
    ticks = iter([0, 9, 0, 100, 0, 4, 0, 1, 0, 3, 0, 2, 0, 5])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(ticks))
    (row,) = evaluate_run(run, [3], 4, device="cpu", dtype="float32")
    assert asked == [(1, 3)] * 6
    assert (row["latency"], row["seconds"]) == (3, 9)
    again = score_file(run / "samples" / "nfe-0003-seed-0.jsonl")
    assert again["latency"] == 3
    assert again["tokens_per_second"] == row["tokens_per_second"] == pytest.approx(4 * 64 / 9)
