"""Text from files of every kind: the same passages however they are packed; errors name file, line and fix."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlm.data.readers import TextReader
from flowlm.data.remote import UnreadableError

LINES = ["The cat sat.", "A “dog” barked, twice.", "naïve 漢字 text"]
TEXT = "\n".join(LINES) + "\n"


def passages(path: Path, **options: Any) -> list[str]:
    return [p for document in TextReader(path, **options).documents() for p in document]


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/text.txt", data)
    return out.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "text.txt": lambda data: data,
    "text.without-known-suffix": lambda data: data,
    "text.txt.gz": gzip.compress,
    "text.txt.xz": lzma.compress,
    "text.txt.bz2": bz2.compress,
    "text.zip": zipped,
}


def records(kind: str, texts: list[str]) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="," if kind == "csv" else "\t")
    writer.writerows([["n", "text"], *enumerate(texts)])
    return out.getvalue().encode()


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", PACKED)
def test_plain_text_however_it_is_packed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PACKED[name](TEXT.encode()))
    reader = TextReader(path)
    assert [p for d in reader.documents() for p in d] == LINES
    assert reader.done == reader.bytes == path.stat().st_size
    assert reader.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not reader.has_records


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zip"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_records(tmp_path: Path, kind: str, packed: str) -> None:
    texts = ["one, two", 'a "quoted"\nline', "x" * 200_000]  # csv's own limit is 131,072
    data = records(kind, texts)
    name = f"a.{kind}{packed}"
    if packed == ".zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"inside.{kind}", data)
    else:
        pack = {"": lambda d: d, ".gz": gzip.compress, ".xz": lzma.compress}[packed]
        (tmp_path / name).write_bytes(pack(data))
    reader = TextReader(tmp_path / name, unit="document")
    assert [*reader.documents()] == [[t] for t in texts]
    assert reader.has_records
    by_line = [*TextReader(tmp_path / name, unit="line").documents()]
    assert by_line == [["one, two"], ['a "quoted"', "line"], ["x" * 200_000]]
    assert csv.field_size_limit() == 131_072


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with flowlm[data]")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    table = arrow.table({"n": list(range(3000)), "body": [f"text {i}" for i in range(2999)] + [None]})
    parquet.write_table(table, path, row_group_size=700)
    reader = TextReader(path, field="body")
    assert [p for d in reader.documents() for p in d] == [f"text {i}" for i in range(2999)]
    assert reader.done == reader.bytes
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(path, "in.parquet")
    assert len(passages(tmp_path / "b.zip", field="body")) == 2999
    with pytest.raises(
        ValueError, match=r"a\.parquet has no field 'text': set data\.field to one of 'n', 'body'"
    ):
        passages(path)
    with pytest.raises(ValueError, match="the column 'n' holds int64, not text"):
        passages(path, field="n")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"is damaged or no Parquet file .* fetch it again"):
        passages(path, field="body")


def test_what_is_null_is_no_text(tmp_path: Path) -> None:
    """In every format of records."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2,\n3,two\n")
    for name in ("a.jsonl", "a.csv"):
        assert passages(tmp_path / name) == ["one", "two"]


def test_a_column_of_categories_is_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with flowlm[data]")
    import pyarrow.parquet as parquet

    column = arrow.array(["one", "two", "one", None]).dictionary_encode()
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    assert passages(tmp_path / "a.parquet") == ["one", "two", "one"]


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"Parquet is read by pyarrow: pip install 'flowlm\[data\]'"):
        passages(tmp_path / "a.parquet")


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("third\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first\n"))
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "LICENSE").write_text("no text of ours")
    (tmp_path / ".hidden.txt").write_text("never read")
    reader = TextReader(tmp_path)
    assert [*reader.documents()] == [["first"], ["third"], ["second"]]  # a.txt.gz, b/one.txt, b.jsonl
    assert reader.skipped == {"": 1, ".png": 1}
    assert reader.kinds == {".gz": 1, ".txt": 1, ".jsonl": 1}
    assert [name for name, *_ in reader.fingerprint()] == ["a.txt.gz", "b/one.txt", "b.jsonl"]
    before = reader.sha256()
    (tmp_path / "b" / "one.txt").rename(tmp_path / "b" / "two.txt")
    assert TextReader(tmp_path).sha256() != before


def test_units(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n \t\r\n\r\nthree\rfour\n\n".encode())
    assert passages(path) == ["one", "two", "three", "four"]
    assert passages(path, unit="paragraph") == ["one\ntwo", "three\nfour"]
    assert passages(path, unit="document") == ["one\ntwo\n \t\n\nthree\nfour"]
    assert all(len(document) == 1 for document in TextReader(path, unit="paragraph").documents())
    record = tmp_path / "a.jsonl"
    record.write_text(json.dumps({"text": "one\r\ntwo\n\nthree"}))
    assert [*TextReader(record, unit="paragraph").documents()] == [["one\ntwo", "three"]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=20), max_size=20
    )
)
def test_every_line_comes_back(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    cleaned = [line.replace("\ufeff", " ").strip() for line in lines]
    assert passages(path) == [line for line in cleaned if line]


def test_control_characters_become_spaces_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\x00b\x0cc\td\x1b[0m\x7f\n\x01\x02\nend\n")
    reader = TextReader(path)
    assert [*reader.documents()] == [["a b c\td [0m"], ["end"]]
    assert reader.control_characters == 6


def test_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("café\nnaïve\n".encode("latin-1"))
    assert passages(path, encoding="latin-1") == ["café", "naïve"]
    path.write_bytes("café\nnaïve\n".encode("utf-16"))
    assert passages(path, encoding="utf-16") == ["café", "naïve"]
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: it is UTF-16: set data\.encoding = 'utf-16'"):
        passages(path)
    with pytest.raises(ValueError, match=r"data\.encoding = 'utf-9' is not known to Python: use utf-8"):
        TextReader(path, encoding="utf-9")


# ---------------------------------------------------------------------------------------------- what is refused


def test_one_wrong_byte_among_many_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good\n" * 10_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"good\n" * 5_000 + b"bad \xe9\n" + b"good\n" * 5_000))
    with pytest.raises(
        ValueError, match=r"b\.txt\.gz is not UTF-8: byte 0xe9 at offset 25004, line 5001; convert it"
    ):
        passages(tmp_path)


@pytest.mark.parametrize("name", ["text.txt.gz", "text.txt.xz", "text.txt.bz2", "text.zip"])
@pytest.mark.parametrize("damage", ["cut short", "garbage inside", "something else"])
def test_corrupt_archives(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    whole = PACKED[name]("".join(f"line {i * 7919 % 10007}\n" for i in range(20_000)).encode())
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut short": whole[:middle],
            "garbage inside": whole[:middle] + b"\x00\xff" * 40 + whole[middle + 80 :],
            "something else": b"this is no archive at all, whatever it is called",
        }[damage]
    )
    with pytest.raises(
        ValueError, match=r"text\S* is (damaged|damaged or cut short|damaged or no zip archive) ?.*: fetch"
    ):
        passages(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "a.jsonl",
            '{"body": "x"}\n',
            r"a\.jsonl, line 1 has no field 'text': set data\.field to one of 'body'",
        ),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": ',
            r"a\.jsonl, line 2 is not JSON \(.*\): one JSON object a line",
        ),
        ("a.jsonl", "[1]\n", r"line 1 holds list, not an object with fields"),
        (
            "a.jsonl",
            '{"text": 3}\n',
            r"line 1: the field 'text' holds int, not text: set data\.field to another",
        ),
        (
            "a.jsonl",
            '{"text": "x"}\n{"txt": "y"}\n',
            r"line 2 has no field 'text', which the 1 records before it have: mend the line, or remove it",
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"holds int, not text: mend the line, or remove it"),
        ("a.csv", "n,body\n1,x\n", r"a\.csv has no field 'text': set data\.field to one of 'n', 'body'"),
        (
            "a.csv",
            "n,text\n1,x,y\n",
            r"a\.csv, line 2 has 3 columns, its header 2: quote texts that hold commas",
        ),
        ("a.tsv", "n\ttext\n1\n", r"a\.tsv, line 2 has 1 columns, its header 2: quote texts that hold tabs"),
        ("a.csv", 'n,text\n1,"x" y\n', r"a\.csv, line 2 is not CSV \(.*\): check its quotes"),
        ("a.parquet.gz", "", r"Parquet is packed by itself, and is not read through \.gz: unpack it"),
    ],
)
def test_bad_records(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        passages(tmp_path / name)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        TextReader("")
    with pytest.raises(
        ValueError, match=r"none' does not exist \(seen from .*\): say with --data\.path where it is"
    ):
        TextReader(tmp_path / "none")
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "LICENSE").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds no text files \(1 without a suffix, 1 \.png\): known are \.txt, \.jsonl"
    ):
        TextReader(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.json", "a.html", "a.pdf"])
def test_what_is_no_plain_text_is_not_read_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"whatever") if name.endswith("gz") else b"whatever")
    with pytest.raises(
        ValueError, match=r"is no plain text \(\.\w+\): unpack or convert it; known are \.txt"
    ):
        TextReader(tmp_path / name)


@pytest.mark.parametrize("name", ["paper.pdf.txt", "page.html.txt.gz", "J.R.R. by.doc.txt", "a.json.jsonl"])
def test_what_was_converted_is_text(tmp_path: Path, name: str) -> None:
    content = TEXT.encode() if "jsonl" not in name else b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert passages(tmp_path / name) == passages(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark(tmp_path: Path, encoding: str) -> None:
    """It decodes as UTF-8, to a zero beside every letter."""
    path = tmp_path / "a.txt"
    path.write_bytes("hello world\nand more\n".encode(encoding))
    with pytest.raises(
        ValueError, match=r"a\.txt is not UTF-8: 21 of its first 42 bytes are zero; .*'utf-16-le'"
    ):
        passages(path)
    reader = TextReader(path, encoding=encoding)
    assert [*reader.documents()] == [["hello world"], ["and more"]]


def test_an_archive_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list of members is read each time, and may be long."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(20):
            archive.writestr(f"{i:02}.txt.gz" if i % 2 else f"{i:02}.txt", packed(f"text {i}", i % 2))
    reader = TextReader(tmp_path / "a.zip")
    opened: list[Any] = []
    whole = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or whole(*args))
    assert [*reader.documents()] == [[f"text {i}"] for i in range(20)]
    assert len(opened) == 1


def packed(text: str, gz: bool | int) -> bytes:
    return gzip.compress(text.encode()) if gz else text.encode()


def test_a_file_that_goes_away_while_it_is_read(tmp_path: Path) -> None:
    """What is open is read to its end."""
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    reader = TextReader(path)
    documents = reader.documents()
    first = next(documents)
    path.unlink()
    assert [first, *documents] == [[line] for line in LINES]
    assert reader.done == reader.bytes


def test_records_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
        passages(tmp_path / "a.jsonl")


def test_what_the_system_does_not_give_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    reader = TextReader(path)
    path.unlink()
    for read in (reader.fingerprint, reader.sha256, lambda: [*reader.documents()]):
        with pytest.raises(UnreadableError, match=r"a\.txt cannot be read \(No such file"):
            read()


def test_an_encrypted_zip(tmp_path: Path) -> None:
    data = bytearray(zipped(TEXT.encode()))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag in both headers of the member
        data[data.index(mark) + at] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"text\.txt cannot be unpacked \(.*encrypted.*\): pack it again, without a password"
    ):
        passages(tmp_path / "a.zip")


def test_halves_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"text": "broken \\ud83d emoji"}\n')
    reader = TextReader(tmp_path / "a.ndjson")
    assert [*reader.documents()] == [["broken   emoji"]]
    assert reader.control_characters == 1


@pytest.mark.parametrize("unit", ["record", "piece"])
def test_halves_of_pairs_in_what_stays_as_it_stands(tmp_path: Path, unit: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": " broken \\ud83d\\u0001 emoji"}\n')
    reader = TextReader(tmp_path / "a.jsonl", unit)
    assert [*reader.documents()] == [[" broken  \x01 emoji"]]
    assert reader.control_characters == 1


def test_nothing_in_a_folder_is_left_out_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n")
    (folder / "sub" / "b.txt").write_text("second\n")
    (folder / "sub" / "back").symlink_to(folder)  # round and round
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "c.txt").write_text("third\n")
    (folder / "link").symlink_to(outside)
    assert passages(folder) == ["first", "third", "second"]  # a.txt, link/c.txt, sub/b.txt
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"gone\.txt is a link that leads nowhere: fetch what it names, or remove it"
    ):
        TextReader(folder)
    (folder / "gone.txt").unlink()
    scan = os.scandir

    def refuse(path: Any) -> Any:  # chmod would not stop a superuser
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): check its permissions"):
        TextReader(folder)


def test_utf_16_cut_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("some text".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-16 \(.*truncated.*\); convert it"):
        passages(tmp_path / "a.txt", encoding="utf-16")


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_all_streams_of_a_packed_file_are_read(tmp_path: Path, suffix: str) -> None:
    pack, path = PACKERS[suffix], tmp_path / f"text.txt{suffix}"
    lines = [f"line {i}, {hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()}" for i in range(5000)]
    halves = ["\n".join(lines[:2000]) + "\n", "\n".join(lines[2000:]) + "\n"]
    first, second = (pack(half.encode()) for half in halves)
    padding = b"\0" * 8 * (suffix != ".bz2")
    path.write_bytes(first + padding + second)
    assert passages(path) == lines
    for wrong in (
        first + bytes([second[0] ^ 1]) + second[1:],  # the second's mark
        first + b"and something else",
        (first + second)[:-3],
        first + second[:5],
        b"",
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="is damaged or cut short"):
            passages(path)


def test_an_archive_with_two_members_of_one_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "one\n")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.txt", "two\n")
    with pytest.raises(ValueError, match=r"has 'a.txt' more than once, .*: unpack it"):
        TextReader(path)


def test_an_archive_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.zip"
    data = bytearray(zipped(TEXT.encode()))
    data[data.index(b"PK\x01\x02") + 6] = 98  # what it asks for to be unpacked
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"no zip archive \(zip file version 9.8\): fetch it again"):
        TextReader(path)


def test_a_wrong_byte_before_the_cut_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.gz"
    noise = "".join(hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(4000))
    path.write_bytes(gzip.compress(b"one \xff line " + noise.encode())[:-4000])
    with pytest.raises(ValueError, match=r"is damaged or cut short|is not UTF-8"):
        passages(path)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.array(["a", "b"])
    parquet.write_table(arrow.table([column, column], names=["text", "text"]), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("id,text,text\n1,a,b\n")
    (tmp_path / "t.tsv").write_text("text\ttext\na\tb\n")
    for kind in ("parquet", "csv", "tsv"):
        with pytest.raises(ValueError, match=rf"t\.{kind} has more than one column 'text'"):
            passages(tmp_path / f"t.{kind}")
    (tmp_path / "u.csv").write_text("id,id,text\n1,2,a\n")  # of what is not read there may be two
    assert passages(tmp_path / "u.csv") == ["a"]


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a \\"text\\"", "of": {"text": "b"}, "as": "text"}\n')
    assert passages(path) == ['a "text"']
    path.write_text('{"text": "one"}\n{"text": "a", "of": [{"text": "b"}], "text": "c"}\n')
    with pytest.raises(
        ValueError, match=r"t\.jsonl, line 2 has the field 'text' more than once: mend the line"
    ):
        passages(path)
    path.write_text('{"año": "a", "año": "c"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="has the field 'año' more than once"):
        list(TextReader(path, field="año").documents())


# -------------------------------------------------------------------------------------- files as systems have them


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "other.sock")  # and would not be read
    for path in (tmp_path / "pipe.txt", tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=r"is a pipe or a device.*: write what it gives into a file"):
            TextReader(path)


def test_what_a_link_names_is_read_once(tmp_path: Path) -> None:
    """Two names of one file that are no links are two files, as copies are."""
    (tmp_path / "b.txt").write_text("one\n")
    (tmp_path / "a.txt").symlink_to("b.txt")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").symlink_to("../b.txt")
    outside = tmp_path.with_name(tmp_path.name + "-outside.txt")
    outside.write_text("two\n")
    (tmp_path / "e.txt").symlink_to(outside)
    (tmp_path / "f.txt").symlink_to(outside)
    os.link(outside, tmp_path / "g.txt")
    reader = TextReader(tmp_path)
    assert [name for name, *_ in reader.fingerprint()] == ["b.txt", "e.txt", "g.txt"]
    assert passages(tmp_path) == ["one", "two", "two"]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    try:
        for name in (b"a\xff.txt", b"b\xff.t\xff"):
            with open(os.fsencode(folder) + b"/" + name, "w") as file:
                file.write("one\ntwo\n")
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    reader = TextReader(folder)
    assert [*reader.documents()] == [["one"], ["two"]]
    assert [name for name, *_ in reader.fingerprint()] == ["a\\udcff.txt"]
    assert reader.skipped == {".t\\udcff": 1}
    json.dumps([reader.fingerprint(), reader.sha256(), reader.left_out], ensure_ascii=False).encode()
    with pytest.raises(ValueError, match=r"a\\udcff.txt is not UTF-8: rename it"):
        TextReader(folder / os.fsdecode(b"a\xff.txt"))


def test_another_file_with_the_size_and_time_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    reader = TextReader(path)
    before = reader.fingerprint()
    time = path.stat().st_mtime_ns
    other = tmp_path / "b.txt"
    other.write_text("two")
    os.utime(other, ns=(time, time))
    other.replace(path)
    assert reader.fingerprint() != before


@pytest.mark.parametrize("name", ["utf-8", "UTF8", "U8", "utf_8"])
def test_every_name_of_utf8_takes_a_mark_away(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n".encode())
    assert passages(tmp_path / "a.txt", encoding=name, unit="record") == ["one\n"]


def test_a_damaged_rest_after_a_wrong_byte(tmp_path: Path) -> None:
    packed = bytearray(
        bz2.compress(os.urandom(3_000_000).replace(b"\n", b""))
    )  # of several blocks, in one line
    packed[-1000] ^= 1
    (tmp_path / "a.txt.bz2").write_bytes(packed)
    with pytest.raises(ValueError, match=r"a.txt.bz2 is damaged or cut short"):
        passages(tmp_path / "a.txt.bz2")


def test_kinds_of_text_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    for kind in (arrow.string(), arrow.large_string(), arrow.string_view()):
        parquet.write_table(arrow.table({"text": arrow.array(["one", None, "two"], kind)}), path)
        assert passages(path) == ["one", "two"]
    wrong = arrow.array([b"one", b"t\xffwo"]).view(arrow.string())
    parquet.write_table(arrow.table({"text": wrong}), path)
    with pytest.raises(
        ValueError, match=r"a.parquet, row 2: the column 'text' holds bytes that are not UTF-8"
    ):
        passages(path)
