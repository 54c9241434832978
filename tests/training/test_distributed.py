"""Several processes on one run: what they learn is what one learns, and they end together."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flowlm.cli import main
from flowlm.config import RunConfig, dump_toml
from flowlm.training import distributed
from flowlm.training.checkpoint import RunDirectory
from flowlm.training.distributed import Ranks, Shards, device_of, joined, launched, rank_lost
from helpers import command, flm, map_settings, metrics, recipe, said, settings, silent, tensors, trained

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

#: Without Muon, whose iteration in bfloat16 would make rounding a thousand times larger.
PLAIN = {"optim.muon_lr": 0.0, "train.steps": 4}


def _work(args: Sequence[str], environment: dict[str, str], log: str) -> None:
    """One rank: a command, what it prints in a file of its own."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main(list(args)))


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(num: int, folder: Path, *args: str | Path) -> list[str]:
    """A command in num processes, as torchrun would start them without its own six seconds; what each printed.

    The exit status, where it is not 0, comes after it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["flowlm.training.loop", "tyro", "torch.distributed.fsdp", "torch._dynamo"]
    )
    port = _port()
    processes, logs = [], [folder / f"rank-{i}.log" for i in range(num)]
    for i, log in enumerate(logs):
        environment = {
            "RANK": str(i),
            "LOCAL_RANK": str(i),
            "WORLD_SIZE": str(num),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        process = context.Process(target=_work, args=([str(arg) for arg in args], environment, str(log)))
        process.start()
        processes.append(process)
    out = []
    for process, log in zip(processes, logs):
        process.join(120)
        assert process.exitcode is not None, log.read_text()
        out.append(log.read_text() + (f"exit {process.exitcode}" if process.exitcode else ""))
    return out


def train(num: int, out: Path, config: RunConfig, *args: str | Path) -> Path:
    """A run of a configuration by num processes."""
    file = out.with_suffix(".toml")
    file.write_text(dump_toml(config))
    printed = ranks(num, out.parent, "train", file, "--out", out, *args)
    assert "done: step" in printed[0]
    assert not any("exit" in text for text in printed), printed
    assert not any(printed[1:]), printed  # the first one speaks for all
    return out


def mdlm_settings(over: dict[str, Any]) -> RunConfig:
    return settings({"objective": "mdlm", **over})


def check_alike(one: Path, other: Path) -> None:
    """The same losses and files, within rounding."""
    assert len(metrics(one)) == len(metrics(other))
    for line, theirs in zip(metrics(one), metrics(other)):
        assert line.keys() == theirs.keys()
        for name in line.keys() & {"loss", "held_out", "gradient_norm", "sample_entropy", "outside"}:
            assert theirs[name] == pytest.approx(line[name], rel=1e-4), name
    names = {str(path.relative_to(one)) for path in one.rglob("*")}
    assert {str(path.relative_to(other)) for path in other.rglob("*")} == names
    for name in (n for n in names if n.endswith(".safetensors")):
        mine, theirs = tensors(one / name), tensors(other / name)
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items()
        }, name


def check_weights(start: Path, one: Path, other: Path) -> None:
    """They went the same way from the same start."""
    before = tensors(start / "ema.safetensors")
    theirs = tensors(other / "model.safetensors")
    for name, value in tensors(one / "model.safetensors").items():
        change = (value - before[name]).norm() if name in before else value.norm()
        # Adam divides by the gradient's own size: where it is almost zero, rounding decides its sign.
        assert (theirs[name] - value).norm() <= 0.02 * change + 1e-7, name


CASES: dict[str, Callable[[], RunConfig]] = {
    "flow": lambda: settings({**PLAIN, "init": str(flm()), "clock.kind": "adaptive", "clock.refit_every": 2}),
    # The average as a target, weights by observed losses, and every kind of row.
    "flow-map": lambda: map_settings(
        flm(),
        {
            **PLAIN,
            "flow_map.target": "averaged",
            "flow_map.boundary": 0.3,
            "flow_map.boundary_target": "teacher",
            "flow_map.rollout_steps": 2,
            "flow_map.weight": "inverse",
            "flow_map.identity": "lsd",
        },
    ),
    "mdlm": lambda: mdlm_settings(PLAIN),
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", CASES)
def test_several_processes_learn_what_one_learns(objective: str, tmp_path: Path) -> None:
    config = CASES[objective]()
    one = trained(tmp_path / "one", config)
    start = Path(config.teacher or config.init or tmp_path / "one")
    runs = [
        train(2, tmp_path / "two", config, "--train.micro-batch", "3"),
        train(2, tmp_path / "parts", config, "--train.micro-batch", "3", "--train.shard"),
    ]
    if objective == "flow":
        runs.append(train(4, tmp_path / "four", config))
    for run in runs:
        check_alike(one, run)
        if config.teacher or config.init:
            check_weights(start, one, run)
    if objective == "flow":
        clocks = [json.loads((run / "clock.json").read_text()) for run in (one, *runs)]
        assert clocks[0]["sampling"] == "adaptive"
        for clock in clocks[1:]:
            assert clock["count"] == clocks[0]["count"]  # all rows were seen, each once
            assert clock["cdf"] == pytest.approx(clocks[0]["cdf"], rel=1e-3)
