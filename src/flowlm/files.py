"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_ELSEWHERE = "choose another folder with --out"
_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EACCES: f"{_ELSEWHERE} or change its permissions",
    errno.EPERM: f"{_ELSEWHERE} or change its permissions",
    errno.EROFS: _ELSEWHERE,
    errno.ENOTDIR: f"a part of the path is a file, {_ELSEWHERE}",
    errno.EEXIST: f"a file is in the way, {_ELSEWHERE}",
}


def explain(error: OSError, path: Path) -> OSError:
    """The same error in plain words: what could not be written, why, whether anything was lost, the fix."""
    number = error.errno or 0
    state = "what was there is untouched" if path.exists() else "nothing was written"
    fix = f" ({_FIXES[number]})" if number in _FIXES else ""
    # OSError picks the subclass that belongs to the number.
    return OSError(number, f"cannot write {path}: {error.strerror or error}; {state}{fix}")


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Call write(temporary path in the same folder), flush it to disk, and move it into place.

    Missing parent folders are made.

    Raises:
        OSError: it could not be written, explained; nothing is left behind.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic within one file system only.
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)  # else a crash may keep the new name and lose the content
        os.replace(temporary, path)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_data(path: str | os.PathLike[str], data: str | bytes | Iterable[bytes]) -> None:
    """All of `data` (text as UTF-8), atomically."""
    if isinstance(data, str):
        data = data.encode()

    def write(temporary: Path) -> None:
        with open(temporary, "xb") as file:
            for chunk in (data,) if isinstance(data, bytes) else data:
                file.write(chunk)

    write_atomically(path, write)


def check_output(path: Path, option: str, force: bool) -> None:
    """Before the work whose result goes to a file: whether that can be written, and is not there already.

    ValueError: it is a folder, is there and not to be replaced, or lies where nothing can be written.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    if path.exists() and not force:
        raise ValueError(
            f"{path} is there already: name another file with {option}, or replace it with --force"
        )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: nothing can be written in {folder}; name a file elsewhere")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """A JSON file, atomically; NaN and infinities are refused."""
    write_data(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def together(folder: Path, last: str, gone: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into whose files then replace those of `folder`, all of them or none.

    A kill while they are moved, which takes no room and no time, leaves a folder without the file `last`, by which it
    is known to be half-written.

    Args:
        folder: made when missing.
        last: name of the file that goes first and comes last.
        gone: names of files that go too where none of that name is written.

    Raises:
        OSError: it cannot be written, explained; what was there is untouched.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as name:
            staged = Path(name)
            yield staged
            for path in staged.iterdir():
                if (folder / path.name).is_dir():  # found before anything is moved
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path.name)
            for old in (last, *gone):
                (folder / old).unlink(missing_ok=True)
            for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
                os.replace(path, folder / path.name)
        sync(folder)
    except OSError as error:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        # In the words of the system: an error of a file in there would name a place that is gone.
        number = error.errno or 0
        plain = OSError(number, os.strerror(number) if number else str(error))
        raise explain(plain, folder) from error


def link_or_copy(source: Path, path: Path) -> None:
    """Put source's content at path, atomically; shares the disk blocks where the file system can."""

    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(path, write)
