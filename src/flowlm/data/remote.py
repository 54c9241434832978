"""Files that are read on the Hugging Face hub, where they lie, and are not kept here."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from flowlm.hub import UnreachableError, reaching

__all__ = ["HubFile", "UnreadableError"]

#: Seconds between tries, some seven minutes in all, beside those that the hub's own library makes: a corpus is read for
#: hours, and lines break.
PAUSES = (5.0, 15.0, 60.0, 120.0, 240.0)


class UnreadableError(ValueError):
    """What a file holds is not given: it may be the next time."""


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub, at one commit. `str()` of it is its address for the hub's file system."""

    repository: str
    revision: str
    inside: str
    """Its path in the repository."""
    size: int
    """In bytes."""
    sha256: str
    """Of its bytes, as the hub states it."""

    def __str__(self) -> str:
        return f"hf://datasets/{self.repository}@{self.revision}/{self.inside}"

    @property
    def name(self) -> str:
        """Of the file, without folders."""
        return PurePosixPath(self.inside).name

    def open(self) -> IO[bytes]:
        """Its bytes, of which those that are asked for are fetched.

        UnreadableError: there is no way to it; so does a later reading say it, after some tries.
        """
        from huggingface_hub import HfFileSystem

        raw = _Reading(self._tried(lambda: HfFileSystem().open(str(self), "rb")), self)
        return io.BufferedReader(raw, 1 << 20)

    def _tried(self, ask: Callable[[], Any]) -> Any:
        for pause in (*PAUSES, None):
            try:
                with reaching(str(self), "run it again once it can be"):
                    return ask()
            except UnreachableError as error:
                if pause is None:
                    raise UnreadableError(str(error)) from None
                time.sleep(pause)
            except ValueError as error:
                raise UnreadableError(str(error)) from None
        raise AssertionError("the last try returns or raises")


class _Reading(io.RawIOBase):
    """An open file of the hub, whose errors are told in plain words and stand apart from those of damaged files."""

    def __init__(self, file: Any, what: HubFile):
        self._file, self._what = file, what

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        data = self._what._tried(
            lambda: self._file.read(len(buffer))
        )  # where it fails, the place is as it was
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
