"""Randomness keyed by name, so that draws depend on what they are for and not on what was drawn before.

Noise of sample i is the same in any batch, on any number of processes, after any resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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

    Drawn on the CPU whatever the device, so that a seed means the same everywhere.
    """
    gen = torch.Generator()
    keys = [key(*parts) for parts in rows]
    out = torch.empty(len(keys), *shape)
    for i, seed in enumerate(keys):
        gen.manual_seed(seed)
        torch.randn(shape, generator=gen, out=out[i])
    return out.to(device, non_blocking=True)


def uniform_rows(
    rows: Iterable[tuple[int | str, ...]], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Uniform rows on [0, 1), one key each, (len(rows), *shape), float64 for exact categorical draws."""
    gen = torch.Generator()
    keys = [key(*parts) for parts in rows]
    out = torch.empty(len(keys), *shape, dtype=torch.float64)
    for i, seed in enumerate(keys):
        gen.manual_seed(seed)
        torch.rand(shape, generator=gen, dtype=torch.float64, out=out[i])
    return out.to(device, wide(device), non_blocking=True)
