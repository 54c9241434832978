"""Reports: tables say what rows say, pages hold together and let nothing through, files are whole."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flowlm.evaluation import report
from flowlm.evaluation.metrics import ROW, make_row
from flowlm.evaluation.plots import plot_validity
from flowlm.evaluation.report import (
    Picture,
    Samples,
    Table,
    Text,
    broken_text,
    html_report,
    markdown,
    numbered,
    table_text,
    write_json,
)

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def row(model: str, nfe: int, valid: float, **changes: Any) -> dict[str, Any]:
    values = {
        "model": model,
        "nfe": nfe,
        "num": 1000,
        "valid": valid,
        "broken": {"form": 0.0, "object": 0.02, "feeling": 0.041},
        "nll_per_token": 0.39412,
        "entropy": 3.60712,
        "unique": 0.9995,
        "distinct_2": 0.0191,
        "slot_tv": 0.0312,
        "pair_tv": 0.1,
        "seconds": 1.2345,
        "tokens_per_second": 51840.2,
        "seed": 0,
        "dtype": "float32",
        "commit": "abc1234",
        "law": "0123456789abcdef",
        "slot_tv_by_slot": {"hero": 0.1},
    }
    return make_row(values | changes)


ROWS = [row("fmlm", 1, 0.78), row("fmlm", 2, 0.97), row("mdlm", 1, 0.0, nll_per_token=None)]


def shown(rows: list[dict[str, Any]], width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table_text(rows, **options))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


# ------------------------------------------------------------------------------------------------------- JSON


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    write_json(path, ROWS)
    assert json.loads(path.read_text(encoding="utf-8")) == ROWS
    assert list(json.loads(path.read_text(encoding="utf-8"))[0])[: len(ROW)] == list(ROW)
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_nan(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape("obj['rows'][1]['tv'] is")):
        write_json(tmp_path / "x.json", {"rows": [{}, {"tv": value}]})
    assert list(tmp_path.iterdir()) == []


def test_json_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device; what was there"):
        write_json(path, 2)
    assert path.read_text() == "1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ----------------------------------------------------------------------------------------------------- tables


def test_broken_text() -> None:
    broken = {"form": 0.0, "object": 0.02, "feeling": 0.041, "place": 0.0001}
    assert broken_text(broken) == "feeling 4.1 %, object 2.0 %, place <0.1 %"
    assert broken_text(broken, most=1) == "feeling 4.1 %, 2 more"
    assert broken_text({"form": 0.0}) == "none"


def test_markdown() -> None:
    lines = markdown(ROWS).splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    first = dict(zip(head, (cell.strip() for cell in lines[2].strip("|").split("|")), strict=True))
    assert first == {
        "model": "fmlm",
        "steps": "1",
        "valid": "78.0 %",
        "broken rules": "feeling 4.1 %, object 2.0 %",
        "nats/token": "0.394",
        "entropy": "3.607",
        "unique": ">99.9 %",
        "distinct-2": "0.019",
        "slot TV": "0.031",
        "pair TV": "0.100",
        "seconds": "1.23",
        "tokens/s": "51,840",
    }
    assert lines[1].startswith("| :-- | --: |")
    assert "–" in lines[4]
    assert "| 0.0 % |" in lines[4]
    assert lines[-1] == "samples 1000 · seed 0 · dtype float32 · commit abc1234 · law 01234567"
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_differing_circumstances_are_columns() -> None:
    text = markdown([*ROWS, row("other", 1, 1.0, seed=3, num=500)])
    head = text.splitlines()[0]
    assert "| seed |" in head
    assert "| samples |" in head
    assert text.splitlines()[-1] == "dtype float32 · commit abc1234 · law 01234567"


def test_text_corpora_have_no_empty_columns() -> None:
    plain = make_row({"model": "m", "nfe": 4, "num": 5, "entropy": 4.2, "unique": 1.0, "distinct_2": 0.5})
    head = markdown([plain]).splitlines()[0]
    assert head == "| model | steps | samples | entropy | unique | distinct-2 |"


def test_markdown_escapes_and_other_rows() -> None:
    text = markdown([{"setting": "a|b_<c>\nd", "value": 3e-4, "on": True, "list": [1, 2]}])
    assert text.splitlines()[0] == "| setting | value | on | list |"
    assert text.splitlines()[2] == r"| a\|b\_\<c> d | 0.0003 | yes | 1, 2 |"
    assert markdown([]) == ""
    assert markdown(ROWS, columns=["model", "slot_tv_by_slot"]).splitlines()[2] == "| fmlm | hero 0.1 |"


def test_terminal_table() -> None:
    text = shown(ROWS, title="Stories [EOS]")
    assert "Stories [EOS]" in text  # not taken for markup
    assert "feeling 4.1 %, object 2.0 %" in text
    assert "97.0 %" in text
    assert "samples 1000 · seed 0 · dtype float32 · commit abc1234 · law 01234567" in text
    different = shown([*ROWS, row("other", 1, 1.0, seed=3)])
    assert "seed 0, 3" in different


def test_terminal_table_fits_in_80_columns() -> None:
    text = shown(ROWS, width=80)
    for cell in ("78.0 %", "97.0 %", "0.394", "3.607", ">99.9 %", "0.031", "0.100"):
        assert cell in text
    assert "…" not in text
    # with coverage, in the place of what is unique
    text = shown([row("law", 0, 1.0, pair_coverage=0.877), *ROWS], width=80)
    for cell in ("coverage", "100.0 %", "87.7 %", "97.0 %", "0.394", "3.607", "0.031", "0.100"):
        assert cell in text
    assert ">99.9 %" not in text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("valid", 1.0, "100.0 %"),
        ("valid", 0.99951, ">99.9 %"),
        ("valid", 0.9994, "99.9 %"),
        ("valid", 0.0, "0.0 %"),
        ("valid", 0.0004, "<0.1 %"),
        ("valid", None, "–"),
        ("slot_tv", math.nan, "–"),
        ("seconds", 1234.5, "1234"),
        ("tokens_per_second", 12.34, "12.3"),
        ("mean_length", 55.04, "55.0"),
        ("law", "unknown", "unknown"),
        ("broken", {}, "none"),
        ("anything", "", "–"),
    ],
)
def test_cells(key: str, value: object, expected: str) -> None:
    assert report._cell(key, value) == expected


def test_intervals_stand_beside_their_numbers_where_there_is_room() -> None:
    intervals = {"valid": [0.7534, 0.8046], "entropy": [3.5988, 3.61612], "nll_per_token": None}
    one = row("fmlm", 1, 0.78, intervals=intervals)
    text = markdown([one])
    assert "| 78.0 % (75.3–80.5 %) |" in text
    assert "| 3.607 (3.599–3.616) |" in text
    assert "| 0.394 |" in text
    assert "intervals" not in text.splitlines()[0]
    assert "75.3" not in shown([one])
    assert "78.0 %" in shown([one], width=80)


def test_rows_are_ranked_where_there_is_a_frontier() -> None:
    def swept(model: str, value: float | None) -> dict[str, Any]:
        knob = None if value is None else "prior_scale"
        frontier = {"entropy": 3.6, "knob": knob, "curves": {}}
        within = {} if value is None else {"perplexity_at_data_entropy": [value - 2, value + 3]}
        swept_to = {"perplexity_at_data_entropy": value, "frontier": frontier, "intervals": within}
        return row(model, 1, 0.5, perplexity=50.0, **swept_to)

    rows = [
        swept("never", None),
        swept("worse", 40.0),
        row("held-out", 0, 1.0, perplexity=20.0),
        swept("better", 30.04),
    ]
    text = markdown(rows)
    head, _, *lines = (line.strip("| ").split(" | ") for line in text.splitlines()[:6])
    at = head.index("perplexity at data entropy")
    assert [(line[0], line[at]) for line in lines] == [
        ("better", "30.0 (28.0–33.0, prior\\_scale)"),
        ("worse", "40.0 (38.0–43.0, prior\\_scale)"),
        ("never", "not reached"),
        ("held-out", "–"),
    ]
    terminal = shown(rows, width=200)
    assert terminal.index("better") < terminal.index("worse") < terminal.index("never")
    assert "not reached" in terminal
    assert "prior" not in terminal
    assert [r["model"] for r in rows] == ["never", "worse", "held-out", "better"]


def test_plot_of_a_frontier(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flowlm.evaluation.plots import plot_frontier

    points = [{"value": v, "entropy": 3 + v, "perplexity": 10 * v} for v in (0.6, 0.8, 1.0)]
    curves = {"temperature": points, "last": points[:1]}
    frontier = {"entropy": 3.7, "knob": "temperature", "curves": curves}
    rows = [row("FLM", k, 0.5, perplexity=10.0, frontier=frontier) for k in (1, 4)]
    held_out = row("held-out", 0, 1.0, perplexity=9.0)
    plot_frontier([*rows, held_out], tmp_path / "a.png")
    plot_frontier([*rows, held_out], tmp_path / "b.png")
    plot_frontier(rows, tmp_path / "c.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    with pytest.raises(ValueError, match="no row has a frontier"):
        plot_frontier([held_out], tmp_path / "d.png")


# ------------------------------------------------------------------------------------------------------- plot


def test_plot_is_a_png_and_leaves_no_global_state(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import image

    before = dict(matplotlib.rcParams)
    pyplot_loaded = "matplotlib.pyplot" in sys.modules
    rows_by_model = {
        "fmlm": [row("fmlm", n, 1 - 0.3 / n) for n in (4, 1, 2)],
        "mdlm": [row("mdlm", 1, 0.0, slot_tv=None), row("mdlm", 64, 0.9), row("mdlm", 0, 0.5)],
    }
    path = tmp_path / "plot.png"
    plot_validity(rows_by_model, path, row("law", 0, 1.0))
    pixels = image.imread(path)
    assert pixels.shape[1] > 1000
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert pixels.std() > 0.02  # something is drawn
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_loaded
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    # the same rows give the same file
    again = tmp_path / "again.png"
    plot_validity(rows_by_model, again, row("law", 0, 1.0))
    assert again.read_bytes() == path.read_bytes()


def test_plot_of_one_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_validity({"m": [row("m", 1, 0.0, slot_tv=None)]}, tmp_path / "p.png", None)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_rows_without_validity(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no row has both 'valid' and 'nfe'"):
        plot_validity({"m": [make_row({"model": "m", "nfe": 1})]}, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "flowlm[plot]"')):
        plot_validity({"m": ROWS}, tmp_path / "p.png", None)


# ------------------------------------------------------------------------------------------------------- page


class Balanced(HTMLParser):
    """Collects tags and text, and insists that what is opened is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


EVIL = "<script>alert('x')</script> & \"</div>\" [EOS]"


def test_page(tmp_path: Path) -> None:
    png = tmp_path / "pixel.png"
    png.write_bytes(PIXEL)
    path = tmp_path / "page.html"
    html_report(
        path,
        title=f"Stories {EVIL}",
        sections=[
            Text(f"First {EVIL}\nstill first.\n\nSecond.\n\n\n", EVIL),
            Table([row(EVIL, 1, 0.5), *ROWS], EVIL, EVIL),
            Table([{"setting": EVIL, "value": 1.0}]),
            Picture(png, EVIL, EVIL, f'"quoted" {EVIL}'),
            Picture(PIXEL),
            Samples([EVIL, "two  spaces\nand lines"], EVIL, EVIL, [EVIL, ""]),
            Samples(["fixed"], mono=True),
        ],
    )
    page = parse(path)
    names = [tag for tag, _ in page.tags]
    text = "".join(page.text)
    assert not {"script", "link", "iframe", "object"} & set(names)
    assert names.count("p") >= 2
    assert (names.count("h1"), names.count("table"), names.count("img"), names.count("section")) == (
        1,
        2,
        2,
        7,
    )
    assert text.count(EVIL) >= 9
    assert "two  spaces\nand lines" in text
    assert "78.0 %" in text
    assert "feeling 4.1 %, object 2.0 %" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    for attributes in images:
        source = attributes["src"] or ""
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PIXEL
    assert images[0]["alt"] == f'"quoted" {EVIL}'
    raw = path.read_text(encoding="utf-8")
    assert "http://" not in raw
    assert "https://" not in raw
    assert "prefers-color-scheme: dark" in raw
    assert any(tag == "td" and attrs.get("style") == "--part: 78.0%" for tag, attrs in page.tags)
    assert any("mono" in (attrs.get("class") or "") for _, attrs in page.tags)


def test_empty_page_and_tables(tmp_path: Path) -> None:
    html_report(tmp_path / "p.html", title="Nothing", sections=[Table([]), Samples([]), Text("")])
    assert parse(tmp_path / "p.html")
    assert shown([]) is not None


def test_page_refusals(tmp_path: Path) -> None:
    def write(section: Any) -> None:
        html_report(tmp_path / "p.html", title="t", sections=[section])

    with pytest.raises(ValueError, match="not a PNG"):
        write(Picture(b"GIF89a"))
    with pytest.raises(FileNotFoundError):
        write(Picture(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="1 labels for 2 texts"):
        write(Samples(["a", "b"], labels=["one"]))
    with pytest.raises(TypeError, match="a section is a Text, Table, Picture or Samples, got str"):
        write("text")
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_writes_is_no_markup() -> None:
    assert (
        numbered(["a <b> of\n*stars* [PAD]", "1_2|3"]) == "1. a \\<b> of \\*stars\\* \\[PAD\\]\n2. 1\\_2\\|3"
    )
