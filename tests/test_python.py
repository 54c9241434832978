"""Training and distilling from Python do what the commands do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import flowlm
from flowlm.training.loop import Trainer
from helpers import command, corpus, flm, recipe, said, silent

SMALL = {"train.steps": 3, "train.eval_every": 0, "train.batch": 4}


def test_the_same_as_the_command(tmp_path: Path) -> None:
    path = recipe(tmp_path / "tiny.toml")
    model = flowlm.train(path, tmp_path / "a", SMALL, say=silent)
    options = ["--train.steps", "3", "--train.eval-every", "0", "--train.batch", "4"]
    assert command("train", path, "--out", tmp_path / "b", *options) == 0
    for name in ("config.toml", "model.safetensors", "ema.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not model.denoiser.config.two_times
    student = flowlm.distill(
        tmp_path / "a", tmp_path / "c", options=SMALL | {"train.device": "cpu"}, say=silent
    )
    assert student.denoiser.config.two_times
    assert flowlm.FlowLM.from_pretrained(tmp_path / "c").generate(2) == student.generate(2)
    assert f'path = "{corpus()}"' in (tmp_path / "c" / "config.toml").read_text()


def test_a_run_is_not_replaced_unless_told(tmp_path: Path) -> None:
    path = recipe(tmp_path / "tiny.toml")
    flowlm.train(path, tmp_path / "a", SMALL, say=silent)
    with pytest.raises(ValueError, match="already holds a run"):
        flowlm.train(path, tmp_path / "a", SMALL, say=silent)
    # and that is found before the text is read
    with pytest.raises(ValueError, match="already holds a run"):
        flowlm.train(path, tmp_path / "a", SMALL | {"data.path": "nowhere.txt"}, say=silent)
    flowlm.train(path, tmp_path / "a", SMALL, force=True, say=silent)


def test_an_interrupted_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path / "tiny.toml")
    whole = Trainer.train

    def interrupted(self: Trainer) -> object:
        self.interrupt()
        return whole(self)

    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flowlm.train(path, tmp_path / "a", SMALL, say=silent)


def test_numbers_of_passages_are_numbers() -> None:
    model = flowlm.FlowLM.from_pretrained(flm())
    for options, message in (
        ({"num": "three"}, "num must be a whole number, got 'three'"),
        ({"num": 2.5}, "num must be a whole number"),
        ({"num": True}, "num must be a whole number"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"num": 1, "steps": 1.5}, "steps must be a whole number"),
        ({"num": 1, "batch": -1}, "batch must be at least 0, got -1"),
        ({"num": 1, "seed": None}, "seed must be a whole number, got None"),
        ({"num": 1, "temperature": math.nan}, "temperature must be positive, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**options)
    assert len(model.generate(np.int64(2), steps=np.int32(1))) == 2


def test_a_recipe_is_named_and_paths_are_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a recipe, such as 'text'"):
        flowlm.train("", tmp_path / "a", say=silent)
    path = recipe(tmp_path / "tiny.toml", {"data.path": "nowhere.txt"})
    flowlm.train(path, tmp_path / "a", SMALL | {"data.path": corpus()}, say=silent)
    assert f'path = "{corpus()}"' in (tmp_path / "a" / "config.toml").read_text()


def test_a_student_takes_its_teachers_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says so of anything that is asked of it, though it be what a model has by default."""
    args = ("distill", "text-fmlm", "--teacher", flm(), "--out", tmp_path / "run")
    assert command(*args, "--model.length", "64", "--model.clock=decoding-error") == 1
    assert "made like its teacher: leave out --model.length, --model.clock" in said(capsys)
    with pytest.raises(ValueError, match=r"leave out model\.length"):
        flowlm.distill(flm(), tmp_path / "run", options={"model.length": 64})
    assert not (tmp_path / "run").exists()


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'train\.step': did you mean 'steps'"):
        flowlm.train(recipe(tmp_path / "tiny.toml"), tmp_path / "a", {"train.step": 3}, say=silent)
    with pytest.raises(ValueError, match="no recipe named 'captoins': did you mean 'captions'"):
        flowlm.train("captoins", tmp_path / "a", say=silent)
    with pytest.raises(ValueError, match=r"has no \[model\] of its own|a distillation has no"):
        flowlm.distill(tmp_path / "a", tmp_path / "b", "captions", say=silent)
