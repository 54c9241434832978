"""Checkpoints of torch.save read as data: tensors and plain containers; nothing that a file names is imported or run.

A pickle is a program: it names functions and has them called. `torch.load` with weights_only refuses a file that
names any but a few, and checkpoints of training frameworks name many, those of their settings. Here every name stands
for an `Inert`, which keeps what the file says and does nothing, but for those that make up a tensor.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inert", "StoredTensor", "plain", "read_torch_file"]

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Stands for an object, or for what a function would have made: what a file says of it, and nothing else."""

    name = ""
    """Module and name, as the file has them."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        out = super().__new__(cls)
        out.args, out.state, out.items = args, None, []
        return out

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    # What a pickle does to lists and dictionaries of a class of their own.
    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


@dataclass(frozen=True)
class _Storage:
    """A block of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when it is asked for: a checkpoint also holds an optimizer's moments."""

    read: Callable[[_Storage], Tensor]
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """ValueError: its numbers are missing, or fewer than its shape says."""
        sizes: list[int] = [self.offset, *self.shape, *self.stride]
        whole = len(self.shape) == len(self.stride) and all(type(n) is int and n >= 0 for n in sizes)
        # Of weights no two are one number: a stride of 0 would have a few of them fill any memory.
        if (
            not whole
            or math.prod(self.shape) > self.storage.numel
            or (
                0 not in self.shape
                and self.offset + sum((n - 1) * by for n, by in zip(self.shape, self.stride))
                >= self.storage.numel
            )
        ):
            raise ValueError(
                f"a tensor of shape {self.shape} reaches beyond its {self.storage.numel} numbers"
            )
        return self.read(self.storage).as_strided(self.shape, self.stride, self.offset).clone()


class _Reader(pickle.Unpickler):
    """Of data.pkl; `find_class` is all by which a pickle reaches code."""

    def __init__(self, file: Any, read: Callable[[_Storage], Tensor]):
        super().__init__(file)
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        return type(name, (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise ValueError(f"it refers to {pid!r}, which is no block of numbers")
        return _Storage(str(key), dtype, numel)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        if not isinstance(storage, _Storage) or len(shape) != len(stride):
            raise ValueError("it has a tensor without numbers or shape")
        return StoredTensor(self._read, storage, offset, tuple(shape), tuple(stride))


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, tensors as `StoredTensor`, objects of other classes as `Inert`.

    Raises:
        ValueError: missing, no such file, damaged, cut short.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a checkpoint's file, such as last.ckpt")
    try:
        with zipfile.ZipFile(path) as archive:
            root = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "")[: -len("data.pkl")]
            if not root:
                raise ValueError("it has no data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("its numbers are of a big-endian machine")
            with archive.open(f"{root}data.pkl") as file:
                return _Reader(file, lambda storage: _numbers(path, root, storage)).load()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is cut short, or no checkpoint of torch.save ({error}): fetch it again"
        ) from None
    except (MemoryError, RecursionError, KeyboardInterrupt):
        raise
    except Exception as error:  # a pickle can fail in every way there is
        raise ValueError(
            f"{path} is damaged, or no checkpoint of torch.save ({error}): fetch it again"
        ) from error


def _numbers(path: Path, root: str, storage: _Storage) -> Tensor:
    """The numbers of a storage, from the archive at `path`."""
    record = f"{root}data/{storage.key}"
    size = storage.numel * storage.dtype.itemsize
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(record).file_size != size:
                raise ValueError(f"{record} has {archive.getinfo(record).file_size} bytes, not {size}")
            data = bytearray(archive.read(record))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    return torch.frombuffer(data, dtype=storage.dtype) if size else torch.empty(0, dtype=storage.dtype)


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries in what was read; of settings kept by OmegaConf, those in them; None for
    anything else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Inert):
        state = dict(_states(value.state))
        for name in ("_content", "_val"):
            if name in state:
                return plain(state[name])
    return None


def _states(state: Any) -> Iterator[tuple[Any, Any]]:
    """Of an object's state as pickled: its __dict__, or that and its slots."""
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict):
            yield from part.items()
