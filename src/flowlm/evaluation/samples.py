"""Files of samples: JSON lines that anyone can write and read.

The first line is a `Header` (how the samples were made), each further line one `Record`:

    {"format": "flowlm-samples/1", "model": "fmlm", "nfe": 1, "seed": 0, ...}
    {"id": 0, "text": "Anna was a kind girl ...", "tokens": [17, 4, ...], "nfe": 1, "seed": 0}

Samples of other programs need no header: lines of ``{"text": ...}`` are read too, all else being unknown.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from flowlm.files import write_data

__all__ = ["DEFAULT_SAMPLER", "FORMAT", "Header", "Record", "current_commit", "read_samples", "write_samples"]

FORMAT = "flowlm-samples/1"
UNKNOWN = "unknown"
#: The sampler of a plain flow or flow map: what a header's `sampler` says where nothing else was asked for.
DEFAULT_SAMPLER = {
    "gamma": 0.0,
    "prior_scale": 1.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "last": "argmax",
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """How a file of samples was made. Defaults mean "not known"; None is written as null."""

    format: str = FORMAT
    model: str = UNKNOWN
    """Name of the model, as tables show it."""
    recipe: str = UNKNOWN
    """Recipe it was trained with."""
    nfe: int | None = None
    """Network calls per sample."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Sampler options: gamma, prior_scale, temperature, last."""
    seed: int | None = None
    dtype: str = UNKNOWN
    """Type of the network's arithmetic."""
    commit: str = UNKNOWN
    """See `current_commit`."""
    tokenizer: str = UNKNOWN
    """sha256 of the tokenizer."""
    seconds: float | None = None
    """Wall time of all samples together."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else should be remembered."""


@dataclass(frozen=True)
class Record:
    """One sample. `tokens` is empty, `nfe` and `seed` are None where a foreign file does not say."""

    id: int
    text: str
    tokens: list[int]
    nfe: int | None
    seed: int | None


def _line(values: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate: UTF-8 cannot say it, a JSON escape can
        return (json.dumps(values, allow_nan=False) + "\n").encode()


def write_samples(path: str | os.PathLike[str], header: Header, records: Iterable[Record]) -> None:
    """Write a samples file, whole or not at all.

    OSError: it cannot be written; ValueError: two records with one id, another format, NaN in the header.
    """
    if header.format != FORMAT:
        raise ValueError(f"header.format is {header.format!r}, but this version writes {FORMAT!r}")

    def lines() -> Iterator[bytes]:
        yield _line(asdict(header))
        seen: set[int] = set()
        for record in records:
            if record.id in seen:
                raise ValueError(f"two records have the id {record.id}: ids must differ")
            seen.add(record.id)
            yield _line(
                {
                    "id": record.id,
                    "text": record.text,
                    "tokens": [int(token) for token in record.tokens],  # array elements are welcome
                    "nfe": record.nfe,
                    "seed": record.seed,
                }
            )

    write_data(path, lines())


# what each key must hold, and how to say so
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "format": ((str,), "a string"),
    "model": ((str,), "a string"),
    "recipe": ((str,), "a string"),
    "nfe": ((int, type(None)), "an integer or null"),
    "sampler": ((dict,), "an object"),
    "seed": ((int, type(None)), "an integer or null"),
    "dtype": ((str,), "a string"),
    "commit": ((str,), "a string"),
    "tokenizer": ((str,), "a string"),
    "seconds": ((int, float, type(None)), "a number or null"),
    "extra": ((dict,), "an object"),
    "id": ((int,), "an integer"),
    "text": ((str,), "a string"),
    "tokens": ((list,), "a list of integers"),
}
_HEADER = tuple(f.name for f in fields(Header))
_RECORD = tuple(f.name for f in fields(Record))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(values: dict[str, Any], names: tuple[str, ...], where: str, what: str) -> None:
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{where}: the {what} lacks {', '.join(map(repr, missing))}")
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(
            f"{where}: the {what} has unknown {', '.join(map(repr, unknown))}; it has {', '.join(names)}"
        )
    _check_kinds(values, names, where)


def _check_kinds(values: dict[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        kinds, said = _KINDS[name]
        value = values[name]
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if name == "tokens":
            fits = fits and all(_is_integer(token) for token in value)
        if not fits:
            raise ValueError(f"{where}: {name!r} must be {said}, got {str(value)[:40]!r}")


def _objects(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(where, line number, object) of each line that is not blank."""
    number = 0
    try:
        # split at line feeds only: a text may hold any other line separator of Unicode
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{where}: not JSON ({error.msg}, column {error.colno}); a samples file has one "
                        "JSON object a line"
                    ) from error
                if not isinstance(values, dict):
                    raise ValueError(f"{where}: expected a JSON object, got {line.strip()[:40]!r}")
                yield where, number, values
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {number}: not UTF-8 text ({error.reason})") from error


def read_samples(path: str | os.PathLike[str]) -> tuple[Header, list[Record]]:
    """Read a samples file, or a foreign one of lines ``{"text": ...}``, whose header is of unknowns.

    In a foreign file `id` counts from 0; keys of `Record` are used where present, others passed over.
    OSError: it cannot be read; ValueError: what is wrong in which line.
    """
    path = Path(path)
    header: Header | None = None
    foreign = False
    records: list[Record] = []
    lines_of_ids: dict[int, int] = {}
    for where, number, values in _objects(path):
        if header is None:
            foreign = "format" not in values and "text" in values
            if foreign:
                header = Header()
            else:
                if values.get("format", FORMAT) != FORMAT:
                    raise ValueError(f"{where}: format {values['format']!r}; this version reads {FORMAT!r}")
                _check(values, _HEADER, where, "header")
                header = Header(**values)
                continue
        if foreign:
            if "text" not in values:
                raise ValueError(f"{where}: the sample lacks 'text'")
            unknowns = {"id": len(records), "tokens": [], "nfe": None, "seed": None}
            values = unknowns | {name: value for name, value in values.items() if name in _RECORD}
            _check_kinds(values, _RECORD, where)
        else:
            _check(values, _RECORD, where, "sample")
        record = Record(**values)
        if record.id in lines_of_ids:
            raise ValueError(f"{where}: id {record.id} stands in line {lines_of_ids[record.id]} already")
        lines_of_ids[record.id] = number
        records.append(record)
    if header is None:
        raise ValueError(f"{path} is empty: a samples file has a header line, then one sample a line")
    return header, records


def _git(folder: Path, *arguments: str) -> str:
    # variables such as GIT_DIR, set inside hooks, would point at another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10, env=environment
    ).stdout.strip()


@functools.cache
def current_commit() -> str:
    """Short git commit of this package's checkout, with "+dirty" if the package differs from it; where there is no
    checkout the installed version. It is that of when it was first asked, as the code that runs is, whatever is
    committed meanwhile. Never raises."""
    package = Path(__file__).resolve().parents[1]
    try:
        # an installed package may lie inside somebody else's repository: only a tracked one has a commit
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "--short", "HEAD")
        # the package only: results written into the checkout do not change what the code does
        dirty = _git(package, "status", "--porcelain", "--", ".")
        return f"{commit}+dirty" if dirty else commit
    except (OSError, ValueError, subprocess.SubprocessError):
        pass
    try:
        return metadata.version("flowlm")
    except (metadata.PackageNotFoundError, KeyError, ValueError):
        return UNKNOWN
