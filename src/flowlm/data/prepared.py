"""Prepared text: rows of token ids in memory-mapped files, with a meta.json that says what they are.

    train.bin, held_out.bin    rows of L ids, uint16 or int32, end to end
    tokenizer.json             what made them
    meta.json                  recipe, source (files, sha256), counts. Without it the rest is unfinished.

`flowlm.data.preparation` makes it.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlm import files
from flowlm.data.readers import TextReader
from flowlm.data.tokens import Tokenizer

__all__ = [
    "FORMAT",
    "META",
    "SIDES",
    "Prepared",
    "Recipe",
    "is_prepared",
    "open_prepared",
    "reuse",
    "token_dtype",
]

_FORMATS = "flowlm-data/"
FORMAT = f"{_FORMATS}2"
"""Its number rises whenever the same text and recipe would give other rows, so that none made before stand for them."""
META = "meta.json"
SIDES = ("train", "held_out")
_LATER = ("bos", "detokenizer", "split")


@dataclass(frozen=True)
class Recipe:
    """All that decides the rows, but for the text: equal recipes and equal text give equal bytes."""

    unit: str
    field: str
    encoding: str
    rows: str
    unknown: str
    tokenizer: str
    vocab_size: int
    held_out: int
    length: int
    # What came later is written down only where it is used: what was prepared before is found again.
    bos: str = ""
    detokenizer: str = ""
    split: str = "hash"

    def written(self) -> dict[str, Any]:
        """As it is written down, and as other recipes are told apart from it."""
        later = {name: getattr(type(self), name) for name in _LATER}
        return {k: value for k, value in vars(self).items() if k not in later or value != later[k]}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where a recipe that was written down differs from this one."""
        mine, was = vars(self), {name: getattr(type(self), name) for name in _LATER} | other
        return [f"{k} was {was.get(k)!r}, is {mine[k]!r}" for k in mine if was.get(k) != mine[k]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows `train` (N, L) and `held_out` (M, L), mapped from disk, and what is known of them."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    folder: Path


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared text, of any version; meta.json decides, and what lies beside one that cannot be
    read: anyone's folder may have a meta.json of its own, or a train.bin."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return all((folder / f"{side}.bin").exists() for side in SIDES)
    return isinstance(meta, dict) and str(meta.get("format", "")).startswith(_FORMATS)


def open_prepared(folder: Path, *, check: bool = False) -> Prepared:
    """Map what `prepare` wrote.

    Args:
        check: read all rows and compare their sha256, as one does once with what came from elsewhere.

    Raises:
        ValueError: not whole, damaged, cut short, or of another version.
    """
    path = folder / META
    again = f"remove {folder} and prepare it again"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {META}: it was never finished; {again}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise ValueError(f"{path} has format {found!r}, this version of flowlm reads {FORMAT!r}: {again}")
    if missing := [
        key for key in ("tokenizer_sha256", "length", "dtype", "rows_sha256", *SIDES) if key not in meta
    ]:
        raise ValueError(f"{path} is damaged (no {', '.join(missing)}): {again}")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise ValueError(f"{folder} holds another tokenizer than it was prepared with: {again}")
    rows = []
    for side in SIDES:
        shape, dtype = (meta[side], meta["length"]), np.dtype(meta["dtype"])
        file = folder / f"{side}.bin"
        size = file.stat().st_size if file.exists() else 0
        if size != shape[0] * shape[1] * dtype.itemsize:
            raise ValueError(
                f"{file} has {size:,} bytes, not the {shape[0] * shape[1] * dtype.itemsize:,} of {shape[0]:,} rows: "
                f"it was cut short or replaced; {again}"
            )
        if check and files.sha256(file) != meta["rows_sha256"][side]:
            raise ValueError(f"{file} is not what was written (its sha256 differs): {again}")
        rows.append(np.memmap(file, dtype, "r", shape=shape))
    return Prepared(rows[0], rows[1], tokenizer, meta, folder)


def reuse(reader: TextReader, recipe: Recipe, folder: Path) -> Prepared | None:
    """What is there, if it is what would be prepared, and None otherwise, damaged or cut short included.

    Files that were touched are looked into before they count as changed.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or recipe.differences(meta["recipe"]):
            return None
        source = {"files": reader.fingerprint()}
        if source["files"] != meta["files"]:
            if reader.sha256() != meta["sha256"]:
                return None
            with contextlib.suppress(OSError):  # of a folder that is only read: it is looked into every time
                files.write_json(folder / META, meta | source)
        return open_prepared(folder)
    except (ValueError, KeyError, OSError, TypeError):
        return None  # damaged or cut short: it is made anew


def token_dtype(vocab_size: int) -> type:
    """Of stored ids: uint16 where V allows, else int32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
