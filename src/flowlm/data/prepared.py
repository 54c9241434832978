"""Text prepared once: rows of token ids in memory-mapped files, with a meta.json that says what they are.

    train.bin, held_out.bin    rows of L ids, uint16 or int32, end to end
    tokenizer.json             what made them
    meta.json                  written last: recipe, source (files, sha256), counts. Without it the rest is unfinished.

Two passes over the text: the first looks at every document, to split and to count; the second tokenises. Memory is
bounded by the longest document. Work lies in a folder beside until it is whole; what a kill leaves there is taken up
again, to the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flowlm import files
from flowlm.data.readers import TextReader
from flowlm.data.tokens import Tokenizer
from flowlm.progress import Progress

__all__ = ["FORMAT", "META", "Prepared", "Recipe", "is_prepared", "open_prepared", "prepare", "token_dtype"]

FORMAT = "flowlm-data/1"
META = "meta.json"
SIDES = ("train", "held_out")

_CHUNK = 4096  # passages tokenised at a time
_CHUNK_CHARACTERS = 1 << 22
_LONG = 1 << 16  # characters: longer passages are tokenised in parts
_KEEP_EVERY = 5.0  # seconds between points that a killed preparation goes on from
_PROGRESS_UNIT = 1 << 10

Report = Callable[[str], None]


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

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where a recipe that was written down differs from this one."""
        mine = vars(self)
        return [f"{k} was {other.get(k)!r}, is {mine[k]!r}" for k in mine if other.get(k) != mine[k]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows `train` (N, L) and `held_out` (M, L), mapped from disk, and what is known of them."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    tokenizer: Tokenizer
    meta: dict[str, Any]
    folder: Path


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared text, whole or not."""
    return (folder / META).exists() or (folder / "train.bin").exists()


def open_prepared(folder: Path) -> Prepared:
    """Map what `prepare` wrote.

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
        rows.append(np.memmap(file, dtype, "r", shape=shape))
    return Prepared(rows[0], rows[1], tokenizer, meta, folder)


def prepare(
    reader: TextReader,
    recipe: Recipe,
    folder: Path,
    make_tokenizer: Callable[[Iterable[str]], Tokenizer],
    say: Report,
) -> Prepared:
    """Prepare a text into `folder`, or map what is there already for the same recipe and text.

    One process prepares at a time; a second one waits, and finds it done.

    Args:
        reader: of the text.
        recipe: what to do with it; named in meta.json.
        folder: replaced when it holds another text or recipe.
        make_tokenizer: from all passages; called once.
        say: where plain messages go.

    Raises:
        ValueError: too little text, or whatever its reader or tokenizer refuses.
        OSError: it could not be written; what was there is untouched.
    """
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(folder) + ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"another process is preparing {folder}: waiting for it")
            lock.acquire()
    except OSError as error:
        raise files.explain(error, folder) from error
    try:
        found = _reuse(reader, recipe, folder)
        if found is None:
            try:
                _Preparation(reader, recipe, folder, make_tokenizer, say).run()
            except OSError as error:
                raise files.explain(error, folder) if error.errno else error from error
            found = open_prepared(folder)
        return found
    finally:
        lock.release()


def _reuse(reader: TextReader, recipe: Recipe, folder: Path) -> Prepared | None:
    """What is there, if it is what would be prepared; touched files are looked into before they count as changed."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or recipe.differences(meta["recipe"]):
            return None
        source = {"files": reader.fingerprint()}
        if source["files"] != meta["files"]:
            if reader.sha256() != meta["sha256"]:
                return None
            files.write_json(folder / META, meta | source)
        return open_prepared(folder)
    except (ValueError, KeyError, OSError, TypeError):
        return None  # damaged or cut short: it is made anew


# ------------------------------------------------------------------------------------------------ preparation


class _Preparation:
    """The work, in a folder beside the final one; every stage leaves what the next one and a resumption need."""

    def __init__(
        self,
        reader: TextReader,
        recipe: Recipe,
        folder: Path,
        make_tokenizer: Callable[[Iterable[str]], Tokenizer],
        say: Report,
    ):
        self.reader, self.recipe, self.folder, self.say = reader, recipe, folder, say
        self.make_tokenizer = make_tokenizer
        self.work = folder.with_name(folder.name + ".partial")

    def run(self) -> None:
        what = {
            "format": FORMAT,
            "recipe": vars(self.recipe),
            "files": self.reader.fingerprint(),
            "sha256": self.reader.sha256(),
        }
        if not self._resumes(what):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            files.write_json(self.work / "what.json", what)
        scan = self._stage("scan.json", self._scan)
        tokenizer = self._tokenizer()
        counts = self._encode(tokenizer, scan)
        meta = what | self._meta(scan, counts, tokenizer)
        for name in ("what.json", "scan.json", "state.json", "hashes.bin", "sides.bin"):
            (self.work / name).unlink(missing_ok=True)
        files.write_json(self.work / META, meta)
        if self.folder.exists():
            old = self.folder.with_name(f"{self.folder.name}.old-{os.getpid()}")
            os.replace(self.folder, old)
            os.replace(self.work, self.folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(self.work, self.folder)

    def _resumes(self, what: dict[str, Any]) -> bool:
        try:
            same = json.loads((self.work / "what.json").read_text(encoding="utf-8")) == json.loads(
                json.dumps(what)
            )
        except (OSError, ValueError):
            return False
        if same:
            self.say(f"going on with a preparation that was interrupted, in {self.work}")
        return same

    def _stage(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.work / name
        if path.exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        made = make()
        files.write_json(path, made)
        return made

    def _progress(self, label: str) -> Progress:
        return Progress(max(1, self.reader.bytes // _PROGRESS_UNIT), 0, 0, self.say, label=label, brief=True)

    def _documents(self, progress: Progress) -> Iterator[list[str]]:
        told = 0
        for document in self.reader.documents():
            at = self.reader.done // _PROGRESS_UNIT
            if at > told:
                told = at
                progress.advance(min(at, progress.total))
            yield document

    # -- first pass: hashes, counts, which documents are held out --------------------------------------------

    def _scan(self) -> dict[str, Any]:
        """Counts documents and passages, and chooses the held-out documents by the order of their hashes."""
        candidates = _Smallest(4 * self.recipe.held_out + 64)
        documents = passages = size = 0
        with self._progress("KiB looked at") as progress, (self.work / "hashes.bin").open("wb") as hashes:
            for document in self._documents(progress):
                digests = [_digest(passage) for passage in document]
                hashes.write(b"".join(digests))
                own = digests[0] if len(digests) == 1 else _digest("\n".join(document))
                candidates.add(int.from_bytes(own, "little"), len(document))
                documents, passages = documents + 1, passages + len(document)
                size += sum(map(len, document))
        if documents < 2:
            raise ValueError(self._too_few(documents))
        if len(candidates.counts) < 2:
            raise ValueError(
                f"data.path = {str(self.reader.path)!r}: all {documents} passages are the same, {document[0][:40]!r}; "
                "held-out text must differ from training text: give at least two different passages"
            )
        distinct = _count_distinct(self.work / "hashes.bin")
        return {
            "documents": documents,
            "passages": passages,
            "characters": size,
            "duplicates": passages - distinct,
            "control_characters": self.reader.control_characters,
            "held": candidates.choose(max(1, min(self.recipe.held_out, passages // 10))),
        }

    def _too_few(self, documents: int) -> str:
        where, unit = f"data.path = {str(self.reader.path)!r}", self.recipe.unit
        if not documents:
            return f"{where} holds no text ({self.reader.bytes} bytes): give a file with passages"
        fix = {
            "line": "break the text into lines",
            "paragraph": "leave blank lines between paragraphs, or use data.unit = 'line'",
            "document": "give several files or records, or use data.unit = 'paragraph'",
        }[unit]
        if self.reader.has_records:
            unit, fix = "record", "records stay whole: give several"
        return f"{where} is a single {unit}: one passage is needed to train on and one to hold out; {fix}"

    # -- the tokenizer ---------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        if (self.work / "tokenizer.json").exists():
            return Tokenizer.load(self.work)
        with self._progress("KiB read for the tokenizer") as progress:
            passages = chain.from_iterable(self._documents(progress))
            # A passage of many megabytes would take a trainer gigabytes: in parts it has the same words.
            parts = (part for text in passages for part in (_parts(text) if len(text) > _LONG else (text,)))
            tokenizer = self.make_tokenizer(parts)
        tokenizer.save(self.work)
        return tokenizer

    # -- second pass: ids, rows ------------------------------------------------------------------------------

    def _encode(self, tokenizer: Tokenizer, scan: dict[str, Any]) -> dict[str, Any]:
        held = set(scan["held"])
        sides = {name: _Side(self.work / f"{name}.bin", tokenizer, self.recipe) for name in SIDES}
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
            documents = itertools.islice(self._documents(progress), done, None)
            for chunk in _chunks(documents):
                which = [_is_held(document, held) for document in chunk]
                ids = _encode(tokenizer, list(chain.from_iterable(chunk)))
                rows: dict[bool, list[list[int]]] = {False: [], True: []}
                for document, is_held in zip(chunk, which):
                    rows[is_held] += itertools.islice(ids, len(document))
                    outputs[-1].write(bytes([is_held]) * len(document))
                for is_held, passages in rows.items():
                    sides[SIDES[is_held]].add(passages)
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
        across = _count_across(self.work / "hashes.bin", self.work / "sides.bin")
        return counts | {"held_out_in_train": across, "seconds": seconds}

    def _meta(self, scan: dict[str, Any], counts: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
        train, held = counts["train"], counts["held_out"]
        both = {key: train[key] + held[key] for key in train}
        where = f"data.path = {str(self.reader.path)!r}"
        for side, count in (("train", train), ("held_out", held)):
            if not count["rows"]:
                raise ValueError(
                    f"{where}: nothing is left {'to train on' if side == 'train' else 'held out'} of "
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
                for k in ("unknown", "dropped_unknown", "dropped_long", "cut", "cut_tokens", "split")
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
            "seconds": round(counts["seconds"], 3),
        }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _is_held(document: Sequence[str], held: set[int]) -> bool:
    text = document[0] if len(document) == 1 else "\n".join(document)
    return int.from_bytes(_digest(text), "little") in held


class _Smallest:
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


def _count_distinct(path: Path) -> int:
    """Distinct 8-byte hashes in a file, by sixteenths of their range."""
    if not path.stat().st_size:
        return 0
    hashes = np.memmap(path, np.uint64, "r")
    blocks = range(0, len(hashes), 1 << 22)
    total = 0
    for part in range(16):
        own = [
            block[block >> np.uint64(60) == part]
            for a in blocks
            if (block := hashes[a : a + (1 << 22)]) is not None
        ]
        total += len(np.unique(np.concatenate(own)))
    return total


def _count_across(hashes: Path, sides: Path) -> int:
    """Held-out passages whose text is also a training passage."""
    every, side = np.memmap(hashes, np.uint64, "r"), np.memmap(sides, np.uint8, "r")
    held = np.sort(every[side == 1])
    found = np.zeros(len(held), bool)
    for a in range(0, len(every), 1 << 22):
        block = every[a : a + (1 << 22)][side[a : a + (1 << 22)] == 0]
        found |= np.isin(held, block)
    return int(found.sum())


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
    """Ids of each text. A very long one goes in parts, cut before single spaces, where these tokenizers cut too."""
    cuts = tokenizer.kind in ("words", "wordpiece") or not tokenizer.losses
    parts = [list(_parts(text)) if cuts and len(text) > _LONG else [text] for text in texts]
    flat = list(chain.from_iterable(parts))
    # The library's own form of the ids takes a hundred bytes each: not for all of them at once.
    step = _CHUNK if max(map(len, flat), default=0) < _LONG // 2 else max(1, _CHUNK_CHARACTERS // _LONG)
    ids = (own for a in range(0, len(flat), step) for own in tokenizer.encode(flat[a : a + step]))
    for own in parts:
        yield list(chain.from_iterable(itertools.islice(ids, len(own))))


def _parts(text: str) -> Iterator[str]:
    at = 0
    while len(text) - at > _LONG:
        end = text.rfind(" ", at + 1, at + _LONG)
        # between two letters or signs: neither end may join with another space
        while end > at and (text[end - 1].isspace() or text[end + 1].isspace()):
            end = text.rfind(" ", at + 1, end)
        if end <= at:
            raise ValueError(
                f"a passage has {_LONG:,} characters without a space, from {text[at : at + 30]!r} on: this is no text "
                "that is made of words; remove it, or break it up"
            )
        yield text[at:end]
        at = end
    yield text[at:]


def token_dtype(vocab_size: int) -> type:
    """Of stored ids: uint16 where V allows, else int32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


_COUNTS = (
    "rows",
    "tokens",
    "passages",
    "ids",
    "longest",
    "unknown",
    "dropped_unknown",
    "dropped_long",
    "cut",
    "cut_tokens",
    "split",
)


class _Side:
    """The rows of one side, written as they come."""

    def __init__(self, path: Path, tokenizer: Tokenizer, recipe: Recipe):
        self.file: BinaryIO = path.open("ab")
        self.tokenizer, self.recipe = tokenizer, recipe
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.size = 0  # bytes written
        self._tail: list[int] = []  # wrap: ids of a block that is not full yet
        self.kinds: set[int] = set()  # the first few different ids

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "tail": self._tail, "size": self.size, "kinds": sorted(self.kinds)[:2]}

    def restore(self, state: dict[str, Any]) -> None:
        self.counts, self._tail, self.kinds = state["counts"], state["tail"], set(state["kinds"])
        self.size = state["size"]

    def add(self, passages: Sequence[list[int]]) -> None:
        counts, room, unk = self.counts, self.recipe.length - 1, self.tokenizer.unk_id
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
            if len(self.kinds) < 2:
                self.kinds.update(ids)
            if self.recipe.rows == "wrap":
                self._tail += ids
                self._tail.append(self.tokenizer.eos_id)
                while len(self._tail) >= self.recipe.length:
                    rows.append(self._tail[: self.recipe.length])
                    del self._tail[: self.recipe.length]
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
            rows += [[*ids[a : a + room], self.tokenizer.eos_id] for a in range(0, max(1, len(ids)), room)]
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
        if self._tail:
            self._write([self._tail])
            self._tail = []
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
