"""The picture of a frontier: perplexity against entropy, a line for each knob that was turned."""

from __future__ import annotations

import io
from collections.abc import Sequence

from flowlm.evaluation.report import _COLOURS, _FAINT, _INK, _MARKS, PathLike, Row
from flowlm.files import write_data

__all__ = ["plot_frontier"]


def plot_frontier(rows: Sequence[Row], path_png: PathLike) -> None:
    """Perplexity (logarithmic) against entropy, as PNG: a colour for each row with a ``frontier``, a mark for each
    of its knobs, the entropy of the data as a line, rows without network calls (held-out text, n-gram samples) as
    crosses with their names.

    ValueError: no row has a frontier with a point; ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "flowlm[plot]"') from error

    swept = [row for row in rows if row.get("frontier") and any(row["frontier"]["curves"].values())]
    if not swept:
        raise ValueError("no row has a frontier: evaluate with --frontier first")
    knobs = list(dict.fromkeys(knob for row in swept for knob in row["frontier"]["curves"]))
    marks = {knob: _MARKS[i % len(_MARKS)] for i, knob in enumerate(knobs)}

    figure = Figure(
        figsize=(8.4, 5.4), dpi=160, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.axvline(swept[0]["frontier"]["entropy"], color=_FAINT, lw=1.2, ls="--", zorder=1)
    for i, row in enumerate(swept):
        colour = _COLOURS[i % len(_COLOURS)]
        name = f"{row['model']}, {row['nfe']} step{'s' * (row['nfe'] != 1)}"
        for knob, points in row["frontier"]["curves"].items():
            x = [point["entropy"] for point in points]
            y = [point["perplexity"] for point in points]
            axes.plot(x, y, lw=1.6, ms=5, mec="white", mew=0.6, color=colour, marker=marks[knob], zorder=3)
        axes.plot([], [], lw=2, color=colour, label=name)
    for knob in knobs:
        axes.plot([], [], ls="", color=_INK, marker=marks[knob], label=knob)
    axes.plot([], [], color=_FAINT, lw=1.2, ls="--", label="entropy of the data")
    for row in rows:
        if not row.get("nfe") and row.get("perplexity") and row.get("entropy") is not None:
            axes.plot(
                row["entropy"], row["perplexity"], ls="", marker="+", ms=10, mew=2, color=_INK, zorder=4
            )
            axes.annotate(
                row["model"],
                (row["entropy"], row["perplexity"]),
                (7, 5),
                textcoords="offset points",
                color=_INK,
            )
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
    axes.set_xlabel("entropy within a passage, nats", color=_INK)
    axes.set_title("Perplexity", loc="left", color=_INK, fontweight="bold", fontsize=11, pad=10)
    axes.grid(color="#e4e4e4", lw=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(which="both", colors=_FAINT, labelcolor=_INK, length=3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=_INK)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_data(path_png, image.getvalue())
