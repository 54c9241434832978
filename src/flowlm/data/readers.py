"""Text from files as people have them: one file, a folder or an archive, in lines, records or whole documents.

    .txt and anything that is not listed below   plain text; .jsonl  a field;  .csv .tsv .parquet  a column
    plain, or inside .gz .xz .bz2 (but Parquet) or .zip

Everything is streamed: memory is bounded by the longest document, not by the corpus. Documents come in a fixed
order, that of the files' names.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flowlm import files
from flowlm.data.remote import HubFile, UnreadableError
from flowlm.hub import SCHEME

__all__ = ["Fingerprint", "TextReader"]

_RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_TEXT = (".txt", ".text", ".md", ".rst", ".raw")
_NO_TEXT = {
    *(".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".zst", ".lz4"),
    *(".pdf", ".doc", ".docx", ".odt", ".epub", ".html", ".htm", ".xml", ".json"),
    *(".arrow", ".bin", ".npy", ".pt", ".safetensors"),
}


class _Streams(io.RawIOBase):
    """What a file of one or more packed streams holds. Python's own readers of .xz and .bz2 take what follows a stream
    and is none for no part of the file: of a damaged one they would give the beginning, and no error.

    EOFError: a stream is cut short, or there is none; lzma.LZMAError or OSError: it is damaged.
    """

    def __init__(self, packed: IO[bytes], decompressor: Callable[[], Any]):
        self._packed, self._decompressor = packed, decompressor
        self._stream, self._rest = decompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                rest = self._stream.unused_data
                while not (rest := rest.lstrip(b"\0")):  # streams may be padded
                    if not (rest := self._packed.read(_PIECE)):
                        return 0
                self._stream, self._rest = self._decompressor(), rest
            elif self._stream.needs_input and not self._rest:
                self._rest = self._packed.read(_PIECE)
                if not self._rest:
                    raise EOFError("it ends within a packed stream")
            given, self._rest = self._rest, b""
            if data := self._stream.decompress(given, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


def _gzip(packed: Any) -> Any:
    if not packed.peek(1):  # to gzip an empty text
        raise EOFError("it has no bytes")
    return gzip.open(packed)


_PACKED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": _gzip,
    ".xz": lambda packed: io.BufferedReader(_Streams(packed, lzma.LZMADecompressor)),
    ".bz2": lambda packed: io.BufferedReader(_Streams(packed, bz2.BZ2Decompressor)),
}

# What no text needs and no model should learn: control characters, but for the tab and the ends of lines.
# Halves of pairs of UTF-16, which JSON may spell and no encoding writes, go with them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_HALVES = re.compile(r"[\ud800-\udfff]")
_DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile)

_MARKS = (b"\xff\xfe", b"\xfe\xff")  # that UTF-16 begins with
_PIECE = 1 << 16  # characters
_LOOKED_AT = (
    1 << 12
)  # bytes at the beginning of a text, among which one in eight that is zero is no sign of it

Fingerprint = list[list[Any]]
"""[name, bytes, time of change in ns, of the file's entry too, inode] of every file: equal as long as nothing was
touched. Where it differs the bytes may still be the same. Of files on the hub [name, bytes, sha256]."""


@dataclass(frozen=True)
class _Entry:
    """A text file, or a member of an archive."""

    path: Path | HubFile
    kind: str
    packed: str = ""
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)


class TextReader:
    """The documents of a path, each a list of its passages.

    A record of .jsonl, .csv or .parquet is a document. Plain text knows no documents smaller than the file:
    there, each passage stands alone. Spaces around passages go, empty ones are left out, control characters
    become spaces and are counted.

    Args:
        path: a file, a .zip, or a folder, read with its sub-folders; of files on the hub, their address.
        unit: a passage is a "line", a "paragraph" (blank lines between) or a "document"; a "record" is a document
            exactly as it stands, and a "piece" a part of one, cut every 65,536 characters, that stands alone.
        field: the field of .jsonl or column of .csv, .tsv and .parquet that holds the text.
        encoding: of all files.
        sides: files of `path`, or Parquet files on the hub, to read in place of all, and those of a held-out split,
            which come last.
        detokenize: what is done to every passage.

    Raises:
        ValueError: nothing there, nothing to read in it, no such field or column, a damaged archive, bytes that
            are not of the encoding: with file, line and fix.
    """

    def __init__(
        self,
        path: str | Path,
        unit: str = "line",
        field: str = "text",
        encoding: str = "utf-8",
        *,
        sides: tuple[Sequence[Path | HubFile], Sequence[Path | HubFile]] | None = None,
        detokenize: Callable[[str], str] | None = None,
    ):
        if not str(path):
            raise ValueError("data.path is empty: data.corpus = 'text' needs a file or folder of text")
        if _written(str(path)) != str(path):  # it goes into what is written of the text
            raise ValueError(
                f"data.path = {_written(str(path))} is not UTF-8: rename it, or give a link to it"
            )
        self.path, self.unit, self.field = Path(path), unit, field
        self.where = str(path) if str(path).startswith(SCHEME) else f"data.path = {str(self.path)!r}"
        """The text, for errors."""
        try:
            "".encode(encoding)
            marked = codecs.lookup(encoding).name == "utf-8"  # of all its names: utf8, U8, …
        except LookupError:
            raise ValueError(
                f"data.encoding = {encoding!r} is not known to Python: use utf-8, utf-16, latin-1, cp1252 or another"
            ) from None
        self.encoding, self.sides, self.detokenize = encoding, sides, detokenize
        self._decoder = "utf-8-sig" if marked else encoding
        self.held_out = False
        """Whether the document that `documents` gave last is of the held-out split."""
        self.skipped: dict[str, int] = {}
        """Files of a folder or archive that are not read, by suffix."""
        self.files, self._entries = self._find()
        self.bytes = sum(map(_size, self.files))
        """Size of the files as they lie on the disk."""
        self.done = 0
        """Of these, bytes read by `documents` so far."""
        self.file = 0
        """Number of the file of which `documents` gave a document last."""
        self.control_characters = 0
        """Replaced by `documents` so far."""
        self.controls_before = 0
        """Of these, those in files before the present one."""

    @property
    def has_records(self) -> bool:
        """Whether the documents are records of files, and not plain text."""
        return any(entry.kind in _RECORDS for found in self._entries.values() for entry in found)

    def fingerprint(self) -> Fingerprint:
        """Names, sizes and times of the files; cheap, and tells whether anything was touched."""
        marks: Fingerprint = []
        for file in self.files:
            if isinstance(file, HubFile):
                marks.append([file.inside, file.size, file.sha256])
                continue
            try:
                s = file.stat()
            except OSError as error:
                raise _unreadable(error.filename or self.path, error) from error
            marks.append([self._name(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino])
        return marks

    def sha256(self) -> str:
        """Of the file's bytes; of several files, of their names and hashes."""
        hashes = []
        for file in self.files:
            try:
                hashes.append(file.sha256 if isinstance(file, HubFile) else files.sha256(file))
            except OSError as error:
                raise _unreadable(file, error) from error
        if self.files == [self.path]:
            return hashes[0]
        lines = (f"{h}  {self._name(file)}\n" for h, file in zip(hashes, self.files))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def documents(self, first: int = 0) -> Iterator[list[str]]:
        """Every document as its passages, none of them empty, from file number `first` on; `done` goes to `bytes`."""
        self.control_characters = 0
        self.done = before = sum(map(_size, self.files[:first]))
        for number, file in enumerate(self.files[first:], first):
            self.file = number
            self.controls_before = self.control_characters
            self.held_out = self.sides is not None and file in self.sides[1]
            with self._open_file(file) as raw, _archive(raw, self._entries[file]) as archive:
                # In the end its name may be gone.
                size = file.size if isinstance(file, HubFile) else os.fstat(raw.fileno()).st_size
                for entry in self._entries[file]:
                    yield from self._documents_of(entry, raw, archive, before)
                before += size
            self.done = before

    def _documents_of(
        self, entry: _Entry, raw: IO[bytes], archive: zipfile.ZipFile | None, before: int
    ) -> Iterator[list[str]]:
        try:
            for document in self._read(entry, raw, archive, before):
                for part in _pieces(document) if self.unit == "piece" else (document,):
                    if passages := self._passages(part):
                        yield passages
        except _DAMAGED as error:
            raise _not_given(entry, error) from None
        except (RuntimeError, NotImplementedError) as error:  # as zipfile has it
            raise ValueError(
                f"{entry} cannot be unpacked ({error}): pack it again, without a password, by ordinary compression"
            ) from None
        except UnicodeError as error:
            try:
                wrong = self._undecodable(entry, error)
            except (*_DAMAGED, OSError) as damage:  # further on in the same line
                wrong = _not_given(entry, damage)
            raise wrong from None
        except OSError as error:
            raise _not_given(entry, error) from error

    # ------------------------------------------------------------------------------------------- finding files

    def _name(self, file: Path | HubFile) -> str:
        if isinstance(file, HubFile):
            return file.inside
        name = file.name if file == self.path else file.relative_to(self.path).as_posix()
        return _written(name)

    def _find(self) -> tuple[list[Path | HubFile], dict[Path | HubFile, list[_Entry]]]:
        files: list[Path | HubFile]
        try:
            if self.sides is not None:
                files = [*self.sides[0], *self.sides[1]]
            elif self.path.is_dir():
                files = [*sorted(_walk(self.path))]
            else:
                files = [self.path]
                self.path.stat()
            entries = {file: self._entries_of(file) for file in files}
        except FileNotFoundError as error:
            if self.path.exists():
                raise ValueError(
                    f"{error.filename} is a link that leads nowhere: fetch what it names, or remove it"
                ) from None
            raise ValueError(
                f"{self.where} does not exist (seen from {Path.cwd()}): say with --data.path where it is"
            ) from None
        except OSError as error:
            raise _unreadable(self.path, error) from error
        entries = {file: found for file, found in entries.items() if found}
        if not entries:
            raise ValueError(
                f"{self.where} holds no text files ({self.left_out or 'it is empty'}): known are "
                f"{', '.join((*_TEXT[:1], *_RECORDS))}, plain or in {', '.join((*_PACKED, '.zip'))}"
            )
        return list(entries), entries

    @property
    def left_out(self) -> str:
        """What is not read, in words: "3 .pdf, 1 without a suffix"; empty for nothing."""
        return ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in sorted(self.skipped.items()))

    @property
    def kinds(self) -> dict[str, int]:
        """Files that are read, by suffix."""
        entries = [entry for found in self._entries.values() for entry in found]
        return Counter(Path(entry.member or entry.path.name).suffix.lower() for entry in entries)

    def _entries_of(self, file: Path | HubFile) -> list[_Entry]:
        if isinstance(file, HubFile):
            return [_Entry(file, ".parquet")]
        if file.suffix.lower() == ".zip":
            _check_regular(file)
            try:
                with zipfile.ZipFile(file) as archive:
                    members = [info.filename for info in archive.infolist() if not info.is_dir()]
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise ValueError(f"{file} is damaged or no zip archive ({error}): fetch it again") from None
            names = sorted(set(members))
            if len(names) < len(members):
                twice = next(name for name, count in Counter(members).items() if count > 1)
                raise ValueError(
                    f"{file} has {twice!r} more than once, and only the last of them could be read: unpack it, and "
                    "give the folder"
                )
            names = [n for n in names if not _hidden(Path(n)) and not n.startswith("__MACOSX")]
            found = [(name, _kind(Path(name), alone=False)) for name in names]
            self._skip([name for name, kind in found if kind is None])
            return [_Entry(file, kind[0], kind[1], name) for name, kind in found if kind is not None]
        kind = _kind(file, alone=file == self.path)
        if kind is None:
            self._skip([file.name])
            return []
        _check_regular(file)
        return [_Entry(file, *kind)]

    def _skip(self, names: list[str]) -> None:
        for name in names:
            suffix = _written(Path(name).suffix.lower())
            self.skipped[suffix] = self.skipped.get(suffix, 0) + 1

    # --------------------------------------------------------------------------------------- reading documents

    def _open_file(self, path: Path | HubFile) -> IO[bytes]:
        if isinstance(path, HubFile):
            return path.open()
        try:
            return path.open("rb")
        except OSError as error:
            raise _unreadable(path, error) from error

    def _read(
        self, entry: _Entry, raw: IO[bytes], archive: zipfile.ZipFile | None, before: int
    ) -> Iterator[str]:
        """The documents of an entry; how far one has come is where the file on the disk is read."""
        if entry.kind != ".parquet":
            self._check_zeros(entry, raw, archive)
        with _opened(entry, raw, archive) as stream:
            if entry.kind == ".parquet":
                for text, share in _parquet(stream, entry, self.field):
                    self.done = before + int(share * _size(entry.path))
                    yield text
                return
            newline = "" if entry.kind in (".csv", ".tsv") else None
            lines = io.TextIOWrapper(stream, encoding=self._decoder, newline=newline)
            source: Iterator[str]
            if entry.kind in (".jsonl", ".ndjson"):
                source = _jsonl(lines, entry, self.field)
            elif entry.kind in (".csv", ".tsv"):
                source = _table(lines, entry, self.field, "," if entry.kind == ".csv" else "\t")
            elif self.unit in ("document", "record", "piece"):
                source = iter([lines.read()])
            elif self.unit == "paragraph":
                source = _paragraphs(lines)
            else:
                source = lines
            for text in source:
                self.done = before + raw.tell()
                yield text

    def _passages(self, text: str) -> list[str]:
        passages = self._cut(text)
        return [self.detokenize(passage) for passage in passages] if self.detokenize else passages

    def _cut(self, text: str) -> list[str]:
        if self.unit in ("record", "piece"):
            text, replaced = _HALVES.subn(
                " ", text
            )  # nothing could write them, whatever else stays as it stands
            self.control_characters += replaced
            return [text] if self.unit == "piece" or text.strip() else []
        text, replaced = _CONTROL.subn(" ", text)
        self.control_characters += replaced
        if "\r" in text:  # plain text comes without, records may have them
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.unit == "line":
            pieces = text.split("\n")
        elif self.unit == "paragraph":
            pieces = re.split(r"\n\s*\n", text)
        else:
            pieces = [text]
        return [stripped for piece in pieces if (stripped := piece.strip())]

    @contextmanager
    def _bytes(self, entry: _Entry) -> Iterator[IO[bytes]]:
        with (
            self._open_file(entry.path) as raw,
            _archive(raw, [entry]) as archive,
            _opened(entry, raw, archive) as stream,
        ):
            yield stream

    def _check_zeros(self, entry: _Entry, raw: IO[bytes], archive: zipfile.ZipFile | None) -> None:
        """Refuse what decodes, but to a zero for every other character."""
        if any(width in self.encoding for width in ("16", "32")):
            return
        with _opened(entry, raw, archive) as stream:
            start = stream.read(_LOOKED_AT)
        if archive is None:
            raw.seek(0)
        if (zeros := start.count(0)) <= len(start) / 8:
            return
        if start.startswith(_MARKS):
            raise self._marked(entry)
        raise ValueError(
            f"{entry} is not {self.encoding.upper()}: {zeros:,} of its first {len(start):,} bytes are zero; if it is "
            "UTF-16 set data.encoding = 'utf-16-le' (or 'utf-16-be'), if it is no text leave it out"
        )

    def _marked(self, entry: _Entry) -> ValueError:
        return ValueError(
            f"{entry} is not {self.encoding.upper()}: it is UTF-16: set data.encoding = 'utf-16'"
        )

    def _undecodable(self, entry: _Entry, error: UnicodeError) -> ValueError:
        """Where exactly the first wrong byte is: read again by bytes, since decoders count from where they like."""
        name = self.encoding.upper()
        hint = "convert it (for example: iconv -f latin1 -t utf8), name its data.encoding, or remove the byte"
        with self._bytes(entry) as stream:
            if stream.read(2) in _MARKS and "16" not in name:
                return self._marked(entry)
        with self._bytes(entry) as stream:
            at = 0
            for line, raw in enumerate(stream, 1):
                try:
                    raw.decode(self.encoding)
                except UnicodeDecodeError as wrong:
                    if "16" in name or "32" in name:
                        break  # lines of bytes are not lines of text there
                    return ValueError(
                        f"{entry} is not {name}: byte 0x{raw[wrong.start]:02x} at offset {at + wrong.start}, "
                        f"line {line}; {hint}"
                    )
                at += len(raw)
        return ValueError(f"{entry} is not {name} ({error}); {hint}")


def _size(file: Path | HubFile) -> int:
    return file.size if isinstance(file, HubFile) else file.stat().st_size


def _walk(folder: Path) -> list[Path]:
    """Files in a folder and its sub-folders, and what links lead to beside them; hidden ones are left out.

    OSError: a sub-folder or link that cannot be read; nothing is left out for that.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    links: list[Path] = []

    def fail(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where one has been
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(here) / name for name in names if not name.startswith(".")):
            path.stat()
            (links if path.is_symlink() else found).append(path)
    there = {os.path.realpath(path) for path in found} if links else set()
    for path in sorted(links):
        if (target := os.path.realpath(path)) not in there:
            there.add(target)
            found.append(path)
    return found


def _check_regular(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path} is a pipe or a device, and a text is read more than once: write what it gives into a file"
        )


def _written(name: str) -> str:
    """A name as it can be written: what is no text in it as \\udcff."""
    return name.encode(errors="backslashreplace").decode()


def _pieces(text: str) -> Iterator[str]:
    return (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") and part != ".." for part in path.parts)


def _kind(path: Path, *, alone: bool) -> tuple[str, str] | None:
    """What a name says: the kind and how it is packed. A file given by itself is plain text in case of doubt."""
    suffix, packed = path.suffix.lower(), ""
    if suffix in _PACKED:
        packed, suffix = suffix, Path(path.stem).suffix.lower()
    if alone and suffix in _NO_TEXT:
        raise ValueError(
            f"{path} is no plain text ({suffix}): unpack or convert it; known are .txt, {', '.join(_RECORDS)}, "
            f"plain or in {', '.join((*_PACKED, '.zip'))}"
        )
    if suffix in _RECORDS:
        if packed and suffix == ".parquet":
            raise ValueError(
                f"{path}: Parquet is packed by itself, and is not read through {packed}: unpack it"
            )
        return suffix, packed
    if suffix in _TEXT or alone:
        return ".txt", packed
    return None


@contextmanager
def _archive(raw: IO[bytes], entries: list[_Entry]) -> Iterator[zipfile.ZipFile | None]:
    """The archive that entries are members of, opened once: its list of members may be long."""
    if not entries[0].member:
        yield None
        return
    try:
        archive = zipfile.ZipFile(raw)
    except zipfile.BadZipFile as error:
        raise _damaged(entries[0], error) from None
    with archive:
        yield archive


@contextmanager
def _opened(entry: _Entry, raw: IO[bytes], archive: zipfile.ZipFile | None) -> Iterator[IO[bytes]]:
    """The bytes of an entry, unpacked."""
    with archive.open(entry.member) if archive is not None else nullcontext(raw) as stream:
        yield _PACKED[entry.packed](stream) if entry.packed else stream


def _damaged(entry: _Entry, error: Exception) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(
        f"{entry} is damaged or cut short ({reason}): fetch it again; a text is used whole or not at all"
    )


def _not_given(entry: _Entry, error: Exception) -> ValueError:
    # bz2 has no error of its own, and gzip's is an OSError: only the operating system's carry a number.
    return _unreadable(entry, error) if isinstance(error, OSError) and error.errno else _damaged(entry, error)


def _unreadable(what: object, error: OSError) -> UnreadableError:
    return UnreadableError(f"{what} cannot be read ({error.strerror or error}): check its permissions")


def _paragraphs(lines: IO[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.isspace():
            if held:
                yield "".join(held)
            held = []
        else:
            held.append(line)
    if held:
        yield "".join(held)


# ---------------------------------------------------------------------------------------------------- records


def _no_field(entry: _Entry, field: str, known: list[str], where: str = "") -> ValueError:
    shown = ", ".join(map(repr, known[:12])) + (", …" if len(known) > 12 else "")
    return ValueError(
        f"{entry}{where} has no field {field!r}: set data.field to one of {shown or 'its own (none)'}"
    )


def _times(line: str, field: str) -> int:
    """How often an object has a field itself, of which readers of JSON keep the last one."""
    top: list[tuple[str, Any]] = []

    def seen(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        top[:] = pairs  # the outermost object is the last to be whole
        return dict(pairs)

    json.loads(line, object_pairs_hook=seen)
    return sum(key == field for key, _ in top)


def _jsonl(lines: IO[str], entry: _Entry, field: str) -> Iterator[str]:
    good, names = 0, {json.dumps(field), json.dumps(field, ensure_ascii=False)}
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f", line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{entry}{where} is not JSON ({error}): one JSON object a line is read"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{entry}{where} holds {type(record).__name__}, not an object with fields")
        if sum(map(line.count, names)) > 1 and _times(line, field) > 1:
            raise ValueError(f"{entry}{where} has the field {field!r} more than once: mend the line")
        if field not in record and good:
            raise ValueError(
                f"{entry}{where} has no field {field!r}, which the {good:,} records before it have: mend the line, or "
                "remove it"
            )
        if field not in record:
            raise _no_field(entry, field, list(record), where)
        text = record[field]
        if text is None:
            continue  # no text, as an empty cell of a table is none
        if not isinstance(text, str):
            fix = "mend the line, or remove it" if good else "set data.field to another"
            raise ValueError(
                f"{entry}{where}: the field {field!r} holds {type(text).__name__}, not text: {fix}"
            )
        good += 1
        yield text


def _table(lines: IO[str], entry: _Entry, field: str, delimiter: str) -> Iterator[str]:
    with _long_fields():
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if header is None:
                return
            if field not in header:
                raise _no_field(entry, field, header)
            if header.count(field) > 1:
                raise ValueError(
                    f"{entry} has more than one column {field!r}: give them different names, and set data.field to "
                    "one of them"
                )
            column = header.index(field)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{entry}, line {rows.line_num} has {len(row)} columns, its header {len(header)}: quote texts "
                        f"that hold {'commas' if delimiter == ',' else 'tabs'}, quotes or ends of lines"
                    )
                yield row[column]
        except csv.Error as error:
            raise ValueError(
                f"{entry}, line {rows.line_num} is not CSV ({error}): check its quotes"
            ) from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields over 128 KiB, by a limit of the whole process: lifted here, and put back."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(stream: IO[bytes], entry: _Entry, field: str) -> Iterator[tuple[str, float]]:
    """Texts of a column, each with the share of the file that is done."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"{entry}: Parquet is read by pyarrow: pip install 'flowlm[data]'") from None
    try:
        # Read ahead, the columns of all of its parts would be kept until the end.
        table = parquet.ParquetFile(
            stream if stream.seekable() else io.BytesIO(stream.read()), pre_buffer=False
        )
    except arrow.ArrowException as error:
        raise _no_parquet(entry, f"is damaged or no Parquet file ({error})") from None
    if field not in table.schema_arrow.names:
        raise _no_field(entry, field, table.schema_arrow.names)
    if table.schema_arrow.names.count(field) > 1:
        raise ValueError(
            f"{entry} has more than one column {field!r}: leave one of them, or set data.field to another"
        )
    kind, types = table.schema_arrow.field(field).type, arrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not any(known(kind) for known in (types.is_string, types.is_large_string, types.is_string_view)):
        raise ValueError(f"{entry}: the column {field!r} holds {kind}, not text: set data.field to another")
    total, seen = table.metadata.num_rows, 0
    try:
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0):
                seen += 1
                if (text := value.as_py()) is not None:
                    yield text, seen / total
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{entry}, row {seen}: the column {field!r} holds bytes that are not UTF-8 ({error}): write it anew"
        ) from None
    except (arrow.ArrowException, OSError) as error:
        raise _no_parquet(entry, f"is damaged or cut short ({error})") from None


def _no_parquet(entry: _Entry, what: str) -> ValueError:
    # What comes over a line may come whole the next time.
    if isinstance(entry.path, HubFile):
        return UnreadableError(f"{entry} {what}, as it came: run it again")
    return ValueError(f"{entry} {what}: fetch it again")
