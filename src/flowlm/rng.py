"""Randomness keyed by name, so that draws depend on what they are for and not on what was drawn before.

Noise of sample i is the same in any batch, on any number of processes, after any resume, on devices of one model:
others may deal out the same seed otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from flowlm.device import wide


def key(*parts: int | str) -> int:
    """A 63-bit seed from a tuple of names and numbers, e.g. key(seed, "noise", step, row)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def normal_rows(
    rows: Iterable[tuple[int | str, ...]], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal rows, one key each, (len(rows), *shape), float32.

    Drawn on the device: a CPU takes longer for them than a GPU for the whole step. A seed means the same on devices of
    one model, and may mean something else on those of another.
    """
    return _rows(torch.randn, rows, shape, torch.float32, device)


def uniform_rows(
    rows: Iterable[tuple[int | str, ...]], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Uniform rows on [0, 1), one key each, (len(rows), *shape), in the device's widest type for exact categorical
    draws (`device.wide`). As for `normal_rows`, the type of the device counts.
    """
    return _rows(torch.rand, rows, shape, wide(device), device)


def _rows(
    draw: Callable[..., Tensor],
    rows: Iterable[tuple[int | str, ...]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    gen = torch.Generator(device)
    keys = [key(*parts) for parts in rows]
    out = torch.empty(len(keys), *shape, dtype=dtype, device=device)
    for row, seed in zip(out, keys, strict=True):
        gen.manual_seed(seed)
        draw(shape, generator=gen, dtype=dtype, device=device, out=row)
    return out
