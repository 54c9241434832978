"""Which documents are held out, and how many passages are copies: by hashes.

Every passage has a hash of 8 bytes. Hashes of all passages lie in a file, in the order of the text, of which at most
some `_SORTED` are in memory at once, and those of held-out passages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DIGEST", "Smallest", "count_across", "count_distinct", "digest", "is_held"]

DIGEST = 8
"""Bytes of a hash."""
_BLOCK = 1 << 18  # numbers
_SORTED = 1 << 22


def digest(text: str) -> bytes:
    """The hash of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def is_held(document: Sequence[str], held: set[int]) -> bool:
    """Whether a document is one of those whose hashes were chosen."""
    text = document[0] if len(document) == 1 else "\n".join(document)
    return int.from_bytes(digest(text), "little") in held


class Smallest:
    """The `limit` smallest of the hashes seen, each with how many passages came with it; in bounded memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: dict[int, int] = {}
        self._above = 1 << 64  # hashes from here on cannot be among the smallest any more

    def add(self, digest: int, passages: int) -> None:
        if digest in self.counts:
            self.counts[digest] += passages
        elif digest < self._above:
            self.counts[digest] = passages
            if len(self.counts) > 4 * self.limit:
                self._prune()

    def _prune(self) -> None:
        kept = sorted(self.counts)[: self.limit]
        self._above = kept[-1] + 1
        self.counts = {digest: self.counts[digest] for digest in kept}

    def choose(self, quota: int) -> list[int]:
        """Hashes of the held-out documents: in the order of hashes, as long as their passages fit the quota.

        Copies stay together: what has too many of them is for training.
        """
        first = sorted(self.counts)[: self.limit]
        chosen = []
        for digest in first:
            if 0 < self.counts[digest] <= quota:
                chosen.append(digest)
                quota -= self.counts[digest]
        return chosen or [min(first, key=lambda digest: (self.counts[digest], digest))]


def count_distinct(path: Path) -> int:
    """Distinct 8-byte hashes in a file, by as many equal parts of their range as keep a part small."""
    bits = max(1, (path.stat().st_size // 8 // _SORTED).bit_length())
    total = 0
    for part in range(1 << bits):
        own = [block[block >> np.uint64(64 - bits) == part] for block in _blocks(path, np.uint64)]
        total += len(np.unique(np.concatenate(own))) if own else 0
    return total


def count_across(hashes: Path, sides: Path) -> int:
    """Held-out passages whose text is also a training passage."""

    def pairs() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        return zip(_blocks(hashes, np.uint64), _blocks(sides, np.uint8), strict=True)

    held = np.sort(np.concatenate([block[side == 1] for block, side in pairs()]))
    found = np.zeros(len(held), bool)
    for block, side in pairs():
        train = np.sort(block[side == 0])
        found |= train[np.searchsorted(train, held).clip(max=len(train) - 1)] == held if len(train) else False
    return int(found.sum())


def _blocks(path: Path, dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    """The numbers in a file, read a block at a time: what is mapped counts as memory of the process."""
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype, _BLOCK)):
            yield block
