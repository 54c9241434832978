"""The demo at the smallest scale: what it leaves, that it says what it does, and that it can be stopped."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from flowlm import demo
from flowlm.config import RunConfig
from flowlm.data.grammar import Grammar
from flowlm.evaluation.samples import read_samples
from flowlm.training.checkpoint import RunDirectory
from flowlm.training.loop import Trainer
from helpers import TINY, command, said

BACKBONE = TINY["model"]["backbone"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes with a tiny network and little data; steps as slow as on a very slow machine."""
    stage = demo._stage_config

    def shrunk(*args: Any, **options: Any) -> RunConfig:
        config = stage(*args, **options)
        if not config.teacher:
            backbone = dataclasses.replace(config.model.backbone, **BACKBONE)
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, num=300, held_out=20),
            train=dataclasses.replace(config.train, batch=8),
        )

    monkeypatch.setattr(demo, "_stage_config", shrunk)

    def time_steps(trainer: Trainer) -> tuple[float, float]:
        for trainer.step in range(2):  # the second stage is timed with a teacher that has moved
            trainer.optimize()
        return 0.0, 4.0

    monkeypatch.setattr(demo, "_time_steps", time_steps)
    monkeypatch.setattr(demo, "FLOW_STEPS", (1, 4))
    monkeypatch.setattr(demo, "MAP_STEPS", (1, 2))


def test_the_whole_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    compared = tmp_path / "compared.json"
    tables = [{"caption": "Valid passages, %", "rows": [{"model": "AR", "1": "", "64": "94.9 ± 1.0"}]}]
    compared.write_text(json.dumps({"command": "flowlm compare x", "about": "commit abc", "tables": tables}))
    monkeypatch.setattr(demo, "COMPARED", compared)
    out = tmp_path / "demo"
    assert (
        command("demo", "--minutes", "1", "--num", "12", "--out", out, "--device", "cpu", "--seed", "3") == 0
    )
    text = said(capsys)
    for part in (
        "The plan, 1 minutes",
        "1. FLM",
        "2. FMLM",
        "3. Judge by the law",
        f"flowlm generate {out}/fmlm",
    ):
        assert part in text
    made = {"demo.json", "flm", "fmlm", "report.json", "report.html", "quality.png"}
    assert {p.name for p in out.iterdir()} == made
    report = json.loads((out / "report.json").read_text())
    names = [(row["model"], row["nfe"]) for row in report["rows"]]
    assert names == [("FLM", 1), ("FLM", 4), ("FMLM", 1), ("FMLM", 2), ("law", 0)]
    assert report["law"]["hash"] == Grammar().hash
    assert report["seed"] == 3
    assert report["steps"]["flm"] >= 10
    assert report["recipes"]["flm"]["model"]["backbone"]["width"] == 32
    header, records = read_samples(out / "fmlm" / "samples" / "nfe-0001-seed-3.jsonl")
    assert header.nfe == 1
    html = (out / "report.html").read_text()
    shown = text.split("Ten stories, each written in one network call:")[1]
    assert len(records) >= 10
    for record in records[:10]:
        assert " ".join(record.text.split()) in shown
    assert "Ten stories, one network call each" in html
    for part in ("families of models on this language", "flowlm compare x, commit abc", "Valid passages, %"):
        assert part in html
        assert part in text
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    for name in ("flm", "fmlm"):
        assert RunDirectory(out / name).steps()


def test_an_interruption_saves_the_stage_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def pressed(self: Trainer) -> Any:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", pressed)
    out = tmp_path / "demo"
    assert command("demo", "--minutes", "1", "--num", "12", "--out", out, "--device", "cpu") == 130
    text = said(capsys)
    assert (
        f"interrupted at step 3; everything is saved. Continue with: flowlm train --resume {out}/flm" in text
    )
    assert "Traceback" not in text
    assert RunDirectory(out / "flm").steps() == [3]
    assert not (out / "fmlm").exists()
    assert not (out / "report.json").exists()


def test_runs_that_no_demo_made_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "runs" / "flm" / "model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"hours of work")
    assert command("demo", "--minutes", "1", "--out", tmp_path / "runs", "--device", "cpu") == 1
    assert "holds flm that no demo made" in said(capsys)
    report = tmp_path / "other" / "report.json"
    report.parent.mkdir()
    report.write_text("mine")
    assert command("demo", "--minutes", "1", "--out", tmp_path / "other", "--device", "cpu") == 1
    assert "holds report.json that no demo made" in said(capsys)
    assert report.read_text() == "mine"
    assert precious.read_bytes() == b"hours of work"
