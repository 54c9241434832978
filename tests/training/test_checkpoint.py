"""Run directories: what they hold, that nothing in them is pickled, and what is left when a disk fails."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from flowlm import files
from flowlm.model import FlowLM
from flowlm.training import checkpoint
from flowlm.training.checkpoint import Metrics, RunDirectory
from flowlm.training.loop import open_run
from helpers import begin, content, flm, fmlm, map_settings, settings, silent, tensors, trained

KINDS = {".toml", ".json", ".jsonl", ".safetensors", ".txt"}


@pytest.mark.parametrize("run", [flm, fmlm])
def test_what_a_run_holds(run: Callable[[], Path]) -> None:
    names = set(content(run()))
    assert names >= {
        "config.toml",
        "config.json",
        "model.safetensors",
        "ema.safetensors",
        "tokenizer.json",
        "clock.json",
        "data.json",
        "metrics.jsonl",
    }
    steps = RunDirectory(run()).steps()
    assert len(steps) == 2
    for step in steps:
        folder = f"checkpoints/step-{step:08d}"
        assert {name for name in names if name.startswith(folder)} == {
            f"{folder}/{name}"
            for name in (
                "model.safetensors",
                "ema.safetensors",
                "optimizer.safetensors",
                "clock.json",
                "state.json",
            )
        }
    assert any(name.startswith("samples/step-") for name in names)
    assert {Path(name).suffix for name in names} == KINDS


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    for module, name in (
        (torch, "load"),
        (torch, "save"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "dump"),
        (pickle, "dumps"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, refuse)
    over = {"train.steps": 2, "clock.kind": "adaptive"}
    run = trained(tmp_path / "run", map_settings(flm(), over))
    assert open_run(run, say=silent).train().finished
    FlowLM.from_pretrained(run).save_pretrained(tmp_path / "model")
    assert FlowLM.from_pretrained(tmp_path / "model").generate(1)
    for path in (*run.rglob("*"), *(tmp_path / "model").rglob("*")):
        assert path.is_dir() or path.suffix in KINDS, path
        # neither a zip archive, as torch.save writes, nor a pickle stream
        assert path.is_dir() or path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"), (
            path
        )


def test_pruning_keeps_the_newest_and_the_chosen(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (2, 4, 6, 8, 10):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").write_text("{}")
    run.prune(2, 4)
    assert run.steps() == [4, 8, 10]
    run.prune(1, None)
    assert run.steps() == [10]


def test_a_kill_while_a_checkpoint_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is no checkpoint, and goes with the next resume."""
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2):
        folder = run.checkpoint(step)
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "state.json"):
            (folder / name).write_text("{}")

    def killed(folder: Path, **options: Any) -> None:
        for path in Path(folder).glob("state.json"):
            path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr("flowlm.training.checkpoint.shutil.rmtree", killed)
        run.prune(1, None)
    assert run.steps() == [2]
    run.sweep()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000002"]


def test_folders_without_their_state_are_no_checkpoints(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.steps() == []
    for name in ("step-00000003", "step-x", ".step-00000004.1.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / ".step-00000004.1.tmp" / "state.json").write_text("{}")
    assert run.steps() == []
    (run.checkpoints / "step-00000003" / "state.json").write_text("{}")
    assert run.steps() == [3]


def test_a_resume_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    before = content(run)
    leftovers = [
        run / "checkpoints" / ".step-00000040.77.tmp" / "model.safetensors",
        run / ".model.safetensors.77.ab.tmp",
        run / "samples" / ".step-00000040.txt.77.ab.tmp",
    ]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    open_run(run, say=silent)
    assert content(run) == before


def test_a_resume_exports_what_a_kill_left_unexported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    before = content(run)
    for name in ("model.safetensors", "ema.safetensors", "clock.json", "config.json"):
        (run / name).unlink()
    open_run(run, say=silent)
    assert content(run) == before


# -------------------------------------------------------------------------------------------------- a failing disk


def _full(monkeypatch: pytest.MonkeyPatch, how: str, at: int) -> None:
    """A disk that is full from the at-th file of weights on."""
    count = 0
    save = safetensors.torch.save_file

    def write(flat: dict[str, Tensor], path: Path) -> None:
        nonlocal count
        count += 1
        if count < at:
            save(flat, path)
            return
        Path(path).write_bytes(b"cut short")
        if how == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if how == "fsync":

        def sync(path: Path) -> None:
            nonlocal count
            count += Path(path).name.startswith(".optimizer")
            if count == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files, "sync", sync)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", write)


@pytest.mark.parametrize("how", ["safetensors", "system", "fsync"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", settings())
    trainer = begin(tmp_path / "run", settings())
    good = trainer.run.checkpoint(4)
    with monkeypatch.context() as patch:
        _full(patch, how, at=6)  # the third file of the second checkpoint
        with pytest.raises(OSError, match=r"could not save the checkpoint of step 8") as caught:
            trainer.train()
    message = str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert "No space left on device" in message
    assert "free some space" in message
    assert f"the last good checkpoint is {good}" in message
    assert trainer.run.steps() == [4]
    assert not list(trainer.run.checkpoints.glob(".*"))
    assert FlowLM.from_pretrained(tmp_path / "run").generate(1)
    # with space again, the run goes on as if nothing had been
    assert open_run(tmp_path / "run", say=silent).train().finished
    assert content(tmp_path / "run") == content(whole)


def test_too_little_space_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = begin(tmp_path / "run", settings())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=2**20 // 4))
    with pytest.raises(OSError, match=r"the disk is full: \d+ MiB are needed, 0 are free; there is none yet"):
        trainer.train()
    assert list(trainer.run.checkpoints.iterdir()) == []


# ------------------------------------------------------------------------------------------- damaged checkpoints


def _damaged(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    return run / "checkpoints" / "step-00000030"


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("size", [0, 100, -1])
def test_weights_cut_short_are_named(name: str, size: int, tmp_path: Path) -> None:
    path = _damaged(tmp_path) / f"{name}.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{path} is damaged or cut short"):
        open_run(tmp_path / "run", say=silent)


def test_weights_that_are_gone_are_named(tmp_path: Path) -> None:
    (_damaged(tmp_path) / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights at .*step-00000030/ema\.safetensors"):
        open_run(tmp_path / "run", say=silent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"step-00000030/state\.json cannot be read .*: remove .*step-00000030 to use an older one"),
        ('{"format": "flowlm-checkpoint/9"}', r"has format 'flowlm-checkpoint/9', this version reads"),
    ],
)
def test_a_state_of_another_kind_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (_damaged(tmp_path) / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path / "run", say=silent)


def test_an_older_checkpoint_serves_when_the_newest_is_removed(tmp_path: Path) -> None:
    shutil.rmtree(_damaged(tmp_path))
    trainer = open_run(tmp_path / "run", say=silent)
    assert trainer.step == 28
    assert trainer.train().finished
    assert content(tmp_path / "run") == content(flm())


def test_the_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = _damaged(tmp_path)
    state = tensors(folder / "optimizer.safetensors")
    state["other/exp_avg"] = state.pop("embedding/exp_avg")
    safetensors.torch.save_file(state, folder / "optimizer.safetensors")
    with pytest.raises(ValueError, match="optimizer state is of another model: unknown parameters other"):
        open_run(tmp_path / "run", say=silent)


# --------------------------------------------------------------------------------------------------------- metrics


def test_metrics_forget_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.resume_at(3)  # nothing there yet
    for step in range(1, 6):
        metrics.write(step=step, loss=torch.tensor(0.5 * step))
    with path.open("a") as file:
        file.write('{"step": 2, "los')  # a kill in the middle of a line
    metrics.resume_at(3)
    metrics.write(step=4, loss=7.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": 7.0},
    ]


def test_force_removes_only_what_a_run_made(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create("")
    thesis = run.path / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match=r"holds what no run made \(thesis\.tex\)"):
        run.create("", force=True)
    assert thesis.read_text() == "years of work"
    thesis.unlink()
    (run.path / "tokenizer_config.json").write_text("{}")  # that of a tokenizer made elsewhere
    run.create("objective = 'flow'", force=True)
    assert (run.path / "config.toml").read_text() == "objective = 'flow'"
    assert not (run.path / "tokenizer_config.json").exists()
