"""Weights in safetensors files: written atomically, stored small if asked, loaded strictly by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flowlm import files

__all__ = ["DTYPES", "like", "load_weights", "misfits", "read_tensors", "stored_as", "whole", "write_weights"]

DTYPES = ("float32", "bfloat16", "int8")
SCALE = ".scale"


def stored_as(dtype: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as it is to be stored; buffers (tables of the clock and the like) stay what they are.

    Args:
        dtype: "float32"; "bfloat16"; or "int8": a matrix W becomes round(W / s) with a scale s = max|row| / 127 of
            each row, in float32 under its name + ".scale", an error of at most s/2; vectors stay float32.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: weights are stored as {', '.join(map(repr, DTYPES))}")
    state = dict(module.state_dict())
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        if dtype == "bfloat16":
            state[name] = value.to(torch.bfloat16)
        elif dtype == "int8" and value.ndim == 2:
            scale = value.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny) / 127
            state[name] = (value / scale).round().to(torch.int8)
            state[name + SCALE] = scale
    return state


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, atomically."""
    flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    files.write_atomically(path, lambda p: _save_file(flat, p))


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path)
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read
    except SafetensorError as error:
        # safetensors wraps the operating system's error in its own: unwrap what a full disk says.
        if "os error 28" in str(error).lower() or "no space" in str(error).lower():
            raise OSError(28, "No space left on device") from error
        raise OSError(f"safetensors: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; what was stored as int8 is multiplied out.

    Raises:
        ValueError: it is missing or damaged.
    """
    if not path.exists():
        raise ValueError(f"no weights at {path}: the run was not finished, or the file was moved")
    try:
        found = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): use a checkpoint of the run instead"
        ) from None
    # One without its matrix is no scale, and said to be unexpected where it is.
    scaled = [name for name in found if name.endswith(SCALE) and name.removesuffix(SCALE) in found]
    scales = {name: found.pop(name) for name in scaled}
    for name, scale in scales.items():
        matrix = found[name.removesuffix(SCALE)]
        found[name.removesuffix(SCALE)] = matrix.to(scale.dtype) * scale
    return found


def misfits(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], allow_missing: tuple[str, ...] = ()
) -> list[str]:
    """What keeps tensors from being a module's, a line for what is missing, unexpected or of another shape; none fits.

    Args:
        wanted: of the module, by name.
        found: to be loaded.
        allow_missing: prefixes of parameters that may be absent.
    """
    missing = sorted(k for k in wanted if k not in found and not k.startswith(allow_missing or ("\0",)))
    unexpected = sorted(k for k in found if k not in wanted)
    shapes = [
        f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    return [
        *[f"missing: {', '.join(missing)}"] * bool(missing),
        *[f"unexpected: {', '.join(unexpected)}"] * bool(unexpected),
        *[f"shapes: {'; '.join(shapes)}"] * bool(shapes),
    ]


def load_weights(
    module: nn.Module, path: Path, *, under: str = "", allow_missing: tuple[str, ...] = ()
) -> None:
    """Load weights strictly by name.

    Args:
        under: beginning of the names in the file under which the module's lie; others are passed over.
        allow_missing: prefixes of parameters that may be absent (they keep their initial values).

    Raises:
        ValueError: listing every missing and unexpected key, and every shape that differs.
    """
    wanted = module.state_dict()
    found = {
        name.removeprefix(under): value
        for name, value in read_tensors(path).items()
        if name.startswith(under)
    }
    if wrong := misfits(wanted, found, allow_missing):
        lines = [f"the weights in {path} do not fit the model:", *(f"  {line}" for line in wrong)]
        lines.append("they belong to a model of another configuration: compare the two config.json")
        raise ValueError("\n".join(lines))
    module.load_state_dict({name: like(value, wanted[name]) for name, value in found.items()}, strict=False)


def whole(value: Tensor) -> Tensor:
    """All of a tensor, of which each rank may hold a part. All ranks must ask."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def like(value: Tensor, held: Tensor) -> Tensor:
    """A whole tensor as another is held: whole, or a part on each rank."""
    if not hasattr(held, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = held.device_mesh  # type: ignore[attr-defined]
    places: Any = held.placements  # type: ignore[attr-defined]
    # Every rank has read all of it: nothing is sent.
    return distribute_tensor(value.to(held.device), mesh, places, src_data_rank=None)
