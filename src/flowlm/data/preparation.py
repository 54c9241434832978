"""Making prepared text: look at every document, to split and to count; then tokenise.

Memory is bounded by the longest document and the number of different words, which tokenizers count. Work lies in a
folder beside the final one until it is whole; what a kill leaves there is taken up again, to the same bytes.
"""

from __future__ import annotations

import errno
import glob
import io
import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flowlm import files
from flowlm.data.prepared import (
    FORMAT,
    META,
    SIDES,
    Prepared,
    Recipe,
    open_prepared,
    reuse,
    token_dtype,
)
from flowlm.data.readers import TextReader
from flowlm.data.remote import UnreadableError
from flowlm.data.split import DIGEST, Smallest, count_across, count_distinct, digest, is_held
from flowlm.data.tokens import Tokenizer
from flowlm.progress import Progress

__all__ = ["prepare", "refuse"]

_CHUNK = 4096  # passages tokenised at a time
_CHUNK_CHARACTERS = 1 << 22
_LONG = 1 << 16  # characters: longer passages are tokenised in parts
_KEEP_EVERY = 5.0  # seconds between points that a killed preparation goes on from
_PROGRESS_UNIT = 1 << 10
_WIDEST = 64  # bytes of rows for a byte of text and a token of length, at most: less is never short of room

Report = Callable[[str], None]


def prepare(
    reader: TextReader,
    recipe: Recipe,
    folder: Path,
    make_tokenizer: Callable[[Iterable[str]], Tokenizer],
    say: Report,
    *,
    tokenizer_sha256: str = "",
    replace: bool = True,
    origin: Mapping[str, str] | None = None,
) -> Prepared:
    """Prepare a text into `folder`, or map what is there already for the same recipe and text.

    One process prepares at a time; a second one waits, and finds it done.

    Args:
        reader: of the text.
        recipe: what to do with it; named in meta.json.
        folder: of the result.
        make_tokenizer: from all passages; one that is known before takes none.
        say: where plain messages go.
        tokenizer_sha256: of the tokenizer that `make_tokenizer` gives, if that is known.
        replace: what the folder holds of another text or recipe; else that is an error.
        origin: where the text comes from, for meta.json; nothing depends on it.

    Raises:
        ValueError: too little text, a text that changes meanwhile, or whatever its reader or tokenizer refuses.
        OSError: it could not be written; what was there is untouched.
    """
    import filelock

    if (found := reuse(reader, recipe, folder)) is not None:
        return found  # nothing has to be written, not even a lock
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, and left there: who removed it might remove the one that another process has just taken.
        lock_path = folder.with_name(f".{folder.name}.lock")
        lock = filelock.FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if not lock_path.exists():
                lock_path.touch()  # an error where no file can be made, as in /proc: there no one has it either
            say(f"another process is preparing {folder}: waiting for it")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise _unwritable(error, folder) from error
    try:
        if (found := reuse(reader, recipe, folder)) is None:
            if not replace and (folder / META).exists():
                refuse(recipe, reader, folder)
            preparation = _Preparation(reader, recipe, folder, make_tokenizer, say, tokenizer_sha256)
            preparation.origin = dict(origin or {})
            try:
                preparation.run()
            except UnreadableError:
                raise
            except ValueError:
                preparation.discard()  # it would not go better the next time
                raise
            except _NoRoom:
                raise
            except OSError as error:
                raise _unwritable(error, folder) from error
            found = open_prepared(folder)
        return found
    finally:
        lock.release()


class _NoRoom(OSError):
    """The disk is too small for the rows."""


def _unwritable(error: Exception, folder: Path) -> OSError:
    number = error.errno if isinstance(error, OSError) else None
    plain = files.explain(
        OSError(number or 0, (isinstance(error, OSError) and error.strerror) or str(error)), folder
    )
    hint = "choose another folder with --out, or for the cache with the variable FLOWLM_CACHE"
    return OSError(plain.errno, f"{plain.strerror}; {hint}")


def refuse(recipe: Recipe, reader: TextReader, folder: Path) -> None:
    """ValueError: the folder holds prepared text of another recipe, or of another text."""
    meta = open_prepared(folder).meta
    differences = recipe.differences(meta["recipe"])
    if not differences:
        differences = [f"the text was sha256 {meta['sha256'][:12]}…, is {reader.sha256()[:12]}…"]
    raise ValueError(
        f"{folder} holds prepared text already, of another kind: {'; '.join(differences)}. Give another --out, or "
        "remove it"
    )


_WHAT = "what.json"
_HELPERS = (_WHAT, "scanned.json", "scan.json", "tokenizer.done", "state.json", "hashes.bin", "sides.bin")


class _Preparation:
    """The work, in a folder beside the final one; every stage leaves what the next one and a resumption need."""

    def __init__(
        self,
        reader: TextReader,
        recipe: Recipe,
        folder: Path,
        make_tokenizer: Callable[[Iterable[str]], Tokenizer],
        say: Report,
        tokenizer_sha256: str,
    ):
        self.reader, self.recipe, self.folder, self.say = reader, recipe, folder, say
        self.make_tokenizer, self.tokenizer_sha256 = make_tokenizer, tokenizer_sha256
        self.work = folder.with_name(folder.name + ".partial")
        self.origin: dict[str, str] = {}

    def run(self) -> None:
        """All of it, or what is left of it."""
        next(self.reader.documents(), None)  # a wrong field is told now, and not when all files are hashed
        if self.tokenizer_sha256:
            self._check_room(self.make_tokenizer(()))
        what = {
            "format": FORMAT,
            "recipe": self.recipe.written(),
            "files": self.reader.fingerprint(),
            "sha256": self.reader.sha256(),
        }
        if not self._resumes(what | {"given": self.tokenizer_sha256}):
            self.discard()
            self.work.mkdir(parents=True)
            files.write_json(self.work / _WHAT, what | {"given": self.tokenizer_sha256})
        if not (self.work / META).exists():
            scan = self._stage("scan.json", self._scan)
            tokenizer = self._tokenizer()
            if not self.tokenizer_sha256:
                self._check_room(tokenizer)
            counts = self._encode(tokenizer, scan)
            touched = self.reader.fingerprint() != what["files"]
            if counts["documents"] != scan["documents"] or (
                touched and self.reader.sha256() != what["sha256"]
            ):
                raise ValueError(f"{self.reader.where} changed while it was read: run again")
            meta = what | self._meta(scan, counts, tokenizer)
            meta["rows_sha256"] = {side: files.sha256(self.work / f"{side}.bin") for side in SIDES}
            if self.origin:
                meta["origin"] = self.origin
            files.write_json(self.work / META, meta)
        self._put_in_place()

    def _check_room(self, tokenizer: Tokenizer) -> None:
        """Whether the disk has room for what is still to be written, judged by the first documents.

        _NoRoom: it has not.
        """
        free = shutil.disk_usage(self.folder.parent).free
        if self.reader.bytes * _WIDEST * self.recipe.length < free:
            return
        first = next(_chunks(self.reader.documents()), [])
        with io.BytesIO() as nowhere:
            side = _Side(nowhere, tokenizer, self.recipe)
            side.add(list(_encode(tokenizer, list(chain.from_iterable(first)))))
            size = side.size + side.left * side.itemsize + 9 * side.counts["passages"]  # and their hashes
        share = self.reader.done / self.reader.bytes or 1.0
        there = sum(file.stat().st_size for file in self.work.glob("*")) if self.work.exists() else 0
        if (need := size / share - there) > free:
            raise _NoRoom(
                errno.ENOSPC,
                f"{self.folder} will take about {need / 1e9:,.2f} GB, and its disk has {free / 1e9:,.2f} GB left: free "
                "some space, or choose another folder with --out, or for the cache with the variable FLOWLM_CACHE; "
                "nothing was written",
            )

    def _put_in_place(self) -> None:
        """The finished folder takes the place of an old one; a kill at any point leaves one of them whole."""
        if self.folder.exists():
            os.replace(self.folder, self.folder.with_name(f"{self.folder.name}.old-{secrets.token_hex(4)}"))
        os.replace(self.work, self.folder)
        for name in _HELPERS:
            (self.folder / name).unlink(missing_ok=True)
        for half in self.folder.glob(".*.tmp"):  # of a write that was killed
            half.unlink()
        for old in self.folder.parent.glob(f"{glob.escape(self.folder.name)}.old-*"):
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove unfinished work; only what was made here.

        ValueError: the place is taken by something else.
        """
        if not self.work.exists():
            return
        found = sorted(self.work.iterdir())
        # A kill may have come while the first of the files was written.
        ours = (self.work / _WHAT).exists() or all(path.name.startswith(f".{_WHAT}.") for path in found)
        if not ours:
            raise ValueError(
                f"{self.work} is in the way, and was not made here: move it, or give another --out"
            )
        # What says whose it is goes last, and says so to the next one if a kill comes before.
        for path in sorted(found, key=lambda path: path.name == _WHAT):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.work.rmdir()

    def _resumes(self, what: dict[str, Any]) -> bool:
        try:
            found = json.loads((self.work / _WHAT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        # Files that were touched and hold the same are the same.
        if found | {"files": None} != json.loads(json.dumps(what | {"files": None})):
            return False
        self.say(f"going on with a preparation that was interrupted, in {self.work}")
        return True

    def _stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.work / name
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        made = make()
        files.write_json(path, made)
        return made

    def _progress(self, label: str) -> Progress:
        return Progress(max(1, self.reader.bytes // _PROGRESS_UNIT), 0, 0, self.say, label=label, brief=True)

    def _documents(
        self, progress: Progress, first: int = 0, by_file: Sequence[int] = ()
    ) -> Iterator[list[str]]:
        """Those from number `first` on: what was done with the others took its time before. Of files that have so many
        documents, those that lie before it are not read."""
        told = files_before = before = 0
        for count in by_file:
            if before + count > first:
                break
            before, files_before = before + count, files_before + 1
        for number, document in enumerate(self.reader.documents(files_before), before):
            at = self.reader.done // _PROGRESS_UNIT
            if number == first > 0:
                told = at
                progress.go_on_from(min(at, progress.total))
            if at > told:
                told = at
                progress.advance(min(at, progress.total))
            if number >= first:
                yield document

    # -- first pass: hashes, counts, which documents are held out --------------------------------------------

    def _scan(self) -> dict[str, Any]:
        """Counts documents and passages, and says which documents are held out.

        Those with the smallest hashes are, or the last ones: by their number, or as a split of their own.
        """
        by_hash = self.recipe.split == "hash"
        candidates = Smallest(4 * self.recipe.held_out + 64 if by_hash else 0)
        scanned = self.work / "scanned.json"
        documents = passages = of_split = controls = 0
        by_file: list[int] = []
        if scanned.exists():
            documents, passages, of_split, controls, by_file = json.loads(scanned.read_text(encoding="utf-8"))
        with self._progress("KiB looked at") as progress, (self.work / "hashes.bin").open("ab") as hashes:
            hashes.truncate(DIGEST * passages)

            def keep() -> None:
                """Where no document is picked out by its hash, files that were looked at need not be again."""
                if by_hash or not by_file or self.reader.file < len(by_file):
                    return
                hashes.flush()
                os.fsync(hashes.fileno())
                counts = [documents, passages, of_split, controls + self.reader.controls_before]
                files.write_json(scanned, [*counts, by_file])

            try:
                for document in self._documents(progress, documents, by_file):
                    keep()
                    by_file += [0] * (self.reader.file + 1 - len(by_file))
                    by_file[self.reader.file] += 1
                    digests = [digest(passage) for passage in document]
                    hashes.write(b"".join(digests))
                    if by_hash:
                        own = digests[0] if len(digests) == 1 else digest("\n".join(document))
                        candidates.add(int.from_bytes(own, "little"), len(document))
                    of_split += self.reader.held_out
                    documents, passages = documents + 1, passages + len(document)
            except BaseException:
                keep()
                raise
        if documents < 2:
            raise ValueError(self._too_few(documents))
        if by_hash and len(candidates.counts) < 2:
            raise ValueError(
                f"{self.reader.where}: all {documents} passages are the same, {document[0][:40]!r}; "
                "held-out text must differ from training text: give at least two different passages"
            )
        last = self.recipe.held_out if self.recipe.split == "last" else of_split
        if not by_hash and not 0 < last < documents:
            raise ValueError(self._no_sides(documents, last))
        distinct = count_distinct(self.work / "hashes.bin")
        return {
            "documents": documents,
            "passages": passages,
            "duplicates": passages - distinct,
            "control_characters": controls + self.reader.control_characters,
            "by_file": by_file,
            "held": candidates.choose(max(1, min(self.recipe.held_out, passages // 10))) if by_hash else [],
            "last": 0 if by_hash else last,
        }

    def _no_sides(self, documents: int, held: int) -> str:
        where = self.reader.where
        if self.recipe.split == "last":
            return (
                f"{where} has {documents:,} documents, and the last {held:,} of them are held out: none is left to "
                "train on; hold out fewer with data.held_out"
            )
        return f"{where}: there is no text in the split {self.recipe.split if not held else 'train'!r}: fetch it again"

    def _too_few(self, documents: int) -> str:
        where, unit = self.reader.where, self.recipe.unit
        if not documents:
            return f"{where} holds no text ({self.reader.bytes} bytes): give a file with passages"
        fix = {
            "line": "break the text into lines",
            "paragraph": "leave blank lines between paragraphs, or use data.unit = 'line'",
        }.get(unit, "give several files or records, or use data.unit = 'paragraph'")
        if self.reader.has_records:
            unit, fix = "record", "records stay whole: give several"
        return f"{where} is a single {unit}: one passage is needed to train on and one to hold out; {fix}"

    # -- the tokenizer ---------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        if (self.work / "tokenizer.done").exists():  # it may be two files
            return Tokenizer.load(self.work)
        with self._progress("KiB read for the tokenizer") as progress:
            passages = chain.from_iterable(self._documents(progress))
            # A passage of many megabytes would take a trainer gigabytes: in parts it has the same words.
            parts = (part for text in passages for part in (_parts(text) if len(text) > _LONG else (text,)))
            tokenizer = self.make_tokenizer(parts)
        tokenizer.save(self.work)
        files.write_data(self.work / "tokenizer.done", "")
        return tokenizer

    # -- second pass: ids, rows ------------------------------------------------------------------------------

    def _encode(self, tokenizer: Tokenizer, scan: dict[str, Any]) -> dict[str, Any]:
        held, first_held = set(scan["held"]), scan["documents"] - scan.get("last", 0)
        sides = {
            name: _Side((self.work / f"{name}.bin").open("ab"), tokenizer, self.recipe) for name in SIDES
        }
        outputs = [*(side.file for side in sides.values()), (self.work / "sides.bin").open("ab")]
        state_path = self.work / "state.json"
        done, before = 0, 0.0
        if state_path.exists():
            state = json.loads(state_path.read_text(encoding="utf-8"))
            done, before = state["documents"], state["seconds"]
            for name, side in sides.items():
                side.restore(state[name])
            sizes = [*(side.size for side in sides.values()), state["sides"]]
        else:
            sizes = [0] * len(outputs)
        for output, size in zip(outputs, sizes):
            output.truncate(size)  # what came after the last point that was kept
            output.seek(size)
        start = kept = time.perf_counter()
        with self._progress("KiB tokenised") as progress:
            for chunk in _chunks(self._documents(progress, done, scan.get("by_file", ()))):
                which = [
                    n >= first_held or (bool(held) and is_held(document, held))
                    for n, document in enumerate(chunk, done)
                ]
                ids = _encode(tokenizer, list(chain.from_iterable(chunk)))
                rows: dict[bool, list[list[int]]] = {False: [], True: []}
                for document, held_out in zip(chunk, which):
                    rows[held_out] += itertools.islice(ids, len(document))
                    outputs[-1].write(bytes([held_out]) * len(document))
                for which_side, passages in rows.items():
                    sides[SIDES[which_side]].add(passages)
                done += len(chunk)
                if (now := time.perf_counter()) - kept > _KEEP_EVERY:
                    kept = now
                    for output in outputs:
                        output.flush()
                        os.fsync(output.fileno())
                    state = {name: side.state() for name, side in sides.items()}
                    state |= {"documents": done, "seconds": before + now - start, "sides": outputs[-1].tell()}
                    files.write_json(state_path, state)
            for side in sides.values():
                side.close()
        outputs[-1].close()
        seconds = before + time.perf_counter() - start
        counts: dict[str, Any] = {name: side.counts for name, side in sides.items()}
        counts["kinds"] = [kind for side in sides.values() for kind in side.kinds]
        if (self.work / "sides.bin").stat().st_size * 8 != (self.work / "hashes.bin").stat().st_size:
            return counts | {"documents": -1}  # another number of passages than before: it changed
        across = count_across(self.work / "hashes.bin", self.work / "sides.bin")
        return counts | {"held_out_in_train": across, "seconds": seconds, "documents": done}

    def _meta(self, scan: dict[str, Any], counts: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
        train, held = counts["train"], counts["held_out"]
        both = {key: train[key] + held[key] for key in train}
        later = {key: both[key] for key in ("left_over",) if key in both}
        if self.recipe.split != "hash":
            later["held_out_documents"] = scan["last"]
        where = self.reader.where
        for side, count in (("train", train), ("held_out", held)):
            if not count["rows"]:
                use = "to train on" if side == "train" else "held out"
                if count.get("left_over"):
                    raise ValueError(
                        f"{where}: the {count['left_over']:,} tokens {use} "
                        f"do not fill a row of {self.recipe.length}: give more text, or a smaller model.length"
                    )
                raise ValueError(
                    f"{where}: nothing is left {use} of "
                    f"{scan['passages']:,} passages ({both['dropped_unknown']:,} dropped for unknown words, "
                    f"{both['dropped_long']:,} as longer than {self.recipe.length - 1} tokens): raise "
                    "data.vocab_size or model.length, or do not drop"
                )
        if len(kinds := {*counts["kinds"]}) < 2:
            raise ValueError(
                f"{where} holds {tokenizer.token(kinds.pop())!r} and nothing else: there is nothing to learn; give a "
                "text with at least two different tokens"
            )
        passages = both["passages"]
        return {
            "bytes": self.reader.bytes,
            **{key: scan[key] for key in ("documents", "passages", "duplicates", "control_characters")},
            "held_out_in_train": counts["held_out_in_train"],
            "skipped_files": self.reader.skipped,
            **{
                k: both[k]
                for k in ("unknown", "empty", "dropped_unknown", "dropped_long", "cut", "cut_tokens", "split")
            },
            "tokenizer": tokenizer.kind,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "length": self.recipe.length,
            "dtype": np.dtype(token_dtype(tokenizer.vocab_size)).name,
            "train": train["rows"],
            "held_out": held["rows"],
            "tokens": train["tokens"],  # [EOS] counts, [PAD] does not
            "held_out_tokens": held["tokens"],
            "mean_tokens": both["ids"] / passages,  # of a passage as it stands in the text, without [EOS]
            "max_tokens": max(train["longest"], held["longest"]),
            **later,
            "seconds": round(counts["seconds"], 3),
        }


def _chunks(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Documents in groups of bounded size."""
    group: list[list[str]] = []
    passages = characters = 0
    for document in documents:
        group.append(document)
        passages += len(document)
        characters += sum(map(len, document))
        if passages >= _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield group
            group, passages, characters = [], 0, 0
    if group:
        yield group


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text. A very long one goes in parts where the tokenizer surely cuts between them too."""
    parts = [
        list(_parts(text)) if tokenizer.cuts_at_spaces and len(text) > _LONG else [text] for text in texts
    ]
    flat = list(chain.from_iterable(parts))
    # The library's own form of the ids takes a hundred bytes each: not for all of them at once.
    step = _CHUNK if max(map(len, flat), default=0) < _LONG // 2 else max(1, _CHUNK_CHARACTERS // _LONG)
    ids = (own for a in range(0, len(flat), step) for own in tokenizer.encode(flat[a : a + step]))
    for own in parts:
        yield list(chain.from_iterable(itertools.islice(ids, len(own))))


def _parts(text: str) -> Iterator[str]:
    """A long text in parts, cut before a single space or end of line, where `Tokenizer.cuts_at_spaces`.

    Where there is none in 65,536 characters (other scripts, or no text at all) it is cut there: one word in as many
    may be tokenised as two.
    """
    at = 0
    while len(text) - at > _LONG:
        end = at + _LONG
        while (end := max(text.rfind(" ", at + 1, end), text.rfind("\n", at + 1, end))) > at and (
            text[end - 1].isspace() or text[end + 1].isspace()  # neither end may join with another space
        ):
            pass
        if end <= at:
            end = at + _LONG
        yield text[at:end]
        at = end
    yield text[at:]


_COUNTS = (
    "rows",
    "tokens",
    "passages",
    "ids",
    "longest",
    "unknown",
    "empty",
    "dropped_unknown",
    "dropped_long",
    "cut",
    "cut_tokens",
    "split",
)


class _Side:
    """The rows of one side, written as they come.

    A row is what fits of a passage, or of all of them wrapped, and the end token. With a begin token both frame it. Of
    passages that are wrapped in frames, or joined without anything ("chunk"), only full rows are written.
    """

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, recipe: Recipe):
        self.file = file
        self.tokenizer, self.recipe = tokenizer, recipe
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.itemsize = np.dtype(self.dtype).itemsize
        self._begin = [tokenizer.id(recipe.bos)] if recipe.bos else []
        self._close = [] if recipe.rows == "chunk" else [tokenizer.eos_id]  # after a passage
        self._end = [tokenizer.eos_id] if recipe.bos else []  # after a row of wrapped passages
        self._only_full = recipe.rows == "chunk" or (recipe.rows == "wrap" and bool(recipe.bos))
        self.counts = dict.fromkeys((*_COUNTS, "left_over") if self._only_full else _COUNTS, 0)
        self.size = 0  # bytes written
        self._tail: list[int] = []  # wrap: ids of a block that is not full yet
        self.kinds: set[int] = set()  # the first few different ids

    @property
    def left(self) -> int:
        """Ids that wait for a row to become full."""
        return len(self._tail)

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "tail": self._tail, "size": self.size, "kinds": sorted(self.kinds)[:2]}

    def restore(self, state: dict[str, Any]) -> None:
        self.counts, self._tail, self.kinds = state["counts"], state["tail"], set(state["kinds"])
        self.size = state["size"]

    def add(self, passages: Sequence[list[int]]) -> None:
        counts, unk = self.counts, self.tokenizer.unk_id
        room = self.recipe.length - 1 - len(self._begin)
        inner = self.recipe.length - len(self._begin) - len(self._end)
        rows: list[list[int]] = []
        for ids in passages:
            counts["passages"] += 1
            counts["ids"] += len(ids)
            counts["longest"] = max(counts["longest"], len(ids))
            unknown = ids.count(unk) if unk is not None else 0
            counts["unknown"] += unknown
            if unknown and self.recipe.unknown == "drop":
                counts["dropped_unknown"] += 1
                continue
            if not ids:
                counts["empty"] += 1  # signs that the tokenizer drops
                continue
            if len(self.kinds) < 2:
                self.kinds.update(ids)
            if self.recipe.rows in ("wrap", "chunk"):
                stream = [*self._tail, *ids, *self._close]
                full = len(stream) - len(stream) % inner
                rows += [[*self._begin, *stream[a : a + inner], *self._end] for a in range(0, full, inner)]
                self._tail = stream[full:]
                continue
            if len(ids) > room:
                if self.recipe.rows == "drop":
                    counts["dropped_long"] += 1
                    continue
                if self.recipe.rows == "cut":
                    counts["cut"] += 1
                    counts["cut_tokens"] += len(ids) - room
                    ids = ids[:room]
                else:
                    counts["split"] += 1
            rows += [
                [*self._begin, *ids[a : a + room], self.tokenizer.eos_id] for a in range(0, len(ids), room)
            ]
        self._write(rows)

    def _write(self, rows: list[list[int]]) -> None:
        if not rows:
            return
        block: NDArray[Any] = np.full((len(rows), self.recipe.length), self.tokenizer.pad_id, self.dtype)
        for row, ids in zip(block, rows):
            row[: len(ids)] = ids
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += sum(map(len, rows))
        self.file.write(block.tobytes())
        self.size += block.nbytes

    def close(self) -> None:
        if self._only_full:
            self.counts["left_over"] = self.left
        elif self._tail:
            self._write([self._tail])
        self._tail = []
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
