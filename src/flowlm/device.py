"""Where a model runs and in which precision: chosen explicitly, said in words."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def describe(device: torch.device) -> str:
    """A machine in words: "2 of 2 CPU cores (AMD EPYC)", or the accelerator's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    where = "" if device.type == "cpu" else f"{device.type} with "
    return f"{where}{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({cpu_name()})"


def cpu_name() -> str:
    """What the processor calls itself, or its architecture where it is not said."""
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if (found := re.search(r"^model name\s*:\s*(\S.*)$", said, re.M)) is not None:
            return found[1].strip()
    return platform.processor() or platform.machine()


def resolve_device(name: str) -> torch.device:
    """The device named "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        ValueError: an unknown name, or a device this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device: use cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but torch sees none here: use cpu or auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: a number may follow, as in cuda:1") from None
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise ValueError(f"device {name!r} was asked for, and there are {count} here, counted from 0")
    return device


# torch's questions to the CPU (private, so each may be missing), and what a yes means: Intel's matrix units, and the
# dot products of AVX-512 that Intel's Cooper Lake and AMD's Zen 4 and 5 have.
BFLOAT16_UNITS = {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX-512 BF16"}


def resolve_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype named "auto", "bfloat16" or "float32", and the reason for it.

    bfloat16 is chosen where the hardware has instructions for it: elsewhere its casts cost more than they gain.
    """
    if name == "float32":
        return torch.float32, "asked for"
    if name == "bfloat16":
        return torch.bfloat16, "asked for"
    if name != "auto":
        raise ValueError(f"unknown dtype {name!r}: use auto, bfloat16 or float32")
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is about the current one
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16, "this GPU multiplies bfloat16 matrices"
    if device.type == "cpu":
        for asked, unit in BFLOAT16_UNITS.items():
            if getattr(torch.cpu, asked, lambda: False)():
                return torch.bfloat16, f"this CPU multiplies bfloat16 matrices with its {unit} instructions"
    return torch.float32, f"no fast bfloat16 on this {device.type} device"


#: Kinds of devices that refuse any float64.
NARROW = {"mps"}


def wide(device: torch.device) -> torch.dtype:
    """The dtype for times and exact draws: float64, or float32 where there is no other."""
    return torch.float32 if device.type in NARROW else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """In the widest dtype of where it is."""
    return tensor.to(wide(tensor.device))


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the CPU on a device; float64 becomes what is widest there. Unlike a copy from ordinary memory it does
    not wait for what a GPU has to do."""
    if dtype is None and tensor.dtype == torch.float64:
        dtype = wide(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has the compiler it needs here: a C++ one for the CPU, Triton for CUDA."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to dtype, or nothing for float32. Weights, embeddings, softmax and losses stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


#: Of glibc's mallopt: how much free memory at the end of the heap goes back to the system (-1: none), and the size from
#: which a block is mapped by itself and goes back as soon as it is free.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 2**30


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep what tensors of the CPU free, for the next ones; returns whether the system's C library was
    told so (glibc alone can be).

    By itself glibc gives large blocks back and asks for them again at the next operation, and the system fills each of
    their pages with zeros anew: a seventh of a training step at V = 310, more than half of one at V = 30,522. What is
    kept lies in pieces that do not always fit what is asked for next, so a step's peak grows by some ten chunks of
    logits (`flowlm.cost`), and the process stays as large as it was at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # 1: done. Older versions refuse a threshold beyond 32 MiB: then the largest they take.
    mapped = mallopt(_MMAP_THRESHOLD, _MAPPED_FROM) or mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, -1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the device or the host, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return re.search(r"can't allocate memory|out of memory|not enough memory", str(error), re.I) is not None
