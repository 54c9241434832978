"""Devices and precisions are chosen explicitly, and the reason is said."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from flowlm import device
from flowlm.device import keep_freed_memory, precision, resolve_device, resolve_dtype


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without accelerators and without instructions for bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for asked in device.BFLOAT16_UNITS:
        monkeypatch.setattr(torch.cpu, asked, lambda: False, raising=False)
    return monkeypatch


def test_auto_takes_the_best_there_is(bare: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    bare.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match="device 'cuda:2' was asked for, and there are 2 here, counted from 0"
    ):
        resolve_device("cuda:2")
    with pytest.raises(ValueError, match="unknown device 'cuda:x': a number may follow"):
        resolve_device("cuda:x")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device 'cuda' was asked for, but torch sees no CUDA device: use cpu or auto"),
        ("cuda:3", "torch sees no CUDA device"),
        ("mps", "device 'mps' was asked for, but torch sees none here: use cpu or auto"),
        ("gpu", "unknown device 'gpu': use auto, cpu, cuda or mps"),
        ("", "unknown device ''"),
    ],
)
def test_missing_and_unknown_devices(bare: pytest.MonkeyPatch, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


def test_dtypes(bare: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("float32", cuda) == (torch.float32, "asked for")
    assert resolve_dtype("bfloat16", cpu) == (torch.bfloat16, "asked for")
    assert resolve_dtype("auto", cpu) == (torch.float32, "no fast bfloat16 on this cpu device")
    for asked, unit in device.BFLOAT16_UNITS.items():
        with bare.context() as only:
            only.setattr(torch.cpu, asked, lambda: True)
            chosen = resolve_dtype("auto", cpu)
        assert chosen == (
            torch.bfloat16,
            f"this CPU multiplies bfloat16 matrices with its {unit} instructions",
        )
    # A GPU may emulate it, slowly; and which one is asked is the current one.
    current = [0]

    @contextlib.contextmanager
    def on(chosen: torch.device) -> Iterator[None]:
        current[0] = chosen.index or 0
        yield
        current[0] = 0

    bare.setattr(torch.cuda, "device", on)
    bare.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or current[0] == 1,
    )
    assert resolve_dtype("auto", torch.device("cuda", 1)) == (
        torch.bfloat16,
        "this GPU multiplies bfloat16 matrices",
    )
    assert resolve_dtype("auto", cuda)[0] == torch.float32
    with pytest.raises(ValueError, match="unknown dtype 'half': use auto, bfloat16 or float32"):
        resolve_dtype("half", cpu)


def test_precision_is_autocast() -> None:
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    with precision(cpu, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
        assert (x @ x).dtype == torch.float32
    with device.precision(cpu, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


#: Takes and frees 64 MiB again and again, and prints the page faults of one time; in a process of its own.
AGAIN = """
import platform, resource, sys, torch
from flowlm.device import keep_freed_memory
asked = sys.argv[1] == "keep" and keep_freed_memory()
for _ in range(4):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.zeros(2**24)
print(asked, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 8)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_kept_where_the_system_can() -> None:
    def faults(way: str) -> tuple[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, way], capture_output=True, text=True, check=True
        ).stdout.split()
        return done[0], float(done[1])

    (asked, kept), (_, given_back) = faults("keep"), faults("leave")
    assert asked == "True"
    # 64 MiB are 16,384 pages of 4 KiB, fewer where the system makes them larger. Another place in what is kept may be
    # taken once, and its pages are then new.
    assert 4 * kept < given_back


def test_nothing_is_asked_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    assert keep_freed_memory.__wrapped__() is False
    monkeypatch.setattr(os, "name", "posix")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory.__wrapped__() is False
