"""Several processes on one run: what they learn is what one learns, and they end together."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flowlm.cli import main
from flowlm.config import RunConfig, dump_toml, from_dict, read_run_config
from flowlm.objectives import FlowObjective
from flowlm.training.checkpoint import RunDirectory
from flowlm.training.distributed import Forward, Ranks, Shards, device_of, joined, rank_lost
from flowlm.training.loop import Trainer, open_run
from flowlm.weights import whole
from helpers import (
    command,
    flm,
    map_settings,
    map_values,
    metrics,
    recipe,
    said,
    settings,
    silent,
    tensors,
    trained,
)
from toy import tiny_denoiser

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

_FOLDER = tempfile.TemporaryDirectory(prefix="flowlm-tests-")  # removed when the tests end

#: Without Muon, whose iteration in bfloat16 would make rounding a thousand times larger.
PLAIN = {"optim.muon_lr": 0.0, "train.steps": 4, "train.eval_every": 2}


def _work(args: Sequence[str], environment: dict[str, str], log: str, ahead: bool) -> None:
    """One rank: a command, what it prints in a file of its own."""
    os.environ.update(environment)
    if ahead:
        Trainer.runs_ahead = True  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main(list(args)))


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(num: int, folder: Path, *args: str | Path, ahead: bool = False) -> list[str]:
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
        process = context.Process(
            target=_work, args=([str(arg) for arg in args], environment, str(log), ahead)
        )
        process.start()
        processes.append(process)
    out = []
    for process, log in zip(processes, logs):
        process.join(120)
        assert process.exitcode is not None, log.read_text()
        out.append(log.read_text() + (f"exit {process.exitcode}" if process.exitcode else ""))
    return out


def train(num: int, out: Path, config: RunConfig, *args: str | Path, ahead: bool = False) -> Path:
    """A run of a configuration by num processes."""
    file = out.with_suffix(".toml")
    file.write_text(dump_toml(config))
    printed = ranks(num, out.parent, "train", file, "--out", out, *args, ahead=ahead)
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
            # A student begins as its teacher, and its first losses are rounding alone.
            assert theirs[name] == pytest.approx(line[name], rel=1e-4, abs=1e-7), name
    names = {str(path.relative_to(one)) for path in one.rglob("*")}
    assert {str(path.relative_to(other)) for path in other.rglob("*")} == names
    for name in (n for n in names if n.endswith(".safetensors")):
        mine, theirs = tensors(one / name), tensors(other / name)
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items()
        }, name


def check_weights(start: Path, one: Path, other: Path, apart: float = 0.02) -> None:
    """They went the same way from the same start, within a share of it."""
    before = tensors(start / "ema.safetensors")
    theirs = tensors(other / "model.safetensors")
    for name, value in tensors(one / "model.safetensors").items():
        change = (value - before[name]).norm() if name in before else value.norm()
        # Adam divides by the gradient's own size: where it is almost zero, rounding decides its sign.
        assert (theirs[name] - value).norm() <= apart * change + 1e-7, name


@functools.cache
def mdlm() -> Path:
    """A masked model to distil."""
    return trained(Path(_FOLDER.name) / "mdlm", mdlm_settings(PLAIN))


def sdtt_settings() -> RunConfig:
    """Two rounds: in the second the average, which may lie in parts, has become the teacher."""
    over = {**PLAIN, "rounds.rounds": 2, "train.ema": 0.5}
    return from_dict(RunConfig, map_values(mdlm(), over) | {"objective": "sdtt"})


CASES: dict[str, Callable[[], RunConfig]] = {
    "flow": lambda: settings({**PLAIN, "init": str(flm()), "clock.kind": "adaptive", "clock.refit_every": 2}),
    # The average as a target, weights by observed losses, and every kind of row.
    "flow-map": lambda: map_settings(
        flm(),
        {
            **PLAIN,
            "flow_map.target": "averaged",
            "flow_map.freeze_embedding": True,
            "flow_map.boundary": 0.3,
            "flow_map.boundary_target": "teacher",
            "flow_map.rollout_steps": 2,
            "flow_map.weight": "inverse",
            "flow_map.identity": "lsd",
            "flow_map.derivative": "jvp",  # a difference's rounding is fifty times as large
        },
    ),
    "mdlm": lambda: mdlm_settings(PLAIN),
    "sdtt": sdtt_settings,
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", CASES)
def test_several_processes_learn_what_one_learns(objective: str, tmp_path: Path) -> None:
    config = CASES[objective]()
    one = trained(tmp_path / "one", config)
    start = Path(config.teacher or config.init or tmp_path / "one")
    runs = [
        train(2, tmp_path / "two", config, "--train.micro-batch", "3"),
        train(2, tmp_path / "parts", config, "--train.micro-batch", "3", "--train.shard", ahead=True),
    ]
    if objective == "flow":
        runs.append(train(4, tmp_path / "four", config))
        runs.append(train(4, tmp_path / "four-parts", config, "--train.shard"))
    for run in runs:
        check_alike(one, run)
        if objective.startswith("flow"):
            check_weights(start, one, run)
    if objective == "flow":
        clocks = [json.loads((run / "clock.json").read_text()) for run in (one, *runs)]
        assert clocks[0]["sampling"] == "adaptive"
        for clock in clocks[1:]:
            assert clock["count"] == clocks[0]["count"]  # all rows were seen, each once
            assert clock["cdf"] == pytest.approx(clocks[0]["cdf"], rel=1e-3)


@pytest.mark.slow
def test_several_processes_in_bfloat16(tmp_path: Path) -> None:
    """The same in the dtype in which large runs compute: losses within its rounding, weights kept in float32."""
    config = settings({**PLAIN, "init": str(flm()), "train.dtype": "bfloat16"})
    one = trained(tmp_path / "one", config)
    plain = trained(tmp_path / "plain", settings({**PLAIN, "init": str(flm()), "train.dtype": "float32"}))
    losses = [line["loss"] for line in metrics(one) if "loss" in line]
    assert losses != [line["loss"] for line in metrics(plain) if "loss" in line]
    for name, options in (("two", []), ("parts", ["--train.shard"])):
        run = train(2, tmp_path / name, config, *options)
        for line, theirs in zip(metrics(one), metrics(run), strict=True):
            for key in line.keys() & {"loss", "held_out", "gradient_norm"}:
                assert theirs[key] == pytest.approx(line[key], rel=2**-8), key
        kept = tensors(run / "model.safetensors")
        assert {value.dtype for value in kept.values()} == {torch.float32}
        check_weights(flm(), one, run, apart=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("muon", [1e-3, 0.0])
def test_a_run_goes_on_with_any_number_of_processes(muon: float, tmp_path: Path) -> None:
    """Two in shards, then one, then four: the files are those of one process all along."""
    over = {"train.steps": 6, "train.save_every": 2, "train.eval_every": 3, "train.keep": 9}
    # Muon too: its matrices may lie in parts.
    config = settings({"init": str(flm()), "optim.lr": 1e-3, "optim.muon_lr": muon, **over})
    one = trained(tmp_path / "one", config)
    run = train(2, tmp_path / "run", config, "--train.shard")
    assert RunDirectory(run).steps() == [2, 4, 6]
    for kept, num, options in ((2, 1, []), (4, 4, ["--train.no-shard"])):
        for step in (step for step in RunDirectory(run).steps() if step > kept):
            shutil.rmtree(RunDirectory(run).checkpoint(step))
        if num == 1:
            assert command("train", "--resume", run, *options) == 0
        else:
            printed = ranks(num, tmp_path, "train", "--resume", run, *options)
            assert f"resumed {run} at step {kept} of 6" in printed[0]
            assert not any("exit" in text for text in printed)
    assert not read_run_config(run).train.shard  # as it was last asked for
    for line, theirs in zip(metrics(one), metrics(run), strict=True):
        for name in line.keys() & {"loss", "held_out", "gradient_norm"}:
            # Muon's iteration is in bfloat16.
            assert theirs[name] == pytest.approx(line[name], rel=2e-2 if muon else 1e-4), name
    if not muon:
        check_weights(flm(), one, run)
        mine, theirs = (tensors(RunDirectory(r).checkpoint(6) / "optimizer.safetensors") for r in (one, run))
        for name, value in mine.items():
            # without the moments of before they would be of two steps alone
            assert (theirs[name] - value).norm() <= 1e-3 * value.norm() + 1e-9, name
    for step in (2, 4, 6):
        for name in ("model", "ema", "optimizer"):
            mine, theirs = (
                tensors(RunDirectory(r).checkpoint(step) / f"{name}.safetensors") for r in (one, run)
            )
            assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
                k: (v.shape, v.dtype) for k, v in theirs.items()
            }
            assert {k.split("/")[-1] for k in mine} == {k.split("/")[-1] for k in theirs}
    assert command("info", run) == 0


class Launched:
    """A run by torchrun itself, with two processes, that would go on for long.

    Args:
        folder: of the run and what it prints.
    """

    def __init__(self, folder: Path):
        file = recipe(
            folder / "long.toml", {"train.steps": 100_000, "train.save_every": 5, "train.eval_every": 0}
        )
        self.run, self.log = folder / "run", folder / "log.txt"
        train = ["-m", "flowlm.cli", "train", str(file), "--out", str(self.run)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc-per-node",
                    "2",
                    "--master-port",
                    _port(),
                    *train,
                ],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def workers(self) -> list[int]:
        """Once there is a checkpoint: its two processes."""
        self._until(lambda: bool(RunDirectory(self.run).steps()))
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 2
        return [int(child) for child in children]

    def end(self) -> int:
        """Its exit status."""
        return self.process.wait(60)

    def _until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    yield launched
    if launched.process.poll() is None:
        launched.process.kill()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds processes in Linux's /proc"
)


@pytest.mark.slow
@needs_proc
def test_a_killed_process_ends_the_others_and_the_run_goes_on(long_run: Launched) -> None:
    first, other = long_run.workers()
    os.kill(other, signal.SIGKILL)
    assert long_run.end() != 0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    printed = long_run.log.read_text()
    assert "another of the 2 processes was gone after step" in printed
    assert f"train --resume {long_run.run}" in printed
    assert "RuntimeError" not in printed  # in words, not as a traceback
    newest = RunDirectory(long_run.run).steps()[-1]
    assert newest % 5 == 0
    trainer = open_run(long_run.run, say=silent)
    assert trainer.step == newest
    assert math.isfinite(trainer.optimize()[0])


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("whom", ["one of them", "torchrun"])
def test_an_interruption_saves_once_and_ends_all(whom: str, long_run: Launched) -> None:
    workers = long_run.workers()
    if whom == "torchrun":
        long_run.process.send_signal(signal.SIGINT)
    else:
        os.kill(workers[1], signal.SIGTERM)
    assert long_run.end() != 0
    printed = long_run.log.read_text()
    assert printed.count("everything is saved") == 1
    (step,) = re.findall(r"interrupted at step (\d+)", printed)
    assert RunDirectory(long_run.run).steps()[-1] == int(step)
    assert not list((long_run.run / "checkpoints").glob(".*"))
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


@pytest.mark.slow
def test_what_is_wrong_for_the_first_is_said_once_and_ends_all(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", settings({"train.steps": 1}))
    printed = ranks(2, tmp_path, "train", recipe(tmp_path / "r.toml"), "--out", out)
    assert "already holds a run" in printed[0]
    assert printed[1] == "exit 1"


def _as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))


def test_a_batch_that_does_not_divide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = recipe(tmp_path / "r.toml"), tmp_path / "run"
    _as_rank(monkeypatch, 0, 3)
    assert command("train", file, "--out", out) == 1
    assert "train.batch = 8 cannot be shared evenly by 3 processes: use --train.batch 6 or 9" in said(capsys)
    assert not out.exists()
    _as_rank(monkeypatch, 0, 16)
    assert command("train", file, "--out", out) == 1
    assert "use --train.batch 16, or" in said(capsys)
    _as_rank(monkeypatch, 1, 3)
    assert command("train", file, "--out", out) == 1
    assert said(capsys) == ""  # the first one has said it


def test_other_commands_are_for_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _as_rank(monkeypatch, 0, 2)
    assert command("generate") == 1
    assert "flowlm generate is for one process, and torchrun started 2: run it without" in said(capsys)


def test_without_torchrun_or_with_one_process_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a process by itself joined a group")

    monkeypatch.setattr(torch.distributed, "init_process_group", never)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined(settings().train) as alone:
        assert (type(alone), alone.rank, alone.world, alone.first) == (Ranks, 0, 1, True)
    _as_rank(monkeypatch, 0, 1)
    with joined(settings({"train.shard": True}).train) as alone:
        assert type(alone) is Ranks


def test_one_process_has_nothing_to_share_out(tmp_path: Path) -> None:
    lines: list[str] = []
    Trainer(settings({"train.shard": True}), tmp_path / "run", say=lines.append)
    assert any(
        "train.shard = true shares a model out among processes, and this is one" in line for line in lines
    )
    lines.clear()
    Trainer(settings(), tmp_path / "run", say=lines.append)
    assert not any("train.shard" in line for line in lines)


def test_devices_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu", 3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"this machine has 2 GPUs, .* at least 3 .* --nproc-per-node 2"):
        device_of("auto", 2)
    with pytest.raises(ValueError, match=r"train\.device = 'cuda:0' is one device, .* use --device cuda"):
        device_of("cuda:0", 0)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"train.compile": True}, r"train\.compile = true"),
        ({"model.tied_head": True}, r"model\.tied_head = true"),
        ({"objective": "flow-map", "flow_map.identity": "cfm"}, r"flow_map\.identity = 'cfm'"),
    ],
)
def test_what_shards_cannot_do(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.shard = true does not go with {message}.*leave out"):
        Shards.check(Shards.__new__(Shards), settings(over))
    Shards.check(Shards.__new__(Shards), settings())


def test_which_errors_say_that_another_is_gone() -> None:
    assert rank_lost(RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert rank_lost(torch.distributed.DistBackendError("NCCL error"))
    assert not rank_lost(RuntimeError("shapes cannot be multiplied"))
    assert not rank_lost(ValueError("gloo"))


def test_an_embedding_that_is_gathered_anew_bears_a_mark() -> None:
    """By its address and version a network knows whether what it keeps of it is still so; FSDP2 leaves both."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shards, network = Shards(torch.device("cpu")), tiny_denoiser()
        before, averaged = network.embedding.detach().clone(), copy.deepcopy(network).requires_grad_(False)
        shards.wrap(Forward(network, FlowObjective(network.clock)), averaged)
        versions = []
        for times in (1, 2, 4):
            with shards.opened(averaged):
                assert not hasattr(averaged.embedding, "full_tensor")
                assert torch.equal(averaged.embedding, times * before)
                versions.append(averaged.embedding._version)
            assert torch.equal(whole(averaged.embedding), times * before)
            with torch.no_grad():
                averaged.embedding.mul_(2)
        assert len(set(versions)) == 3
    finally:
        torch.distributed.destroy_process_group()
