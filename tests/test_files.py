"""Files are written whole or not at all, and a failure says what, why and the fix."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from flowlm import files


def test_missing_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    files.write_data(path, "größer")
    assert path.read_bytes() == "größer".encode()
    files.write_data(path, iter([b"one", b"two"]))
    assert path.read_bytes() == b"onetwo"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stage", ["write", "sync", "replace"])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "choose another folder with --out or change its permissions"),
        (errno.EROFS, "choose another folder with --out"),
    ],
)
def test_a_failure_leaves_what_was_there(
    stage: str, there: bool, number: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    if there:
        path.write_text("before")

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent  # a rename within one file system
        temporary.write_text("half")
        if stage == "write":
            fail()

    if stage == "sync":
        monkeypatch.setattr(files, "sync", fail)
    if stage == "replace":
        monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="cannot write") as caught:
        files.write_atomically(path, write)
    state = "what was there is untouched" if there else "nothing was written"
    assert caught.value.strerror == f"cannot write {path}: {os.strerror(number)}; {state} ({fix})"
    assert caught.value.errno == number
    assert isinstance(caught.value, PermissionError) == (number == errno.EACCES)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"] * there


def test_other_errors_leave_nothing_behind(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "file.txt", write)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*/a/file\.txt: .*a (file|part)"):
        files.write_data(tmp_path / "a" / "file.txt", "x")


def test_what_is_in_the_way_is_found_before_anything_is_moved(tmp_path: Path) -> None:
    (tmp_path / "b.json").mkdir()
    for name in ("last.json", "gone.json"):
        (tmp_path / name).write_text("old")

    def replace() -> None:
        with files.together(tmp_path, "last.json", ("gone.json",)) as staged:
            for name in ("a.json", "b.json", "last.json"):
                (staged / name).write_text("new")

    with pytest.raises(IsADirectoryError, match="what was there is untouched"):
        replace()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "gone.json", "last.json"]
    assert (tmp_path / "last.json").read_text() == "old"


def test_what_an_error_says() -> None:
    assert files.first_line(ValueError("\none\ntwo")) == "one"
    assert files.first_line(ValueError()) == "ValueError"


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"é": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"é": [1, 2.5, None]}


@pytest.mark.parametrize("links", [True, False])
def test_link_or_copy(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = tmp_path / "source", tmp_path / "path"
    source.write_text("new")
    path.write_text("old")
    if not links:

        def fail(*args: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(files.os, "link", fail)
    files.link_or_copy(source, path)
    assert path.read_text() == "new"
    assert path.samefile(source) == links
    source.unlink()  # pruning a checkpoint does not take the export with it
    assert path.read_text() == "new"
