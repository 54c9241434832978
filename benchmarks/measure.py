"""How seconds and bytes are taken, and on what machine."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from flowlm.device import cpu_name, describe, keep_freed_memory
from flowlm.evaluation.samples import current_commit

Row = dict[str, Any]
T = TypeVar("T")
CPU = torch.device("cpu")


def wait(device: torch.device) -> None:
    """Until a GPU is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    arms: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    calls: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device = CPU,
) -> list[Row]:
    """Seconds of several ways to do one thing, taken in turns A B C A B C …, so that a slow moment hits all of them.

    Each way runs once before, untimed.

    Args:
        arms: the ways by name; the first is what the others are divided by.
        repeats: turns.
        calls: how many times a way does the thing in one run, 1 where it does not say.
        clock: in seconds.
        device: on which they work; a run ends when it is done.

    Returns:
        A row per way: `arm`; `seconds` of each run; `calls`; `median`, seconds for doing the thing once; `ratio` of
        the medians to the first way's; `ratio_low` and `ratio_high`, the least and largest ratio within a turn.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}: nothing would be timed")
    for arm in arms.values():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            wait(device)
            start = clock()
            arm()
            wait(device)
            seconds[name].append(clock() - start)
    rows: list[Row] = []
    for name, taken in seconds.items():
        count = (calls or {}).get(name, 1)
        row: Row = {"arm": name, "seconds": taken, "calls": count, "median": statistics.median(taken) / count}
        first = rows[0] if rows else row
        turns = [
            (mine / count) / (other / first["calls"])
            for mine, other in zip(taken, first["seconds"], strict=True)
        ]
        row |= {
            "ratio": row["median"] / first["median"],
            "ratio_low": min(turns),
            "ratio_high": max(turns),
        }
        rows.append(row)
    return rows


def resident_peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Memory(NamedTuple):
    """Peak bytes of a process: resident, or of tensors on its GPU."""

    peak: int
    """Of the whole process: interpreter, libraries, what was built, the work; on a GPU, of all tensors."""
    own: int
    """What the work added to the peak before it, on a GPU to what there was before. Both are taken in one process: two
    of them differ by megabytes."""


def report_memory(
    build: Callable[[], T], work: Callable[[T], object], device: torch.device | str = CPU
) -> None:
    """Build, do the work, and print the process's peaks: the end of a script that `memory_of` runs.

    Raises:
        RuntimeError: the peak is that of the process which started this one. Linux counts it in.
    """
    keep_freed_memory()
    built = build()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work(built)
        peak = torch.cuda.max_memory_allocated(device)
        print(json.dumps([peak, peak - before]))
        return
    before = resident_peak()
    work(built)
    peak = resident_peak()
    if peak == before:
        raise RuntimeError(
            f"the work added nothing to a peak of {peak} bytes: either it is that of the process which started this "
            "one, as Linux counts, and memory has to be measured before anything large is done there; or building "
            "took more than the work"
        )
    print(json.dumps([peak, peak - before]))


#: A small process that starts the other: Linux counts the memory of the one that starts a process in its peak.
BETWEEN = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


def memory_of(script: Path, *args: str) -> Memory:
    """Peak resident bytes of a script in a process of its own, since a process gives no memory back.

    Raises:
        RuntimeError: the script failed; its error is shown.
    """
    done = subprocess.run([sys.executable, "-c", BETWEEN, str(script), *args], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"{script.name} {' '.join(args)} ended with status {done.returncode}; a status of -9 is the system "
            f"stopping it for want of memory\n{done.stderr[-2000:]}"
        )
    return Memory(*json.loads(done.stdout))


def memory_of_arm(script: Path, case: Any, arm: str) -> Memory:
    """The same of a script that is told a case (a dataclass), one of the ways, and the number of threads."""
    return memory_of(script, json.dumps(dataclasses.asdict(case)), arm, str(torch.get_num_threads()))


def machine(dtype: torch.dtype, device: torch.device = CPU) -> dict[str, Any]:
    """What a figure has to carry: processor, cores, threads, dtype, torch and commit; and the GPU, if it is on one."""
    gpu = {} if device.type == "cpu" else {"gpu": describe(device)}
    return gpu | {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "commit": current_commit(),
    }
