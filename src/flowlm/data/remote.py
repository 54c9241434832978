"""Files that are read on the Hugging Face hub, where they lie, and are not kept here."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from flowlm.hub import reaching

__all__ = ["HubFile", "UnreadableError"]


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

        UnreadableError: there is no way to it; so does a later reading say it.
        """
        from huggingface_hub import HfFileSystem

        try:
            with reaching(str(self), "go on once it can be; what was read is kept"):
                return io.BufferedReader(_Reading(HfFileSystem().open(str(self), "rb"), str(self)), 1 << 20)
        except ValueError as error:
            raise UnreadableError(str(error)) from None


class _Reading(io.RawIOBase):
    """An open file of the hub, whose errors are told in plain words and stand apart from those of damaged files."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            with reaching(self._name, "go on once it can be; what was read is kept"):
                data = self._file.read(len(buffer))
        except ValueError as error:
            raise UnreadableError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
