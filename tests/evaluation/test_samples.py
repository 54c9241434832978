"""Samples files: what is written is read, half a file is never left, and errors name the line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowlm import files
from flowlm.evaluation import samples
from flowlm.evaluation.samples import (
    FORMAT,
    Header,
    Record,
    current_commit,
    read_samples,
    write_samples,
)
from flowlm.files import write_data

HEADER = Header(
    model="fmlm",
    recipe="story",
    nfe=2,
    sampler={"gamma": 0.5, "prior_scale": 1.0, "temperature": 1.0, "last": "argmax"},
    seed=7,
    dtype="float32",
    commit="abc1234",
    tokenizer="f" * 64,
    seconds=1.25,
    extra={"length": 64},
)
RECORDS = [
    Record(0, "Anna was kind.", [3, 1, 4], 2, 7),
    Record(1, "„Füchse“ \u2028 line\nfeed \U0001f98a", [], 2, 7),
]


def lines(*objects: Any) -> str:
    return "".join(json.dumps(item) + "\n" for item in objects)


def own(**changes: Any) -> dict[str, Any]:
    """The header as a dict, with changes; a value of ... takes the key out."""
    values = json.loads(json.dumps(HEADER.__dict__)) | changes
    return {key: value for key, value in values.items() if value is not ...}


def record(**changes: Any) -> dict[str, Any]:
    values = {"id": 0, "text": "a", "tokens": [1], "nfe": 1, "seed": 0} | changes
    return {key: value for key, value in values.items() if value is not ...}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples.jsonl"
    write_samples(path, HEADER, iter(RECORDS))
    assert read_samples(path) == (HEADER, RECORDS)
    assert [p.name for p in path.parent.iterdir()] == ["samples.jsonl"]
    raw = path.read_text(encoding="utf-8")
    assert raw.count("\n") == 3
    assert json.loads(raw.split("\n")[0])["format"] == FORMAT == "flowlm-samples/1"
    assert "Füchse" in raw  # readable by people, not escaped


def test_lone_surrogate_survives(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    write_samples(path, HEADER, [Record(0, "bad \ud800 byte", [1], 1, 0)])
    assert read_samples(path)[1][0].text == "bad \ud800 byte"


def test_array_elements_are_tokens(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = tmp_path / "s.jsonl"
    write_samples(path, HEADER, [Record(0, "a", list(np.array([5, 6])), 1, 0)])
    assert read_samples(path)[1][0].tokens == [5, 6]


def test_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text(
        '\ufeff{"text": "one"}\r\n\n{"text": "two", "score": 3.5, "tokens": [1, 2]}\n', encoding="utf-8"
    )
    header, records = read_samples(path)
    assert header == Header()
    assert (header.model, header.nfe, header.seed, header.seconds) == ("unknown", None, None, None)
    assert records == [Record(0, "one", [], None, None), Record(1, "two", [1, 2], None, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: a samples file has a header line"),
        ("\n\n", "is empty"),
        ("hello\n", "line 1: not JSON"),
        ("[1]\n", r"line 1: expected a JSON object, got '\[1\]'"),
        (lines(own(format="flowlm-samples/9")), "line 1: format 'flowlm-samples/9'; this version reads"),
        (lines(own(format=...)), "line 1: the header lacks 'format'"),
        (lines(own(nfe=..., dtype=...)), "line 1: the header lacks 'nfe', 'dtype'"),
        (lines(own(steps=3)), "line 1: the header has unknown 'steps'; it has format, model"),
        (lines(own(sampler=[])), "line 1: 'sampler' must be an object"),
        (lines(own(nfe=True)), "line 1: 'nfe' must be an integer or null, got 'True'"),
        (lines(own(), record(), record(id=1, text=...)), "line 3: the sample lacks 'text'"),
        (lines(own(), record(seed=..., nfe=...)), "line 2: the sample lacks 'nfe', 'seed'"),
        (lines(own(), record(score=1)), "line 2: the sample has unknown 'score'"),
        (lines(own(), record(tokens=[1, "b"])), "line 2: 'tokens' must be a list of integers"),
        (lines(own(), record(tokens=[True])), "line 2: 'tokens' must be a list of integers"),
        (lines(own(), record(id="x")), "line 2: 'id' must be an integer, got 'x'"),
        (lines(own(), record(), record()), "line 3: id 0 stands in line 2 already"),
        (lines(own(), record()) + '{"id": 1, "te', "line 3: not JSON"),
        (lines({"text": "a"}, {"txt": "b"}), "line 2: the sample lacks 'text'"),
        (lines({"text": 3}), "line 1: 'text' must be a string, got '3'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_samples(path)
    assert str(path) in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_samples(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "none.jsonl")


def test_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with pytest.raises(ValueError, match="two records have the id 0"):
        write_samples(path, HEADER, [RECORDS[0], RECORDS[0]])
    with pytest.raises(ValueError, match="this version writes"):
        write_samples(path, Header(format="flowlm-samples/2"), RECORDS)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_samples(path, Header(seconds=float("nan")), RECORDS)
    assert list(tmp_path.iterdir()) == []


class _FullDisk:
    """A file whose second write fails, as on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.writes = 0

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.writes += 1
        if self.writes > 1:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str) -> _FullDisk:
        return _FullDisk(path.open(mode))

    monkeypatch.setattr(files, "open", full, raising=False)


def _no_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)


def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)


def _read_only_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # permissions do not bind an administrator, so they are played
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "open", refuse, raising=False)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("sabotage", "kind", "reason"),
    [
        (_full_disk, OSError, "No space left on device"),
        (_no_replace, PermissionError, "Permission denied"),
        (_no_sync, OSError, "Input/output error"),
        (_read_only_folder, PermissionError, "Permission denied"),
    ],
)
def test_failure_leaves_no_half_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Any,
    kind: type[OSError],
    reason: str,
    existing: bool,
) -> None:
    path = tmp_path / "s.jsonl"
    if existing:
        path.write_text("old")
    with monkeypatch.context() as patch:
        sabotage(patch)
        with pytest.raises(kind, match=f"cannot write .*s.jsonl: {reason}") as caught:
            write_samples(path, HEADER, RECORDS)
    assert ("untouched" if existing else "nothing was written") in str(caught.value)
    assert caught.value.errno in (errno.ENOSPC, errno.EACCES, errno.EIO)
    assert [p.name for p in tmp_path.iterdir()] == (["s.jsonl"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_failing_source_of_records_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Record]:
        yield RECORDS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / "s.jsonl", HEADER, broken())
    assert list(tmp_path.iterdir()) == []


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(OSError, match="cannot write"):
        write_data(tmp_path / "s", "text")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write"):
        write_data(tmp_path / "file" / "s", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "s"]
    assert list((tmp_path / "s").iterdir()) == []


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("permissions are POSIX here")
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_data(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def _play_git(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str | Exception]) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        assert not any(name.startswith("GIT_") for name in options["env"])
        answer = next(answers[word] for word in command if word in answers)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    return calls


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    current_commit.cache_clear()
    yield
    current_commit.cache_clear()


def test_a_commit_is_that_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, str | Exception] = {
        "ls-files": "__init__.py\n",
        "rev-parse": "abc1234\n",
        "status": "",
    }
    _play_git(monkeypatch, answers)
    assert current_commit() == "abc1234"
    answers["rev-parse"] = "def5678\n"  # committed while a comparison goes on
    assert current_commit() == "abc1234"


@pytest.mark.parametrize(
    ("status", "expected"), [("", "abc1234"), (" M src/flowlm/path.py\n", "abc1234+dirty")]
)
def test_commit_of_a_checkout(monkeypatch: pytest.MonkeyPatch, status: str, expected: str) -> None:
    answers: dict[str, str | Exception] = {
        "ls-files": "__init__.py\n",
        "rev-parse": "abc1234\n",
        "status": status,
    }
    calls = _play_git(monkeypatch, answers)
    assert current_commit() == expected
    assert all(command[command.index("-C") + 1].endswith("flowlm") for command in calls)


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError("git"),
        PermissionError("git"),
        subprocess.CalledProcessError(128, "git"),
        subprocess.TimeoutExpired("git", 10),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_commit_without_a_checkout(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    _play_git(monkeypatch, {"ls-files": failure})
    monkeypatch.setattr(samples.metadata, "version", lambda name: f"1.2.3 of {name}")
    assert current_commit() == "1.2.3 of flowlm"

    def missing(name: str) -> str:
        raise samples.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(samples.metadata, "version", missing)
    current_commit.cache_clear()
    assert current_commit() == "unknown"


def test_commit_here_is_something() -> None:
    assert current_commit().strip()
