"""Prepared text: the same bytes after a kill, one preparation at a time, never a stale or half-written one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from flowlm.data import preparation
from flowlm.data.corpora import Corpus, DataConfig, load_corpus, prepare_corpus
from flowlm.data.preparation import _encode
from flowlm.data.prepared import FORMAT, META, Recipe, open_prepared
from flowlm.data.readers import TextReader
from flowlm.data.remote import UnreadableError
from flowlm.data.split import Smallest, count_across, count_distinct
from flowlm.data.tokens import Tokenizer

LINES = [
    f"the {a} {b} saw {c} {n}."
    for a in ("big", "old")
    for b in ("cat", "dog")
    for c in ("a", "me")
    for n in range(40)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


def config(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(corpus="text", path=str(path), **fields)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def only_folder(cache: Path) -> Path:
    (found,) = (p for p in cache.iterdir() if p.is_dir())
    return found


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("read again")


def same(a: Corpus, b: Corpus) -> bool:
    return np.array_equal(a.train, b.train) and np.array_equal(a.held_out, b.held_out) and a.meta == b.meta


# ------------------------------------------------------------------------------------------- reused, or refused


def test_reused_when_nothing_changed(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus(config(text), 16)
    assert isinstance(first.train, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(TextReader, "documents", never)
        patch.setattr(TextReader, "sha256", never)
        assert same(load_corpus(config(text), 16), first)
        # a run that goes on brings its tokenizer
        assert same(load_corpus(config(text), 16, tokenizer=first.tokenizer), first)
    assert sorted(p.name for p in only_folder(cache).iterdir()) == [
        "held_out.bin",
        META,
        "tokenizer.json",
        "train.bin",
    ]


def test_a_touched_file_is_looked_into(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus(config(text), 16)
    os.utime(text, (1, 1))
    monkeypatch.setattr(TextReader, "documents", never)
    assert same(load_corpus(config(text), 16), first)
    monkeypatch.setattr(TextReader, "sha256", never)  # the new time is known from now on
    assert same(load_corpus(config(text), 16), first)


def test_a_changed_file_is_prepared_anew(text: Path, cache: Path) -> None:
    first = load_corpus(config(text), 16)
    kept = np.array(first.train)
    text.write_text("\n".join(LINES[::-1][:100]))
    second = load_corpus(config(text), 16)
    assert second.meta["passages"] == 100
    assert second.meta["sha256"] != first.meta["sha256"]
    assert np.array_equal(first.train, kept)  # what is mapped stays, while it is mapped
    assert only_folder(cache)


def test_every_setting_has_a_place_of_its_own(text: Path, cache: Path) -> None:
    for n, (fields, length) in enumerate(
        [
            ({}, 16),
            ({}, 12),
            ({"rows": "wrap"}, 16),
            ({"held_out": 3}, 16),
            ({"vocab_size": 4, "unknown": "drop"}, 16),
        ],
        1,
    ):
        if "unknown" in fields:
            with pytest.raises(
                ValueError, match=r"nothing is left to train on of 320 passages \(320 dropped"
            ):
                load_corpus(config(text, **fields), length)
        else:
            load_corpus(config(text, **fields), length)
            assert len([p for p in cache.iterdir() if (p / META).exists()]) == n


@pytest.mark.parametrize("damage", ["no meta", "cut short", "no json", "another format", "another tokenizer"])
def test_damaged_rows_are_refused_and_in_the_cache_made_anew(text: Path, cache: Path, damage: str) -> None:
    first = load_corpus(config(text), 16)
    train = np.array(first.train)
    folder = only_folder(cache)
    meta = json.loads((folder / META).read_text())
    if damage == "no meta":
        (folder / META).unlink()
    elif damage == "cut short":
        with (folder / "train.bin").open("r+b") as f:
            f.truncate(100)
    elif damage == "no json":
        (folder / META).write_text('{"format": ')
    elif damage == "another format":
        (folder / META).write_text(json.dumps(meta | {"format": "flowlm-data/0"}))
    else:
        Tokenizer.train_words(["other words"]).save(folder)
    reason = {
        "no meta": rf"holds no {META}: it was never finished",
        "cut short": r"train\.bin has 100 bytes, not the [\d,]+ of 288 rows: it was cut short or replaced",
        "no json": "is damaged",
        "another format": "has format 'flowlm-data/0', this version of flowlm reads 'flowlm-data/2'",
        "another tokenizer": "holds another tokenizer than it was prepared with",
    }[damage]
    with pytest.raises(ValueError, match=reason):
        open_prepared(folder)
    with pytest.raises(ValueError, match="holds no text files" if damage == "no meta" else reason):
        load_corpus(config(folder), 16)
    again = load_corpus(config(text), 16)
    assert np.array_equal(again.train, train)


def test_a_prepared_folder_stands_for_its_text(text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = prepare_corpus(config(text), 16, tmp_path / "out", said.append)
    corpus = load_corpus(config(text), 16)
    text.unlink()
    taken = load_corpus(config(out), 16)
    assert np.array_equal(taken.train, corpus.train)
    assert taken.meta["sha256"] == corpus.meta["sha256"]
    with pytest.raises(
        ValueError, match=r"was prepared otherwise: rows was 'cut', is 'wrap'; length was 16, is 8"
    ):
        load_corpus(config(out, rows="wrap"), 8)
    with pytest.raises(
        ValueError, match=r"was prepared with another tokenizer \(\d+ tokens\) than the model's \(4 tokens\)"
    ):
        load_corpus(config(out), 16, tokenizer=Tokenizer.train_words(["a b"]))


def test_a_folder_of_something_else_is_never_written_over(text: Path, tmp_path: Path) -> None:
    out = prepare_corpus(config(text), 16, tmp_path / "out", print)
    before = content(out)
    assert prepare_corpus(config(text), 16, out, print) == out
    with pytest.raises(
        ValueError, match=r"holds prepared text already, of another kind: length was 16, is 12"
    ):
        prepare_corpus(config(text), 12, out, print)
    text.write_text("\n".join(LINES[:50]))
    with pytest.raises(ValueError, match=r"of another kind: the text was sha256 \w+…, is \w+…"):
        prepare_corpus(config(text), 16, out, print)
    assert content(out) == before
    with pytest.raises(ValueError, match="holds something else than prepared text: give a new folder"):
        prepare_corpus(config(text), 16, tmp_path, print)
    with pytest.raises(ValueError, match="drawn anew in seconds: there is nothing to prepare"):
        prepare_corpus(DataConfig(), 64, None, print)


# ------------------------------------------------------------------------------------------------------- killed

KILLED = """
import os, signal, sys
from flowlm.data import preparation
from flowlm.data.corpora import DataConfig, load_corpus
preparation._CHUNK, preparation._KEEP_EVERY = 16, 0.0
stage, after = sys.argv[2], int(sys.argv[3])
target = {
    "scan": (preparation.Smallest, "add"),
    "encode": (preparation._Side, "_write"),
    "end": (preparation._Preparation, "_put_in_place"),
}[stage]
whole, calls = getattr(*target), 0
def dying(self, *args):
    global calls
    calls += 1
    if calls > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args)
setattr(*target, dying)
load_corpus(DataConfig(corpus="text", path=sys.argv[1], rows="wrap"), 16)
"""


@pytest.mark.parametrize(("stage", "after"), [("scan", 100), ("encode", 3), ("encode", 8), ("end", 0)])
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    text: Path, cache: Path, stage: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(text), stage, str(after)], env=os.environ, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not [p for p in cache.iterdir() if (p / META).exists() and p.suffix != ".partial"]
    said: list[str] = []
    encoded: list[int] = []
    monkeypatch.setattr(
        preparation,
        "_encode",
        lambda tokenizer, texts: encoded.append(len(texts)) or _encode(tokenizer, texts),
    )
    resumed = load_corpus(config(text, rows="wrap"), 16, report=said.append)
    assert any("going on with a preparation that was interrupted" in line for line in said)
    assert (sum(encoded) < len(LINES)) == (stage != "scan")
    assert sum(encoded) > 0 or stage == "end"
    again = cache.with_name("another-cache")
    monkeypatch.setenv("FLOWLM_CACHE", str(again))
    whole = load_corpus(config(text, rows="wrap"), 16)
    assert same(resumed, whole)
    a, b = content(only_folder(cache)), content(only_folder(again))
    assert {k: v for k, v in a.items() if k != META} == {k: v for k, v in b.items() if k != META}


KILLED_WHERE = """
import os, signal, sys
from flowlm import files
from flowlm.data.corpora import DataConfig, load_corpus
path, stage = sys.argv[1:]
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if stage == "first file":
    files.sync = die  # what.json has another name yet
elif stage == "removal":
    whole, os_unlink = os.unlink, []
    def unlink(*args, **options):
        os_unlink.append(args)
        whole(*args, **options) if len(os_unlink) < 3 else die()
    os.unlink = unlink
load_corpus(DataConfig(corpus="text", path=path, rows="wrap"), 16)
"""


@pytest.mark.parametrize("stage", ["first file", "removal"])
def test_no_kill_leaves_what_is_in_the_way(text: Path, cache: Path, stage: str) -> None:
    if stage == "removal":  # of what was begun for another text
        killed = subprocess.run([sys.executable, "-c", KILLED, str(text), "encode", "3"], check=False)
        assert killed.returncode == -signal.SIGKILL
        (work,) = cache.glob("*.partial")
        assert len([*work.iterdir()]) > 4
        text.write_text("\n".join(LINES[:60]))
    killed = subprocess.run([sys.executable, "-c", KILLED_WHERE, str(text), stage], check=False)
    assert killed.returncode == -signal.SIGKILL
    (work,) = cache.glob("*.partial")
    assert [path.name for path in work.iterdir()] != []
    passages = load_corpus(config(text, rows="wrap"), 16).meta["passages"]
    assert passages == (60 if stage == "removal" else len(LINES))


def test_work_outlives_a_disk_that_fails_for_a_while(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(text), "encode", "3"], env=os.environ, check=False)
    (work,) = cache.glob("*.partial")
    before = content(work)
    with monkeypatch.context() as patch:

        def failing(self: TextReader, path: Path) -> Any:
            error = OSError(5, "Input/output error", str(path))
            raise UnreadableError(f"{path} cannot be read ({error.strerror})") from error

        patch.setattr(TextReader, "_open_file", failing)
        with pytest.raises(ValueError, match="Input/output error"):
            load_corpus(config(text, rows="wrap"), 16)
    assert content(work) == before
    said: list[str] = []
    load_corpus(config(text, rows="wrap"), 16, report=said.append)
    assert any("going on with a preparation that was interrupted" in line for line in said)


def test_a_text_that_goes_away_meanwhile(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = preparation._Preparation._encode

    def losing(self: Any, *args: Any) -> Any:
        text.unlink()
        return whole(self, *args)

    monkeypatch.setattr(preparation._Preparation, "_encode", losing)
    with pytest.raises(ValueError, match=r"text\.txt cannot be read \(No such file"):
        load_corpus(config(text), 16)


def test_it_says_how_far_it_is_and_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count()
    monkeypatch.setattr(
        "flowlm.progress.time", SimpleNamespace(perf_counter=lambda: next(now), time=time.time)
    )
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"{line} {i}" for i in range(100) for line in LINES[::5]))
    said: list[str] = []
    load_corpus(config(path), 16, report=said.append)
    kib = path.stat().st_size // 1024
    for what in ("looked at", "read for the tokenizer", "tokenised"):
        lines = [line for line in said if line.startswith(f"KiB {what} ")]
        assert any(re.fullmatch(rf"KiB {what} [\d,]+/{kib:,}  [\d,]+ s left", line) for line in lines), said


def test_a_folder_with_a_meta_json_of_its_own_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, own in (("a.txt", LINES[:90]), ("b.txt", LINES[90:])):
        (folder / name).write_text("\n".join(own))
    (folder / META).write_text('{"title": "My corpus", "format": "plain"}')
    assert load_corpus(config(folder), 16).meta["passages"] == len(LINES)
    with pytest.raises(ValueError, match="holds something else than prepared text: give a new folder"):
        prepare_corpus(config(folder / "a.txt"), 16, folder, print)


def test_places_for_rows(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "notes"
    file.write_text("mine")
    with pytest.raises(ValueError, match="notes is a file: rows are written into a folder"):
        prepare_corpus(config(text), 16, file, print)
    here = tmp_path / "[here]"
    here.mkdir()
    monkeypatch.chdir(here)
    made = prepare_corpus(config(text), 16, Path("."), print)
    assert made == here
    assert (here / META).exists()
    assert not [path for path in tmp_path.iterdir() if ".old-" in path.name]
    long = tmp_path / f"{'字' * 79}.txt"
    long.write_text("\n".join(LINES))
    assert load_corpus(config(long), 16).meta["passages"] == len(LINES)


def test_what_is_only_read_is_used_all_the_same(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus(config(text), 16)
    os.utime(text, (1, 1))

    def refused(*args: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("flowlm.files.write_json", refused)
    monkeypatch.setattr(preparation, "_encode", never)
    assert np.array_equal(load_corpus(config(text), 16).train, first.train)


def test_what_was_begun_for_another_text_is_not_gone_on_with(text: Path, cache: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(text), "encode", "3"], env=os.environ, check=False)
    text.write_text("\n".join(LINES[:60]))
    said: list[str] = []
    assert load_corpus(config(text, rows="wrap"), 16, report=said.append).meta["passages"] == 60
    assert not any("interrupted" in line for line in said)


SLOW = """
import sys
from flowlm.data import preparation
from flowlm.data.corpora import DataConfig, load_corpus
whole = preparation._encode
def slow(tokenizer, texts):
    print("encoding", flush=True)
    sys.stdin.readline()
    return whole(tokenizer, texts)
preparation._encode = slow
corpus = load_corpus(DataConfig(corpus="text", path=sys.argv[1]), 16, report=lambda line: print(line, flush=True))
print(len(corpus.train))
"""


def test_two_processes_at_once(text: Path, cache: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SLOW, str(text)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )

    first = start()
    assert first.stdout is not None
    assert first.stdout.readline() == "encoding\n"
    second = start()
    assert second.stdout is not None
    assert "another process is preparing" in second.stdout.readline()  # and waits, until the first goes on
    outs = [process.communicate("go on\n", timeout=60)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert all(out.endswith("288\n") for out in outs)
    assert "encoding" not in outs[1]
    assert only_folder(cache)


def test_a_full_disk_leaves_nothing_in_place(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, rows: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparation._Side, "_write", full)
        with pytest.raises(
            OSError, match=r"cannot write .*: No space left on device; nothing was written \(free some"
        ):
            load_corpus(config(text), 16)
    assert not [p for p in cache.iterdir() if (p / META).exists()]
    assert len(load_corpus(config(text), 16).train) == 288


# ---------------------------------------------------------------------------------------------- what is counted


def test_records_are_held_out_whole_and_copies_across_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [[f"document {i} begins", "all documents say this", f"document {i} ends"] for i in range(60)]
    path.write_text("".join(json.dumps({"text": "\n".join(r)}) + "\n" for r in [*records, *records[:20]]))
    said: list[str] = []
    corpus = load_corpus(config(path, held_out=18), 8, report=said.append)
    decode = corpus.tokenizer.decode
    train, held_out = ([decode(row) for row in side] for side in (corpus.train, corpus.held_out))
    sides = {i: {f"document {i} begins" in side for side in (train, held_out)} for i in range(60)}
    assert all(len(where) == 2 for where in sides.values())  # on one side, with its copy
    assert Counter(train + held_out) == Counter(line for r in [*records, *records[:20]] for line in r)
    own = held_out.count("all documents say this")
    assert corpus.meta["held_out_in_train"] == own == len(held_out) // 3
    assert any(f"{own} of the held-out ones are also training passages" in line for line in said)
    assert corpus.meta["documents"] == 80
    assert corpus.meta["duplicates"] == 240 - 121


def test_dropped_passages_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = ["a b c"] + [f"a b c{'' if i % 3 else ' rare' + str(i)}{' a b c' * (i % 2)}" for i in range(40)]
    short = [" ".join(words) for words in itertools.product("abc", repeat=4)]
    path.write_text("\n".join([*dict.fromkeys(lines), *short]))
    said: list[str] = []
    corpus = load_corpus(config(path, vocab_size=3, unknown="drop", rows="drop"), 6, report=said.append)
    assert corpus.tokenizer.vocab_size == 6
    assert not (np.concatenate([corpus.train, corpus.held_out]) == corpus.tokenizer.unk_id).any()
    assert corpus.meta["dropped_unknown"] == 14
    assert corpus.meta["dropped_long"] == 1
    assert any("the 14 passages that have any are left out" in line for line in said)
    assert any("longer than 5 tokens and [EOS]: left out" in line for line in said)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=200), st.integers(1, 9)
)
def test_the_smallest_hashes_are_those_of_a_full_sort(seen: list[tuple[int, int]], limit: int) -> None:
    smallest = Smallest(limit)
    full: Counter[int] = Counter()
    for digest, passages in seen:
        smallest.add(digest, passages)
        full[digest] += passages
    first = sorted(full)[:limit]
    assert {d: smallest.counts[d] for d in sorted(smallest.counts)[:limit]} == {d: full[d] for d in first}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 63), st.booleans()), min_size=1, max_size=50))
def test_copies_are_counted_exactly(
    tmp_path_factory: pytest.TempPathFactory, passages: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    hashes = [value % 7 << 60 | value % 3 for value, _ in passages]
    np.array(hashes, np.uint64).tofile(folder / "hashes.bin")
    np.array([held for _, held in passages], np.uint8).tofile(folder / "sides.bin")
    assert count_distinct(folder / "hashes.bin") == len(set(hashes))
    held = [h for h, (_, is_held) in zip(hashes, passages) if is_held]
    train = {h for h, (_, is_held) in zip(hashes, passages) if not is_held}
    assert count_across(folder / "hashes.bin", folder / "sides.bin") == sum(h in train for h in held)


# ------------------------------------------------------------------------------------------------ very long lines


@pytest.mark.parametrize("kind", ["words", "bpe"])
@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.text(st.sampled_from("ab'-.漢"), min_size=1, max_size=6), min_size=4, max_size=30),
    data=st.data(),
)
def test_parts_of_a_long_passage_have_the_ids_of_the_whole(
    kind: str, words: list[str], data: st.DataObject
) -> None:
    some = ["a b ab ba a'b a-b . .. 漢 a漢 b"]
    tokenizer = TOKENIZERS.setdefault(
        kind,
        Tokenizer.train_words([*some, "c"], max_vocab=9)
        if kind == "words"
        else Tokenizer.train_bpe(some, vocab_size=280),
    )
    text = words[0]
    for word in words[
        1:
    ]:  # single spaces and ends of lines, now and then more of them, which are no place to cut
        text += data.draw(st.sampled_from([" ", " ", " ", "\n", "  ", " \t"])) + word
    before, preparation._LONG = preparation._LONG, 24
    try:
        parts = list(preparation._parts(text))
        ids = [*_encode(tokenizer, [text, "a b"])]
    finally:
        preparation._LONG = before
    assert "".join(parts) == text
    assert all(0 < len(part) <= 24 for part in parts)
    forced = any(not part.startswith((" ", "\n")) or part[1:2].isspace() for part in parts[1:])
    event(f"{min(len(parts), 3)} parts, {'cut anywhere' if forced else 'cut at spaces'}")
    if not forced:
        assert ids == tokenizer.encode([text, "a b"])


TOKENIZERS: dict[str, Tokenizer] = {}


@pytest.mark.parametrize("rows", ["cut", "split", "wrap"])
def test_a_line_of_many_megabytes(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "long.txt"
    path.write_text("short one\nshort two\n" + "some words again and " * 150_000 + "\nshort three\n" * 20)
    start = time.monotonic()
    corpus = load_corpus(config(path, rows=rows), 64)
    assert corpus.meta["max_tokens"] == 600_000
    assert corpus.meta["tokens"] + corpus.meta["held_out_tokens"] > (600_000 if rows != "cut" else 63)
    assert time.monotonic() - start < 120


def test_text_without_spaces(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    signs = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 200_000)))
    path.write_text(f"short one\nshort two\n{signs}", encoding="utf-8")
    corpus = load_corpus(config(path, rows="split", tokenizer="bpe", vocab_size=300), 64)
    assert corpus.meta["max_tokens"] > 200_000
    rows = [row for side in (corpus.train, corpus.held_out) for row in side]
    ids = [int(i) for row in rows for i in row if i not in (corpus.tokenizer.eos_id, corpus.tokenizer.pad_id)]
    assert signs in corpus.tokenizer.decode(ids)  # nothing is lost


# --------------------------------------------------------------------------- what was found by trying to break it


def test_an_old_run_s_tokenizer_is_never_taken_for_the_recipe_s(text: Path, cache: Path) -> None:
    old = load_corpus(config(text), 16).tokenizer
    for lines in (
        [line for line in LINES if "cat" not in line],  # words that the old tokenizer knows
        [f"{line} zebra" for line in LINES],  # and one that it does not
    ):
        text.write_text("\n".join(lines))
        if "zebra" in lines[0]:
            with pytest.raises(ValueError, match="'zebra'"):
                load_corpus(config(text), 16, tokenizer=old)
        else:
            assert load_corpus(config(text), 16, tokenizer=old).tokenizer.sha256 == old.sha256
        said: list[str] = []
        fresh = load_corpus(config(text), 16, report=said.append)
        assert fresh.tokenizer.sha256 != old.sha256
        words = {word.rstrip(".") for line in lines for word in line.split()}
        assert {fresh.tokenizer.token(i) for i in range(fresh.tokenizer.vocab_size)} >= words
        assert not any("interrupted" in line for line in said)
    assert not list(cache.glob("*.partial"))


def test_a_text_that_changes_while_it_is_read(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = preparation._Preparation._tokenizer

    def growing(self: Any) -> Tokenizer:
        with text.open("a") as f:
            f.write("\none more line\nand another one")
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(preparation._Preparation, "_tokenizer", growing)
        with pytest.raises(ValueError, match=r"text\.txt' changed while it was read: run again"):
            load_corpus(config(text), 16)
    assert not list(cache.glob("*.partial"))
    assert load_corpus(config(text), 16).meta["passages"] == len(LINES) + 2


def test_nothing_of_other_people_is_removed(text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"out\.partial is in the way, and was not made here: move it"):
        prepare_corpus(config(text), 16, tmp_path / "out", print)
    assert (partial / "thesis.txt").read_text() == "years of work"
    folder = tmp_path / "somebody's"
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"tokens of another program")
    with pytest.raises(ValueError, match=r"holds no text files \(1 \.bin\)"):
        load_corpus(config(folder), 16)


def test_what_bad_input_leaves(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    monkeypatch.setattr(TextReader, "sha256", never)  # told at once, before gigabytes are hashed
    for _ in range(2):
        said: list[str] = []
        with pytest.raises(ValueError, match="has no field 'text'"):
            load_corpus(config(path), 16, report=said.append)
        assert said == []
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_rows_from_elsewhere_are_checked(text: Path, tmp_path: Path) -> None:
    out = prepare_corpus(config(text), 16, tmp_path / "out", print)
    size = (out / "train.bin").stat().st_size
    (out / "train.bin").write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=r"train\.bin is not what was written \(its sha256 differs\)"):
        load_corpus(config(out), 16)
    (out / META).write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(ValueError, match=r"meta\.json is damaged \(no tokenizer_sha256, length"):
        load_corpus(config(out), 16)


def test_two_places_for_the_cache(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    corpus = load_corpus(config(text), 16)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # what is there can be read where nothing can be written
        patch.setattr(Path, "mkdir", refuse)
        patch.setattr("filelock.FileLock.acquire", refuse)
        assert same(load_corpus(config(text), 16), corpus)
        with pytest.raises(
            OSError, match=r"cannot write .*Permission denied.* with the variable FLOWLM_CACHE"
        ):
            load_corpus(config(text), 12)
    monkeypatch.delenv("FLOWLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match=r"there is no home folder .*: set the variable FLOWLM_CACHE"):
        load_corpus(config(text), 16)


def test_the_recipe_names_every_choice_that_decides_the_rows() -> None:
    left_out = {
        "corpus",
        "path",
        "eos",
        "pad",
        "num",
        "seed",
    }  # the text itself, the tokenizer's sha256, the grammar's
    fields = {f.name for f in dataclasses.fields(DataConfig)} - left_out
    assert fields | {"length"} == {f.name for f in dataclasses.fields(Recipe)}


def test_a_long_passage_is_cut_only_where_its_tokenizer_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers of other makes may join an end of line with the sign before it, or know words with a space within."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(preparation, "_LONG", 24)
    texts = ["one two.\nthree four.\nNew York five.\n" * 8]

    def trained(joins: bool, added: list[str]) -> Tokenizer:
        pre, model = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        if joins:
            splitter = pre.Split(tokenizers.Regex(r" ?\w+|[^\s\w]+\n*|\s+"), "isolated")
            model.pre_tokenizer = pre.Sequence([splitter, pre.ByteLevel(False, use_regex=False)])
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = sorted(pre.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["[EOS]", "[PAD]"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        model.add_tokens(added)
        return Tokenizer(model)

    for joins, added, cuts in ((False, [], True), (True, [], False), (False, ["New York"], False)):
        tokenizer = trained(joins, added)
        assert tokenizer.cuts_at_spaces is cuts
        whole = tokenizer.encode(texts)
        assert [*_encode(tokenizer, texts)] == whole
        if not cuts:  # and cut there all the same it would have others
            parts = preparation._parts(texts[0])
            assert [i for ids in tokenizer.encode(list(parts)) for i in ids] != whole[0]


# ------------------------------------------------------------------------------------ what is told before the work


def test_a_place_where_no_file_can_be_made(text: Path) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc, in which no file can be made")
    with pytest.raises(OSError, match=r"cannot write /proc/flowlm: .*; nothing was written"):
        prepare_corpus(config(text), 16, Path("/proc/flowlm"), never)


def test_halves_of_killed_writes_go(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = preparation._Preparation._put_in_place

    def after_a_kill(self: Any) -> None:
        for name in ("state.json", "meta.json", "tokenizer.json"):
            (self.work / f".{name}.1.ab.tmp").write_text("{")
        put(self)

    monkeypatch.setattr(preparation._Preparation, "_put_in_place", after_a_kill)
    folder = prepare_corpus(config(text), 16, tmp_path / "out", lambda line: None)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_out_beside_prepared_rows(text: Path, tmp_path: Path) -> None:
    folder = prepare_corpus(config(text), 16, tmp_path / "out", lambda line: None)
    with pytest.raises(ValueError, match=r"is prepared already, and nothing would be written to --out"):
        prepare_corpus(config(folder), 16, tmp_path / "other", never)
    assert not (tmp_path / "other").exists()


def test_the_settings_that_are_advised_are_right(text: Path, tmp_path: Path) -> None:
    """Of pieces that were trained on the text the recipe's word is needed, of a given tokenizer its file."""
    pieces = config(text, tokenizer="bpe", vocab_size=300)
    folder = prepare_corpus(pieces, 16, tmp_path / "out", lambda line: None)
    with pytest.raises(ValueError, match=r"its tokenizer is --data.tokenizer bpe\)"):
        load_corpus(config(folder), 16)
    found = load_corpus(dataclasses.replace(pieces, path=str(folder)), 16)
    assert np.array_equal(found.train, load_corpus(pieces, 16).train)
    given = folder / "tokenizer.json"
    again = prepare_corpus(config(text, tokenizer=str(given)), 16, tmp_path / "again", lambda line: None)
    with pytest.raises(ValueError, match=rf"its tokenizer is --data.tokenizer {again / 'tokenizer.json'}\)"):
        load_corpus(config(again), 16)
    load_corpus(config(again, tokenizer=str(again / "tokenizer.json")), 16)


def test_an_unknown_begin_token_before_anything_is_read(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_corpus(config(text, tokenizer="bpe", vocab_size=300), 16, None, lambda line: None)
    monkeypatch.setattr(TextReader, "documents", never)
    with pytest.raises(ValueError, match=r"data.bos = '\[XX\]': the tokenizer has no token '\[XX\]'"):
        load_corpus(config(text, tokenizer=str(folder / "tokenizer.json"), bos="[XX]"), 16)


def test_a_change_of_the_entry_alone_costs_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose rights change while it is read, or that is copied back, holds the same text."""
    encode = preparation._Preparation._encode

    def touched(self: Any, *args: Any) -> Any:
        copy = text.read_bytes()
        text.unlink()
        text.write_bytes(copy)
        text.chmod(0o600)
        return encode(self, *args)

    monkeypatch.setattr(preparation._Preparation, "_encode", touched)

    before = TextReader(text).fingerprint()
    folder = prepare_corpus(config(text), 16, tmp_path / "out", lambda line: None)
    assert TextReader(text).fingerprint() != before
    assert open_prepared(folder).meta["files"] == before
