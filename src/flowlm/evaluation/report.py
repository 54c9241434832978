"""Showing rows: JSON for machines, tables for terminals and Markdown, and one self-contained page.

Tables round, JSON keeps what was measured. What all rows share (seed, type, commit, law) stands once, under
the table.
"""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlm import files
from flowlm.evaluation.metrics import ROW
from flowlm.evaluation.samples import DEFAULT_SAMPLER, UNKNOWN
from flowlm.files import write_data

if TYPE_CHECKING:
    import rich.table

__all__ = [
    "Picture",
    "Samples",
    "Section",
    "Table",
    "Text",
    "broken_text",
    "calls_text",
    "html_report",
    "markdown",
    "numbered",
    "table_text",
    "views",
    "write_json",
]

Row: TypeAlias = Mapping[str, Any]
PathLike: TypeAlias = str | os.PathLike[str]

MISSING = "–"
_TITLES = {
    "nfe": "steps",
    "num": "samples",
    "broken": "broken rules",
    "nll_per_token": "nats/token",
    "nll_per_story": "nats/story",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "known": "known words",
    "longest_copy": "longest copy",
    "slot_tv": "slot TV",
    "slot_tv_max": "slot TV max",
    "slot_tv_floor": "slot TV floor",
    "pair_tv": "pair TV",
    "pair_tv_max": "pair TV max",
    "pair_tv_floor": "pair TV floor",
    "perplexity_at_data_entropy": "perplexity at data entropy",
    "ngram_perplexity": "n-gram perplexity",
    "ngram_perplexity_at_data_entropy": "n-gram perplexity at data entropy",
    "frechet": "Fréchet",
    "latency": "seconds for one",
    "cut": "texts cut",
    "tokens_per_second": "tokens/s",
}
_SHARES = {"valid", "parsed", "unique", "known", "copied", "slot_coverage", "pair_coverage"}
_BY_LAW = {"valid", "broken", "nll_per_token", "slot_tv", "pair_tv", "pair_coverage", "law"}
_RANK = "perplexity_at_data_entropy"
NOT_REACHED = "not reached"
_BY_TEXT = {
    *("perplexity", _RANK, "frechet", "known", "self_bleu", "copied", "longest_copy", "scorer", "cut"),
    "frontier",
}
_HASHES = {"law", "tokenizer"}
_CIRCUMSTANCES = ("num", "seed", "dtype", "commit", "law", "scorer", "cut")
_HASH_DIGITS = 8


# ------------------------------------------------------------------------------------------------------- JSON


def _refuse_nan(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: JSON has no such number; write None for what is not known")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_nan(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_nan(item, f"{where}[{i}]")


def write_json(path: PathLike, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all. ValueError: NaN or infinity, with its place."""
    _refuse_nan(obj, "obj")
    files.write_json(path, obj)


# ------------------------------------------------------------------------------------------------------ cells


def _share(value: float) -> str:
    """Percent with one decimal; never 0 or 100 for what is neither."""
    if 0 < value < 0.0005:
        return "<0.1 %"
    if 0.9995 <= value < 1:
        return ">99.9 %"
    return f"{100 * value:.1f} %"


def broken_text(broken: Mapping[str, float], most: int | None = None) -> str:
    """Broken rules, most frequent first: "feeling 4.1 %, object 2.0 %"; at most `most` of them, "none" if
    there are none."""
    rules = sorted(
        ((share, rule) for rule, share in broken.items() if share > 0), key=lambda r: (-r[0], r[1])
    )
    shown = [f"{rule} {_share(share)}" for share, rule in rules[:most]]
    if len(rules) > len(shown):
        shown.append(f"{len(rules) - len(shown)} more")
    return ", ".join(shown) or "none"


def _cell(key: str, value: Any) -> str:
    """The value as a table shows it."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        if key == "broken":
            return broken_text(value, most=3)
        if key == "sampler":
            value = {name: item for name, item in value.items() if item != DEFAULT_SAMPLER.get(name)}
        return ", ".join(f"{name} {_cell(name, item)}" for name, item in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(_cell("", item) for item in value) or MISSING
    if isinstance(value, int | float):
        return _number(key, value)
    text = str(value)
    return text[:_HASH_DIGITS] if key in _HASHES and text != UNKNOWN else text


def _number(key: str, value: float) -> str:
    if key in _SHARES:
        return _share(value)
    if key == "tokens_per_second":
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    if isinstance(value, int):
        return str(value)
    if key in ("seconds", "latency"):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if key in ("mean_length", "longest_copy") or "perplexity" in key:
        return f"{value:.1f}"
    if key in _TITLES or key.endswith("entropy"):
        return f"{value:.3f}"
    return f"{value:.4g}"


def _shown(row: Row, key: str, narrow: bool) -> str:
    """The cell of a row; where there is room, with its interval: 37.2 (36.1–38.4)."""
    frontier = row.get("frontier")
    if key == _RANK and frontier:
        if row.get(key) is None:
            return NOT_REACHED
        if not narrow:
            ends = (row.get("intervals") or {}).get(key)
            within = "" if not ends else f"{_number(key, ends[0])}–{_number(key, ends[1])}, "
            return f"{_cell(key, row[key])} ({within}{frontier['knob']})"
    cell = _cell(key, row.get(key))
    ends = (row.get("intervals") or {}).get(key)
    if narrow or not ends or cell == MISSING:
        return cell
    low, high = (_number(key, end) for end in ends)
    return f"{cell} ({low.removesuffix(' %')}–{high})"


def _ranked(rows: Sequence[Row]) -> Sequence[Row]:
    """By perplexity at the data's entropy, where any row has one; the others after them, as they stand."""
    return sorted(rows, key=lambda row: row[_RANK] if isinstance(row.get(_RANK), int | float) else math.inf)


def _title(key: str) -> str:
    return _TITLES.get(key, key.replace("_", " "))


def _known(row: Row, key: str) -> bool:
    value = row.get(key)
    if key == _RANK and row.get("frontier"):
        return True  # that no curve reaches it is known too
    return value is not None and value != "" and not (key in _CIRCUMSTANCES and value == UNKNOWN)


def _is_numeric(rows: Sequence[Row], key: str) -> bool:
    values = [row[key] for row in rows if _known(row, key)]
    if key == _RANK:
        return True
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _layout(
    rows: Sequence[Row], columns: Sequence[str] | None, narrow: bool = False
) -> tuple[list[str], str]:
    """The columns to show, and the line that tells the circumstances all rows share.

    `narrow` saves columns: circumstances go to that line even if they differ, lesser numbers are left out.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    names = dict.fromkeys(row["scorer"] for row in rows if row.get("scorer") and row.get("perplexity"))
    if len(names) > 1:
        raise ValueError(
            f"perplexities under different scorers do not compare, and stand in no one table: {'; '.join(names)}"
        )
    if columns is not None:
        return list(columns), ""
    if "model" not in keys or "nfe" not in keys:  # not rows of an evaluation: all they have
        return keys, ""
    shown = [key for key in ROW if key != "intervals" and any(_known(row, key) for row in rows)]
    if narrow:
        spare = {"seconds", "latency"}
        if {"valid", "perplexity"} & {*shown}:
            spare |= {"distinct_2", "tokens_per_second"}
        if "pair_coverage" in shown:
            spare |= {"unique"}  # which sees less of the same
        if "perplexity" in shown:
            # each of these takes the room of one of the others
            both = [key for key in ("frechet", _RANK) if key in shown]
            spare |= {"unique", *("longest_copy", "copied")[: len(both)]}
        shown = [key for key in shown if key not in spare]
    notes: list[str] = []
    # Sampler options change what a row means: shown wherever one is not the default.
    if any(_cell("sampler", row["sampler"]) != MISSING for row in rows if row.get("sampler")):
        shown.insert(shown.index("nfe") + 1, "sampler")
    for key in [key for key in ("sampler", *_CIRCUMSTANCES) if key in shown]:
        cells = list(dict.fromkeys(_cell(key, row[key]) for row in rows if _known(row, key)))
        if (narrow and key != "sampler") or (len(cells) == 1 and len(rows) > 1):
            shown.remove(key)
            notes.append(f"{_title(key)} {', '.join(cells)}")
    return shown, " · ".join(notes)


def _cells(rows: Sequence[Row], columns: Sequence[str], narrow: bool = False) -> list[list[str]]:
    return [[_shown(row, key, narrow) for key in columns] for row in rows]


# ----------------------------------------------------------------------------------------------------- tables


def views(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows for one table; for two, by the law and by the text, where they were judged by both."""
    judges = (_BY_LAW, _BY_TEXT)
    if not all(any(_known(row, key) for row in rows for key in keys) for keys in judges):
        return [list(rows)]
    return [
        [
            {key: value for key, value in row.items() if key not in other}
            for row in rows
            if any(_known(row, key) for key in own)
        ]
        for own, other in (judges, judges[::-1])
    ]


def table_text(
    rows: Sequence[Row], *, title: str | None = None, columns: Sequence[str] | None = None
) -> rich.table.Table:
    """A table for the terminal; `columns` are keys, by default the main ones of `ROW` that any row knows."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    rows = _ranked(rows)
    # Text objects, since a plain string would be read as markup and "[EOS]" as a tag
    shown, note = _layout(rows, columns, narrow=True)
    table = RichTable(
        title=RichText(title) if title else None,
        caption=RichText(note) if note else None,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for key in shown:
        numeric = _is_numeric(rows, key)
        table.add_column(
            RichText(_title(key).replace(" ", "\n").replace("/", "/\n")),
            justify="right" if numeric else "left",
            no_wrap=numeric or key == "model",
            overflow="fold",
            min_width=12 if key == "broken" else None,
        )
    for cells in _cells(rows, shown, narrow=True):
        table.add_row(*map(RichText, cells))
    return table


def calls_text(count: int) -> str:
    """ "1 network call", "8 network calls"."""
    return f"{count} network call{'s' if count > 1 else ''}"


def numbered(texts: Sequence[str]) -> str:
    """Texts as a numbered list in Markdown, each on a line."""
    return "\n".join(f"{i}. {_escape_markdown(text)}" for i, text in enumerate(texts, 1))


def _escape_markdown(text: str) -> str:
    for mark in "\\`*_<|[]":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def markdown(rows: Sequence[Row], *, columns: Sequence[str] | None = None) -> str:
    """A table in Markdown, by default of all keys of `ROW` that any row knows; "" for no rows."""
    if not rows:
        return ""
    rows = _ranked(rows)
    shown, note = _layout(rows, columns)
    lines = [
        [_escape_markdown(_title(key)) for key in shown],
        ["--:" if _is_numeric(rows, key) else ":--" for key in shown],
        *([_escape_markdown(cell) for cell in cells] for cells in _cells(rows, shown)),
    ]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return f"{text}\n{_escape_markdown(note)}\n" if note else text


# ------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines."""

    body: str
    heading: str = ""


@dataclass(frozen=True)
class Table:
    """Rows as a table; `columns` as in `markdown`."""

    rows: Sequence[Row]
    heading: str = ""
    caption: str = ""
    columns: Sequence[str] | None = None


@dataclass(frozen=True)
class Picture:
    """A PNG, by path or as bytes; it is copied into the page. `alt` says what it shows."""

    png: PathLike | bytes
    heading: str = ""
    caption: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Samples:
    """Texts as they were written; `labels` (none, or one each) stand above them; `mono`: fixed-width type."""

    texts: Sequence[str]
    heading: str = ""
    caption: str = ""
    labels: Sequence[str] = ()
    mono: bool = False


Section: TypeAlias = Text | Table | Picture | Samples

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #22252a; --soft: #6b7078; --line: #e3e0d8; --accent: #0b64a0;
  --bar: #d7e8f4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1d2024; --ink: #e4e5e3; --soft: #9aa0a8; --line: #32363c; --accent: #7cc0f0;
    --bar: #1f3d54;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.6;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 2rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 0 0 .75rem; }
section { margin: 0 0 2.75rem; }
p { max-width: 44rem; margin: 0 0 1rem; }
figure { margin: 0; }
.note { color: var(--soft); font-size: .875rem; margin: .6rem 0 0; max-width: 52rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: left; vertical-align: baseline; }
th {
  font-size: .78rem; font-weight: 600; color: var(--soft); white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
tbody tr + tr td { border-top: 1px solid var(--line); }
td.rules { min-width: 12rem; }
td.name { font-weight: 600; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
td.share {
  background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)) no-repeat
    .3rem 50% / calc(100% - .6rem) 62%;
}
img {
  display: block; width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .6rem;
}
.samples {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
}
.sample {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem 1rem;
}
.label { color: var(--accent); font-size: .78rem; font-weight: 600; margin-bottom: .3rem; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; }
.serif { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif; font-size: 1.04rem; }
.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem; }
@media print { body { background: none; } .sample, tr, figure { break-inside: avoid; } }
"""


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>\n' if text else ""


def _text_html(section: Text) -> str:
    paragraphs = (" ".join(part.split()) for part in section.body.split("\n\n"))
    return "".join(f"<p>{html.escape(part)}</p>\n" for part in paragraphs if part)


def _table_html(section: Table) -> str:
    rows = _ranked(section.rows)
    shown, note = _layout(rows, section.columns)
    numeric = {key for key in shown if _is_numeric(rows, key)}

    def cell(row: Row, key: str) -> str:
        kinds = []
        style = ""
        if key in numeric:
            kinds.append("number")
        if key == "model":
            kinds.append("name")
        if key == "broken":
            kinds.append("rules")
        if key == "valid" and key in numeric and row.get(key) is not None:
            kinds.append("share")
            style = f' style="--part: {100 * float(row[key]):.1f}%"'
        names = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<td{names}{style}>{html.escape(_shown(row, key, narrow=False))}</td>"

    def title(key: str) -> str:
        names = ' class="number"' if key in numeric else ""
        return f'<th scope="col"{names}>{html.escape(_title(key))}</th>'

    head = "<tr>" + "".join(map(title, shown)) + "</tr>"
    body = "\n".join("<tr>" + "".join(cell(row, key) for key in shown) + "</tr>" for row in rows)
    table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="wide">{table}</div>\n{_note(section.caption)}{_note(note)}'


def _picture_html(section: Picture) -> str:
    data = section.png if isinstance(section.png, bytes) else Path(section.png).read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"not a PNG: {'bytes' if isinstance(section.png, bytes) else section.png}")
    alt = html.escape(section.alt or section.caption or section.heading)
    source = base64.b64encode(data).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{alt}"></figure>\n{_note(section.caption)}'
    )


def _samples_html(section: Samples) -> str:
    if section.labels and len(section.labels) != len(section.texts):
        raise ValueError(
            f"{len(section.labels)} labels for {len(section.texts)} texts: give one label each, or none"
        )
    labels = section.labels or [""] * len(section.texts)
    face = "mono" if section.mono else "serif"
    items = "".join(
        '<div class="sample">'
        + (f'<div class="label">{html.escape(label)}</div>' if label else "")
        + f'<div class="words {face}">{html.escape(text)}</div></div>\n'
        for label, text in zip(labels, section.texts)
    )
    return f'<div class="samples">\n{items}</div>\n{_note(section.caption)}'


def _section_html(section: Section) -> str:
    if isinstance(section, Text):
        inner = _text_html(section)
    elif isinstance(section, Table):
        inner = _table_html(section)
    elif isinstance(section, Picture):
        inner = _picture_html(section)
    elif isinstance(section, Samples):
        inner = _samples_html(section)
    else:
        raise TypeError(f"a section is a Text, Table, Picture or Samples, got {type(section).__name__}")
    heading = f"<h2>{html.escape(section.heading)}</h2>\n" if section.heading else ""
    return f"<section>\n{heading}{inner}</section>\n"


def html_report(path: PathLike, *, title: str, sections: Sequence[Section]) -> None:
    """Write one page that needs nothing but itself: no network, no script, light and dark.

    ValueError: a picture is not a PNG, labels do not match texts; TypeError: not a section; OSError: a
    picture cannot be read or the page not be written.
    """
    body = "".join(map(_section_html, sections))
    write_data(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # the page asks for nothing; this has the browser hold it to that
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html.escape(title)}</h1>\n{body}</main>\n</body>\n</html>\n",
    )
