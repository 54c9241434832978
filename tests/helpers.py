"""Runs small enough to train in a second, shared by the tests of training, model files and the command line."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowlm.cli import main
from flowlm.config import RunConfig, from_dict, merge, nested
from flowlm.training.loop import Trainer

#: Real texts and tokenizer files, which the project does not bring; tests that read them are skipped without.
REAL = Path(os.environ.get("FLOWLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

_FOLDER = tempfile.TemporaryDirectory(prefix="flowlm-tests-")  # removed when the tests end

LINES = [
    f"the {a} {b} saw {c} {d}."
    for a, b, c, d in itertools.product(
        ("big", "old", "sad", "red"), ("cat", "dog", "cow"), ("a", "the", "my"), ("hen", "fox", "mouse")
    )
]

TINY: dict[str, Any] = {
    "model": {"length": 12, "backbone": {"width": 32, "depth": 1, "heads": 2, "conditioning": 32}},
    "data": {"corpus": "text", "held_out": 10},
    "optim": {"warmup": 2},
    "train": {
        "steps": 8,
        "batch": 8,
        "eval_every": 4,
        "save_every": 4,
        "log_every": 1,
        "sample_steps": 2,
        "device": "cpu",
        "dtype": "float32",
    },
}


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def silent(message: str) -> None:
    """Where messages go that no test reads."""


@functools.cache
def corpus() -> Path:
    """A text of 108 different lines of seven tokens."""
    path = Path(_FOLDER.name) / "corpus.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def values(over: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a tiny recipe says, with dotted overrides."""
    return merge(merge(TINY, {"data": {"path": str(corpus())}}), nested(over or {}))


def settings(over: dict[str, Any] | None = None) -> RunConfig:
    """The configuration of a tiny run, with dotted overrides."""
    return from_dict(RunConfig, values(over))


def recipe(path: Path, over: dict[str, Any] | None = None) -> Path:
    """The same as a file."""
    path.write_text(tomli_w.dumps(values(over)))
    return path


def map_values(teacher: Path, over: dict[str, Any] | None = None) -> dict[str, Any]:
    """A distillation's recipe: what the teacher decides left out."""
    out = merge(values(), nested(over or {})) | {"objective": "flow-map", "teacher": str(teacher)}
    del out["model"]
    return out


def map_settings(teacher: Path, over: dict[str, Any] | None = None) -> RunConfig:
    """The configuration of a tiny distillation."""
    return from_dict(RunConfig, map_values(teacher, over))


def begin(folder: Path, config: RunConfig) -> Trainer:
    """A trainer with its run directory made."""
    trainer = Trainer(config, folder, say=silent)
    trainer.start()
    return trainer


def trained(folder: Path, config: RunConfig) -> Path:
    """A finished run."""
    assert begin(folder, config).train().finished
    return folder


@functools.cache
def flm() -> Path:
    """A finished FLM, not to be changed."""
    return trained(Path(_FOLDER.name) / "flm", settings({"train.steps": 30, "train.eval_every": 0}))


@functools.cache
def fmlm() -> Path:
    """An FMLM distilled from `flm`, not to be changed."""
    return trained(Path(_FOLDER.name) / "fmlm", map_settings(flm()))


@functools.cache
def grammar_flm() -> Path:
    """An FLM on the grammar, hardly trained, not to be changed."""
    over = {"model.length": 64, "data.corpus": "grammar", "data.path": "", "data.num": 500, "train.steps": 2}
    return trained(Path(_FOLDER.name) / "grammar", settings(over))


def tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file."""
    return dict(safetensors.torch.load_file(path))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the times, which no two runs share."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its relative path; metrics without their times."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if "metrics.jsonl" in found:
        found["metrics.jsonl"] = json.dumps(metrics(folder)).encode()
    return found


def command(*args: str | Path) -> int:
    """Exit status of a command, whichever way it ends."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, both streams, without line breaks and boxes."""
    captured = capsys.readouterr()
    return re.sub(r"[\s│╭╮╰╯─]+", " ", captured.out + captured.err)
