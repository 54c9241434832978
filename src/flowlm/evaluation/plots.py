"""Pictures of rows, as PNG: quality against network calls, perplexity against entropy, models side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flowlm.evaluation.bootstrap import share_interval
from flowlm.evaluation.report import PathLike, Row
from flowlm.files import write_data

__all__ = ["Line", "Panel", "plot_frontier", "plot_panels", "plot_validity"]

# told apart with any colour vision, and in grey by their marks (Okabe and Ito, yellow left out)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _FAINT = "#222222", "#8a8a8a"
_THICK: dict[str, Any] = {"lw": 2, "ms": 6, "mec": "white", "mew": 0.8, "zorder": 3}


def _matplotlib() -> Any:
    """The package with the parts used here; pyplot is none of them: it would keep global state and choose a back
    end."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.layout_engine
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "flowlm[plot]"') from error
    return matplotlib


def _canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure with its own canvas, and its axes (rows, columns)."""
    library = _matplotlib()
    layout = library.layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = library.figure.Figure(figsize=(width, height), dpi=160, facecolor="white", layout=layout)
    library.backends.backend_agg.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontweight="bold", fontsize=11, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(which="both", colors=_FAINT, labelcolor=_INK, length=3)


def _of_calls(axes: Any, calls: Iterable[int]) -> None:
    """Network calls to the right, by powers of two."""
    ticker = _matplotlib().ticker
    known = list(calls)
    low, high = math.floor(math.log2(min(known))), math.ceil(math.log2(max(known)))
    stride = max(1, math.ceil((high - low) / 10))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - 0.25), 2 ** (high + 0.25))
    axes.xaxis.set_major_locator(ticker.FixedLocator([2**k for k in range(low, high + 1, stride)]))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("network calls per sample", color=_INK)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8, zorder=0)


def _in_percent(axes: Any) -> None:
    axes.set_ylim(-0.02, 1.03)
    axes.yaxis.set_major_formatter(_matplotlib().ticker.PercentFormatter(1.0, decimals=0, symbol=" %"))


def _plain_logs(axis: Any) -> None:
    """A logarithmic axis in plain numbers."""
    base: Any = _matplotlib().ticker.LogFormatter

    class Plain(base):
        """Which ticks it labels is the base's choice; it would write .4 as 4e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    for put in (axis.set_major_formatter, axis.set_minor_formatter):
        put(Plain(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))


def _save(figure: Any, path: PathLike) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_data(path, image.getvalue())


def _style(number: int) -> dict[str, Any]:
    """Of the n-th model."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKS[number % len(_MARKS)],
        "ls": ("-", "--", ":")[number // len(_COLOURS) % 3],
    }


# --------------------------------------------------------------------------------------- one run, and its teacher


def _points(rows: Iterable[Row], key: str) -> list[Row]:
    """Rows that have both a step count and a value, by step count."""
    return sorted(
        (row for row in rows if row.get("nfe") and row.get(key) is not None), key=lambda r: r["nfe"]
    )


def plot_validity(
    rows_by_model: Mapping[str, Sequence[Row]], path_png: PathLike, law: Row | None = None
) -> None:
    """Validity (with its 95 % interval) and distance of slots against network calls.

    `law` (see `metrics.law_row`; take as many samples as the models', since the distance falls with their
    number) is drawn as the line that a perfect model reaches. ValueError: no row has a validity and a step
    count; ImportError: matplotlib is missing.
    """
    valid = {model: points for model, rows in rows_by_model.items() if (points := _points(rows, "valid"))}
    if not valid:
        raise ValueError("no row has both 'valid' and 'nfe' >= 1: evaluate samples with their grammar first")
    far = {model: points for model, rows in rows_by_model.items() if (points := _points(rows, "slot_tv"))}
    styles = {model: _style(i) for i, model in enumerate(rows_by_model)}

    figure, ((left, right),) = _canvas(9.6, 4.3, 1, 2)
    handles: dict[str, Any] = {}
    for model, points in valid.items():
        x = [row["nfe"] for row in points]
        y = [float(row["valid"]) for row in points]
        (handles[model],) = left.plot(x, y, **_THICK, **styles[model])
        if all(row.get("num") for row in points):
            low, high = zip(
                *(share_interval(share, row["num"]) for share, row in zip(y, points)), strict=True
            )
            left.fill_between(x, low, high, color=styles[model]["color"], alpha=0.15, lw=0, zorder=2)
    for model, points in far.items():
        x = [row["nfe"] for row in points]
        y = [float(row["slot_tv"]) for row in points]
        (line,) = right.plot(x, y, **_THICK, **styles[model])
        handles.setdefault(model, line)
    for axes, key in ((left, "valid"), (right, "slot_tv")):
        if law is not None and law.get(key) is not None:
            handles["exact samples of the law"] = axes.axhline(
                law[key], color=_INK, lw=1.2, ls="--", zorder=1
            )
        _of_calls(axes, [row["nfe"] for points in (*valid.values(), *far.values()) for row in points])
    _dress(left, "Valid samples")
    _in_percent(left)
    _dress(right, "Slots: total variation from the law")
    right.set_ylim(bottom=0)
    if not far:
        right.text(0.5, 0.5, "no sample could be read", transform=right.transAxes, ha="center", color=_FAINT)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 4),
        frameon=False,
        labelcolor=_INK,
    )
    _save(figure, path_png)


# --------------------------------------------------------------------------------------------------- its frontier


def plot_frontier(rows: Sequence[Row], path_png: PathLike) -> None:
    """Perplexity (logarithmic) against entropy: a colour and dash for each row with a ``frontier``, a mark for each of
    its knobs, the entropy of the data as a line, rows without network calls (held-out text, n-gram samples) as crosses
    with their names.

    ValueError: no row has a frontier with a point; ImportError: matplotlib is missing.
    """
    swept = [row for row in rows if row.get("frontier") and any(row["frontier"]["curves"].values())]
    if not swept:
        raise ValueError("no row has a frontier: evaluate with --frontier first")
    knobs = list(dict.fromkeys(knob for row in swept for knob in row["frontier"]["curves"]))
    marks = {knob: _MARKS[i % len(_MARKS)] for i, knob in enumerate(knobs)}

    figure, ((axes,),) = _canvas(8.4, 5.4)
    axes.set_yscale("log")
    axes.axvline(swept[0]["frontier"]["entropy"], color=_FAINT, lw=1.2, ls="--", zorder=1)
    for i, row in enumerate(swept):
        style = _style(i) | {"marker": ""}
        name = f"{row['model']}, {row['nfe']} step{'s' * (row['nfe'] != 1)}"
        for knob, points in row["frontier"]["curves"].items():
            x = [point["entropy"] for point in points]
            y = [point["perplexity"] for point in points]
            mark = {"marker": marks[knob], "ms": 5, "mec": "white", "mew": 0.6}
            axes.plot(x, y, lw=1.6, zorder=3, **style | mark)
        axes.plot([], [], lw=2, label=name, **style)
    for knob in knobs:
        axes.plot([], [], ls="", color=_INK, marker=marks[knob], label=knob)
    axes.plot([], [], color=_FAINT, lw=1.2, ls="--", label="entropy of the data")
    for row in rows:
        if not row.get("nfe") and row.get("perplexity") and row.get("entropy") is not None:
            place = (row["entropy"], row["perplexity"])
            axes.plot(*place, ls="", marker="+", ms=10, mew=2, color=_INK, zorder=4)
            axes.annotate(row["model"], place, (7, 5), textcoords="offset points", color=_INK)
    _plain_logs(axes.yaxis)
    axes.set_xlabel("entropy within a passage, nats", color=_INK)
    axes.grid(color="#e4e4e4", lw=0.8, zorder=0)
    _dress(axes, "Perplexity")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=_INK)
    _save(figure, path_png)


# --------------------------------------------------------------------------------------------- models side by side

Line = Sequence[tuple[float, float, float, float]]
"""Points (x, y, least y, largest y)."""


class Panel:
    """One of several pictures that share their legend.

    Args:
        title: above it.
        below: what goes to the right: "calls" (network calls), or the axis's own label, logarithmic where `spread`.
        lines: of each model; a model without points has none here.
        share: y is a share, shown in percent; else y is logarithmic.
        level: where y is that of the data itself, if known.
    """

    def __init__(
        self,
        title: str,
        below: str,
        lines: Mapping[str, Line],
        *,
        share: bool,
        spread: bool = False,
        level: float | None = None,
    ):
        self.title, self.below, self.lines = title, below, {k: v for k, v in lines.items() if v}
        self.share, self.spread, self.level = share, spread, level


def level_of(rows: Sequence[Row], key: str) -> float | None:
    """A quality of the data itself: of the law, or of held-out text; None where it is not known."""
    of_data = (row[key] for row in rows if row["model"] in ("law", "held-out") and row.get(key) is not None)
    return next(of_data, None)


def panels_across(
    title: str, lines: Callable[[str], Mapping[str, Line]], *, share: bool, level: float | None
) -> list[Panel]:
    """One quality against network calls, milliseconds for one passage, and entropy.

    Args:
        lines: of each model, its points across a key of its rows: "nfe", "latency" in seconds, "entropy".
        title, share, level: as of `Panel`.
    """
    times = {
        model: [(1000 * x, y, low, high) for x, y, low, high in points]
        for model, points in lines("latency").items()
    }
    return [
        Panel(title, "calls", lines("nfe"), share=share, level=level),
        Panel(title, "milliseconds for one passage", times, share=share, spread=True, level=level),
        Panel(title, "entropy within a passage, nats", lines("entropy"), share=share, level=level),
    ]


def plot_panels(rows: Sequence[Sequence[Panel]], path_png: PathLike) -> None:
    """Pictures in rows, with one legend: each model has one colour and mark in all of them.

    ImportError: matplotlib is missing.
    """
    models = list(dict.fromkeys(model for row in rows for panel in row for model in panel.lines))
    columns = max(map(len, rows))
    figure, grid = _canvas(4.8 * columns, 3.9 * len(rows) + 0.4, len(rows), columns)
    handles: dict[str, Any] = {}
    for row, places in zip(rows, grid):
        for axes in places[len(row) :]:
            axes.set_axis_off()
        for panel, axes in zip(row, places):
            for model, points in panel.lines.items():
                style = _style(models.index(model))
                x, y, low, high = zip(*points, strict=True)
                (handles[model],) = axes.plot(x, y, **_THICK, **style)
                axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0, zorder=2)
            if panel.level is not None:
                handles["the data itself"] = axes.axhline(panel.level, color=_INK, lw=1.2, ls="--", zorder=1)
            if not panel.lines:
                _dress(axes, panel.title)
                axes.text(
                    0.5, 0.5, "no model reaches it", transform=axes.transAxes, ha="center", color=_FAINT
                )
                continue
            if panel.below == "calls":
                _of_calls(axes, [int(point[0]) for points in panel.lines.values() for point in points])
            else:
                axes.set_xlabel(panel.below, color=_INK)
                axes.grid(color="#e4e4e4", lw=0.8, zorder=0)
                if panel.spread:
                    axes.set_xscale("log")
                    _plain_logs(axes.xaxis)
            if panel.share:
                _in_percent(axes)
            else:
                axes.set_yscale("log")
                _plain_logs(axes.yaxis)
            _dress(axes, panel.title)
    ordered = [name for name in (*models, "the data itself") if name in handles]
    figure.legend(
        [handles[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=max(1, min(len(ordered), 2 * columns)),
        frameon=False,
        labelcolor=_INK,
    )
    _save(figure, path_png)
