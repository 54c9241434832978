"""From a run to a report that stands alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flowlm.discrete import ar
from flowlm.evaluation.report import numbered
from flowlm.evaluation.run_report import write_report
from flowlm.evaluation.runs import evaluate_run, held_out_curve, shown_samples
from flowlm.model import FlowLM
from flowlm.trained_on import corpus_of
from helpers import flm, map_settings, settings, trained


def test_a_report_says_how_it_was_made(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    rows = evaluate_run(run, [1, 2], 12, seed=3, device="cpu", dtype="float32")
    shown = shown_samples(rows, run / "samples", 4)
    write_report(tmp_path / "report", run, rows, "flowlm evaluate run --seed 3", shown, seed=3)
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["command"] == "flowlm evaluate run --seed 3"
    assert report["seed"] == 3
    assert [(row["model"], row["nfe"]) for row in report["rows"]] == [
        ("FLM", 1),
        ("FLM", 2),
        ("held-out", 0),
        ("5-gram", 0),
    ]
    (made,) = report["runs"]
    assert made["steps"] == 30
    assert made["command"] in (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert (report["torch"], made["config"]["train"]["batch"]) == (torch.__version__, 8)
    assert "CPU cores" in report["machine"]
    assert report["held_out"] == [list(pair) for pair in held_out_curve(run)] != []
    assert {k: len(texts) for k, texts in report["samples"].items()} == {"1": 4, "2": 4}
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert "`flowlm evaluate run --seed 3`" in text
    assert all(line in text for line in numbered(report["samples"]["1"]).splitlines())


def test_the_losses_of_a_flow_map_are_told_apart(tmp_path: Path) -> None:
    """Those of what it was trained by rank nothing; those of its flow, learnt from the text, are as an FLM's."""
    for target in ("data", "teacher"):
        changes = {"train.eval_every": 4, "flow_map.diagonal_target": target}
        run = trained(tmp_path / target, map_settings(flm(), changes))
        rows = evaluate_run(run, [1], 4, device="cpu", dtype="float32")
        shown = shown_samples(rows, run / "samples", 1)
        write_report(tmp_path / "report", run, rows, "flowlm evaluate run", shown)
        report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
        text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
        assert [step for step, _ in report["held_out_diagonal"]] == [step for step, _ in report["held_out"]]
        assert "its targets move, so it ranks nothing): " + f"4: {report['held_out'][0][1]:.4f}, 8: " in text
        alone = "of its flow on the text alone, comparable with an FLM's (nats a token): "
        assert (f"{alone}4: {report['held_out_diagonal'][0][1]:.4f}, 8: " in text) == (target == "data")


def test_samples_of_one_setting_never_replace_anothers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    plain = evaluate_run(run, [2], 6, device="cpu", dtype="float32")
    noisy = evaluate_run(run, [2], 6, device="cpu", dtype="float32", gamma=0.5)
    names = sorted(path.name for path in (run / "samples").glob("nfe-*.jsonl"))
    assert names == ["nfe-0002-seed-0-gamma-0.5.jsonl", "nfe-0002-seed-0.jsonl"]
    assert (plain[0]["sampler"]["gamma"], noisy[0]["sampler"]["gamma"]) == (0.0, 0.5)


@pytest.mark.parametrize("objective", ["ar", "mdlm", "flow"])
def test_likelihoods_are_said(objective: str, tmp_path: Path) -> None:
    """That of AR is exact: its own losses of held-out passages say the same. Of MDLM it is a bound; a flow has none."""
    run = trained(tmp_path / "run", settings({"objective": objective, "train.eval_every": 4}))
    told: list[str] = []
    rows = evaluate_run(run, [2], 8, device="cpu", dtype="float32", say=told.append)
    lines = [line for line in told if "a held-out passage has" in line]
    if objective == "flow":
        assert lines == []
        assert "passage_nats" not in rows[0]
        return
    nats = rows[0]["passage_nats"]
    assert lines == [
        f"a held-out passage has {'at most ' * (objective == 'mdlm')}{nats:.2f} nats under the model, its end and "
        "filling included"
    ]
    if objective == "ar":
        model = FlowLM.from_pretrained(run, device="cpu")
        held_out = torch.from_numpy(np.asarray(corpus_of(run, model).held_out)).long()
        with torch.no_grad():
            own = ar.losses(model.denoiser.eval(), held_out).sum(1).mean()
        assert nats == pytest.approx(float(own), rel=1e-4)
    else:
        assert 0 < nats < 12 * math.log(200)
