"""What `flowlm evaluate --report` leaves: numbers, a card, and a page with pictures and samples."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowlm import files
from flowlm.config import read_run_config
from flowlm.device import describe, resolve_device
from flowlm.evaluation.plots import (
    Line,
    Panel,
    level_of,
    panels_across,
    plot_frontier,
    plot_panels,
)
from flowlm.evaluation.report import (
    Picture,
    Samples,
    Table,
    Text,
    calls_text,
    html_report,
    markdown,
    numbered,
    views,
    write_json,
)
from flowlm.evaluation.runs import held_out_curve
from flowlm.evaluation.samples import current_commit
from flowlm.families import family
from flowlm.model import describe_data
from flowlm.provenance import cost_of, made

__all__ = ["check_report", "write_report"]

REPORT, CARD, PAGE, QUALITY, FRONTIER = (
    "report.json",
    "README.md",
    "report.html",
    "quality.png",
    "frontier.png",
)
_INTERVALS = "In brackets, and as bands: 95 % intervals over the samples."


def check_report(folder: Path, command: str, force: bool = False) -> None:
    """Refuse a folder for a report that holds something else than a former report of the same command.

    ValueError: it does, and is not forced.
    """
    if force or not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the report with --report")
    found = {path.name for path in folder.iterdir()}
    former = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        former = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("command")
    if found and (former != command or found - {REPORT, CARD, PAGE, QUALITY, FRONTIER}):
        what = f"the report of `{former}`" if former not in (None, command) else "files that are no report"
        raise ValueError(
            f"{folder} already holds {what}: choose another folder with --report, or write into it with --force"
        )


def write_report(
    folder: Path,
    target: Path,
    rows: Sequence[Mapping[str, Any]],
    command: str,
    samples: Mapping[int, Sequence[str]],
    *,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """A folder that says how good a run or a sample file is and how it was made: report.json, README.md, report.html.

    Args:
        folder: made when missing; its files are replaced.
        target: the run that `evaluate_run`, or the sample file that `evaluate_file` measured.
        rows: its rows.
        command: what to type to get this again.
        samples: passages to show, by network calls; 0 where these are not known.
        seed: of what was drawn.
        device: on which it was measured.

    Raises:
        ImportError: matplotlib is missing.
    """
    machine = describe(resolve_device(device))
    about = _of_file(target) if target.is_file() else _of_run(target)
    report = {
        "command": command,
        "commit": current_commit(),
        "machine": machine,
        "torch": torch.__version__,
        "seed": seed,
        **about["report"],
        "rows": list(rows),
        "samples": samples,
    }
    write_json(folder / REPORT, report)
    head = f"`{command}`, commit {current_commit()}, seed {seed}, on {machine}."
    text = [f"# {about['title']}", head, about["how"]]
    page: list[Any] = [Text("\n\n".join([head.replace("`", ""), *about["lines"]]))]
    for view in views(rows):
        text.append(markdown(view).rstrip())
        page.append(Table(view))
    for name, shown in _draw(folder, rows).items():
        text.append(f"![{shown}]({name})")
        page.append(Picture(folder / name, caption=shown))
    notes = [_INTERVALS, *about["notes"]]
    text += notes
    page.append(Text("\n\n".join(notes)))
    for calls, passages in samples.items():
        heading = f"In {calls_text(calls)}" if calls else "Samples"
        text += [f"## {heading}", numbered(passages)]
        page.append(Samples(passages, heading=heading))
    files.write_data(folder / CARD, "\n\n".join(text) + "\n")
    html_report(folder / PAGE, title=about["title"], sections=page)


def _of_file(path: Path) -> dict[str, Any]:
    """What is said of a sample file."""
    sha256 = files.sha256(path)
    how = f"Samples of {path.name}, sha256 {sha256[:12]}."
    return {
        "title": path.name,
        "how": how,
        "lines": [how],
        "report": {"file": path.name, "sha256": sha256},
        "notes": [],
    }


def _of_run(run: Path) -> dict[str, Any]:
    """What is said of a run: how it was made, of which data, how its losses fell."""
    data = describe_data(run)
    try:
        runs = made(run)
    except ValueError as error:
        runs, how = [], f"How it was made is not known: {error}."
        said = [how]
    else:
        commands, cost = [one["command"] for one in runs], f"{cost_of(runs)}."
        how = "\n".join(["Made by\n\n```sh", *commands, f"```\n\n{cost}"])
        said = ["Made by", *commands, cost]
    losses = [
        f"{what}: " + ", ".join(f"{step}: {loss:.4f}" for step, loss in curve) + "."
        for what, curve in _curves_said(run).items()
    ]
    learned = (
        f"Data: {data.get('corpus')} sha256 {str(data.get('sha256') or data.get('law_sha256'))[:12]}, "
        f"{data.get('train')} training rows, V = {data.get('vocab_size')}, L = {data.get('length')}."
    )
    return {
        "title": run.name,
        "how": how,
        "lines": said,
        "report": {
            "runs": runs,
            "data": data,
            "held_out": held_out_curve(run),
            "held_out_diagonal": held_out_curve(run, "held_out_diagonal"),
        },
        "notes": [learned, *losses],
    }


def _curves_said(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Held-out losses by step, and what each is."""
    curve = held_out_curve(run)
    if not curve:
        return {}
    config = read_run_config(run)
    kind = family(config.objective)
    unit = kind.unit(config)
    if kind.held_out_ranks:
        return {f"Held-out loss by step ({unit})": curve}
    said = {
        f"Held-out loss by step, of what it was trained by ({unit}; its targets move, so it ranks nothing)": curve
    }
    flow = held_out_curve(run, "held_out_diagonal")
    if flow and config.flow_map.diagonal_target == "data":
        said[f"Held-out loss by step, of its flow on the text alone, comparable with an FLM's ({unit})"] = (
            flow
        )
    return said


def _draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Pictures of rows in a folder: their names, and what each shows."""
    out = {}
    if panels := _panels(rows):
        plot_panels(panels, folder / QUALITY)
        out[QUALITY] = "Quality against network calls, time for one passage, and entropy"
    if any(row.get("frontier") for row in rows):
        plot_frontier(rows, folder / FRONTIER)
        out[FRONTIER] = "Perplexity against entropy, a line for each knob of the sampler"
    return out


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[list[Panel]]:
    """A row of pictures for each quality that is known of what a model wrote."""
    own = [row for row in rows if row.get("nfe")]
    asked = {
        "valid": "Valid passages",
        "perplexity": "Perplexity",
        "perplexity_at_data_entropy": "Perplexity at data entropy",
    }
    out = []
    for key, name in asked.items():
        known = [row for row in own if isinstance(row.get(key), float | int)]
        if not known:
            continue

        def lines(across: str, key: str = key, known: Sequence[Mapping[str, Any]] = known) -> dict[str, Line]:
            return _lines(known, key, across)

        panels = panels_across(name, lines, share=key == "valid", level=level_of(rows, key))
        out.append([panel for panel in panels if panel.lines])  # of a file's samples times may not be known
    return out


def _lines(rows: Sequence[Mapping[str, Any]], key: str, across: str) -> dict[str, Line]:
    """Of each model its points, with their intervals."""
    out: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in sorted(rows, key=lambda row: float(row["nfe"])):
        if row.get(across) is not None:
            low, high = (row.get("intervals") or {}).get(key) or (row[key], row[key])
            out.setdefault(row["model"], []).append((row[across], row[key], low, high))
    return dict(out)
