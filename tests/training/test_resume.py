"""A killed run goes on, bit for bit, as if it had not been killed.

Training runs in a process of its own, which kills itself (SIGKILL: no handler, no clean-up) at an operation
on a file of its run: a chosen one, or the n-th for n all over the run, between steps, inside a checkpoint,
between the checkpoint and its export, while pruning. Or it is killed from outside, whatever it is at.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from flowlm.training.checkpoint import RunDirectory
from helpers import command, content, map_values, recipe, settings, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system"),
]

_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
#: An operation to be killed at: the n-th, or the first whose name and path match; "" for none.
Kill = int | str


def _work(args: Sequence[str], run: str, kill: Kill, log: str) -> None:
    """A command that is killed at an operation in the run; writes down how many operations there were."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    count = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or not isinstance(values[0], (str, os.PathLike)):
            return
        path = str(values[0])
        # Whole folders are removed by names relative to them.
        if path.startswith(run) or (event in ("os.remove", "os.rmdir") and not os.path.isabs(path)):
            count += 1
            if count == kill if isinstance(kill, int) else kill and re.search(kill, f"{event} {path}"):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = command(*args)
    Path(log).with_suffix(".count").write_text(str(count))
    sys.exit(code)


class Bench:
    """A folder in which one recipe is run by processes that may be killed.

    Args:
        folder: holds the recipe, `whole` (the run that nothing disturbed) and what the commands print.
        start: the command that begins a run: train or distill.
        path: the recipe.
    """

    def __init__(self, folder: Path, start: str, path: Path) -> None:
        self.log, self.whole = folder / "log.txt", folder / "whole"
        self._start, self._recipe = start, path
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["flowlm.training.loop", "tyro", "torch._dynamo"])
        assert self.finish(self.whole) == 0, self.log.read_text()
        self.operations = int(self.log.with_suffix(".count").read_text())

    def begin(self, run: Path, kill: Kill = "") -> Any:
        """A process that begins the run, or goes on with it where there is a checkpoint."""
        args = [self._start, str(self._recipe), "--out", str(run), "--force"]
        if RunDirectory(run).steps():
            args = ["train", "--resume", str(run)]
        process = self._context.Process(target=_work, args=(args, str(run), kill, str(self.log)))
        process.start()
        return process

    def finish(self, run: Path, kill: Kill = "") -> int:
        """The exit code of that process; negative when a signal ended it."""
        process = self.begin(run, kill)
        process.join(300)
        assert process.exitcode is not None, self.log.read_text()
        return int(process.exitcode)

    def kill(self, run: Path, at: Kill) -> None:
        """The run as a kill leaves it."""
        assert self.finish(run, at) == -signal.SIGKILL, self.log.read_text()

    def check(self, run: Path) -> None:
        """The run, when gone on with, is the undisturbed one to the last byte, and holds nothing else."""
        assert self.finish(run) == 0, self.log.read_text()
        expected, found = content(self.whole), content(run)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An FLM with dropout, in micro-batches; checkpoints at 3, 6, 9, 12 and 15."""
    folder = tmp_path_factory.mktemp("flow")
    over = {
        "model.backbone.dropout": 0.2,
        "train.steps": 15,
        "train.save_every": 3,
        "train.eval_every": 5,
        "train.micro_batch": 3,
    }
    return Bench(folder, "train", recipe(folder / "flow.toml", over))


@pytest.fixture(scope="module")
def flow_map(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A distillation with dropout, averaged targets and the adaptive clock."""
    folder = tmp_path_factory.mktemp("flow-map")
    teacher = trained(folder / "teacher", settings({"train.steps": 4, "model.backbone.dropout": 0.1}))
    over = {
        "train.steps": 12,
        "train.save_every": 3,
        "train.eval_every": 2,
        "train.keep": 1,
        "clock.kind": "adaptive",
        "clock.refit_every": 2,
        "flow_map.boundary": 0.5,
        "flow_map.boundary_target": "teacher",
        "flow_map.rollout_steps": 2,
        "flow_map.target": "averaged",
        "flow_map.freeze_embedding": True,
    }
    path = folder / "map.toml"
    path.write_text(tomli_w.dumps(map_values(teacher, over)))
    return Bench(folder, "distill", path)


def test_killed_wherever_it_hurts(flow: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = RunDirectory(run).steps
    flow.kill(run, r"open .*/\.step-00000003\..*/\.optimizer")  # inside the first checkpoint: begin again
    assert kept() == []
    flow.kill(run, r"open .*/\.step-00000006\..*/\.state\.json")  # inside the second, all weights written
    assert kept() == [3]
    assert list(run.glob("checkpoints/.step-00000006.*.tmp/optimizer.safetensors"))
    # what a machine that lost power might leave: a file cut short
    for leftover in run.glob("checkpoints/.step-00000006.*.tmp/optimizer.safetensors"):
        os.truncate(leftover, 100)
    flow.kill(run, r"os\.rename .*/\.step-00000009\.\d+\.tmp$")  # complete, not yet in its place
    assert kept() == [3, 6]
    flow.kill(run, r"os\.link .*/step-00000012/ema\.safetensors$")  # in its place, half exported
    assert kept() == [6, 9, 12]
    flow.kill(run, r"os\.remove [^/]+$")  # half-way through removing an old one
    flow.kill(run, r"os\.link .*/step-00000015/model\.safetensors$")  # after the last step, before the export
    assert kept()[-1] == 15
    assert (run / "model.safetensors").read_bytes() != (flow.whole / "model.safetensors").read_bytes()
    flow.check(run)
    assert "resumed" in flow.log.read_text()


@pytest.mark.parametrize("objective", ["flow", "flow_map"])
def test_killed_anywhere(objective: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(objective)
    rng = random.Random(objective)
    run = tmp_path / "run"
    # The first operations make the run; then a checkpoint or two, and some more after the resume.
    bench.kill(run, rng.randint(bench.operations // 3, bench.operations // 2))
    first = RunDirectory(run).steps()
    assert first
    bench.kill(run, rng.randint(bench.operations // 6, bench.operations // 3))
    assert RunDirectory(run).steps()[-1] >= first[-1]
    bench.check(run)


def test_killed_from_outside(flow: Bench, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", random.Random(0)
    log = run / "metrics.jsonl"
    for lines in (4, 9, 13):
        process = flow.begin(run)
        deadline = time.monotonic() + 300
        while process.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), flow.log.read_text()
    flow.check(run)
