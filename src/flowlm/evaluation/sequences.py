"""Sequences of items, as every measure of text without a known law takes them: one per passage or sample."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

__all__ = ["flatten"]


def flatten(name: str, sequences: Sequence[Sequence[Hashable]]) -> tuple[list[Hashable], NDArray[np.int64]]:
    """All items one after another, and the length of each sequence; `name` is for messages.

    ValueError: no sequences, a string instead of a sequence, items other than strings and integers (a tensor's
    elements, say, are equal to nothing but themselves, and would count as words never seen).
    """
    if isinstance(sequences, str) or any(isinstance(sequence, str) for sequence in sequences):
        raise ValueError(
            f"{name}: each is a sequence of words or token ids, got a string: split it into words"
        )
    if len(sequences) < 1:
        raise ValueError(f"{name} is empty: there is nothing to measure; give at least one")
    items = list(chain.from_iterable(sequences))
    for kind in set(map(type, items)):
        if not issubclass(kind, (str, Integral)):
            found = next(item for item in items if type(item) is kind)
            raise ValueError(
                f"{name}: an item is {str(found)[:40]!r}, of type {kind.__name__}; items are words (str) or token "
                "ids (int); of a tensor, give .tolist()"
            )
    return items, np.array([len(sequence) for sequence in sequences], np.int64)
