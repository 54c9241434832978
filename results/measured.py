"""Writes what was measured into the documents and the demo, from results/: python results/measured.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowlm.comparison.report import (
    NAMES,
    PARSED,
    SHARES,
    VALID,
    beside,
    panels_of,
    pivot,
    qualities,
)
from flowlm.evaluation.plots import plot_panels
from flowlm.evaluation.report import markdown, write_json

ROOT = Path(__file__).resolve().parents[1]
#: The comparison of the families on the language with a known law, once it is there; what the demo shows of it; its
#: picture there.
FAMILIES = ROOT / "results" / "comparisons" / "grammar"
COMPARED = ROOT / "src" / "flowlm" / "compared.json"
REPORT, PICTURE = FAMILIES / "report.json", FAMILIES / "families.png"
#: What a table shows of a row.
COLUMNS = ("model", "nfe", "num", "valid", "parsed", "entropy", "unique", "slot_tv", "pair_tv")

Report = dict[str, Any]


def mean_rows(reports: list[Report]) -> list[dict[str, Any]]:
    """Row by row the mean over the reports of several seeds; beside it every seed's share of valid stories."""
    rows = []
    for same in zip(*(report["rows"] for report in reports), strict=True):
        assert len({(row["model"], row["nfe"], row["num"]) for row in same}) == 1
        row = {key: same[0][key] for key in ("model", "nfe", "num")}
        for key in COLUMNS[3:]:
            # A distance is not known where no story parsed: then there is no mean either.
            known = all(r[key] is not None for r in same)
            row[key] = sum(r[key] for r in same) / len(same) if known else None
        row["each seed"] = " / ".join(f"{100 * r['valid']:.1f}" for r in same)
        rows.append(row)
    return rows


def demo(reports: list[Report]) -> str:
    """Circumstances of the demos in a few sentences, then their table."""
    first = reports[0]
    for same in ("machine", "torch", "commit", "law"):
        assert all(report[same] == first[same] for report in reports), f"the reports differ in {same}"

    def spread(values: list[Any], unit: str = "") -> str:
        return (
            f"{min(values):,}{unit}"
            if min(values) == max(values)
            else f"{min(values):,}–{max(values):,}{unit}"
        )

    seeds = ", ".join(str(report["seed"]) for report in reports)
    flm, fmlm = (spread([report["steps"][stage] for report in reports]) for stage in ("flm", "fmlm"))
    minutes = spread([report["minutes"] for report in reports], " minutes")
    head = (
        f"`make demo` on {first['machine']}, torch {first['torch']}, seeds {seeds}, commit `{first['commit']}`: {flm} "
        f"steps of the FLM, {fmlm} of the FMLM, {minutes} in all. Means over the seeds, and the share of valid "
        f"stories (%) for each. Law `{first['law']['hash'][:8]}`, {first['law']['entropy']:.2f} nats a story. Parsed: "
        "the skeleton of a story is there, right or wrong. TV: mean total variation of the slots of parsed stories, "
        "and of pairs of slots, from the law; the law's own row is what as many exact samples leave to chance."
    )
    return f"{head}\n\n{markdown(mean_rows(reports), columns=[*COLUMNS[:4], 'each seed', *COLUMNS[4:]])}"


def demos() -> str:
    """The README's part, from the demos' reports."""
    paths = sorted((ROOT / "results" / "demo").glob("seed-*.json"))
    return demo([json.loads(path.read_text(encoding="utf-8")) for path in paths])


def ablation(name: str) -> str:
    """A comparison of results/ablations: its circumstances, then a table for each quality."""
    report = json.loads((ROOT / "results" / "ablations" / name / "report.json").read_text(encoding="utf-8"))
    rows = report["rows"]
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows})
    steps = {row["model"]: row["training_steps"] for row in rows}
    parts = [
        f"[`{report['command']}`](../results/ablations/{name}/README.md), {report['machine']}, "
        f"torch {report['torch']}, {first['dtype']}, seeds {', '.join(map(str, seeds))}, "
        f"{first['num']:,} passages for each; commit of the first row `{first['commit']}`. Steps of training: "
        + ", ".join(f"{model} {count:,}" for model, count in steps.items())
        + "."
    ]
    for budget in sorted({row["budget"] for row in rows}):
        for key in [*qualities(rows), *beside(rows)]:
            unit = ", %" * (key in SHARES)
            parts.append(
                f"{NAMES[key].capitalize()}{unit} by network calls, mean ± deviation over seeds; {budget:g} TFLOP of "
                f"training each:\n\n{markdown(pivot(rows, budget, key)).rstrip()}"
            )
    return "\n\n".join(parts)


def families_report() -> Report:
    """What the comparison of the families found."""
    found: Report = json.loads(REPORT.read_text(encoding="utf-8"))
    return found


def compared(report: Report) -> dict[str, Any]:
    """What the demo shows of a comparison: of its largest budget, shares of stories by model and network calls."""
    rows = report["rows"]
    budget, seeds = max(row["budget"] for row in rows), sorted({row["seed"] for row in rows})
    return {
        "command": report["command"],
        "about": f"commit {report['commit']}, on {report['machine']}, torch {report['torch']}: "
        f"{budget:g} TFLOP of training each, those of a teacher included, seeds {', '.join(map(str, seeds))}, "
        f"{rows[0]['num']:,} passages for each number of network calls, in {rows[0]['dtype']}",
        "tables": [
            {"caption": f"{NAMES[key].capitalize()}, %, by network calls", "rows": pivot(rows, budget, key)}
            for key in (VALID, PARSED)
        ],
    }


def families(report: Report) -> str:
    """The README's part on a comparison: picture, circumstances, whether the claims hold, shares of stories."""
    shown, largest = compared(report), max(row["budget"] for row in report["rows"])
    place = FAMILIES.relative_to(ROOT).as_posix()
    parts = [
        f"![Shares of stories by family, against network calls, time and entropy]({place}/{PICTURE.name})",
        f"`{shown['command']}`, {shown['about']}. [All of it]({place}/README.md).",
        "In how many seeds each claim holds, and means ± deviations of both sides:\n\n"
        + markdown(claims(report, largest)).rstrip(),
    ]
    for table in shown["tables"]:
        parts.append(
            f"{table['caption']}, mean ± deviation over seeds:\n\n{markdown(table['rows']).rstrip()}"
        )
    return "\n\n".join(part for part in parts if part)


def claims(report: Report, budget: float) -> list[dict[str, Any]]:
    """A row for each claim, a column for each quality that it was judged by."""
    out: dict[str, dict[str, Any]] = {}
    for found in report["claims"]:
        if found["budget"] == budget:
            tied = f", {found['tied']} equal" * bool(found["tied"])
            cell = f"{found['held']} of {found['seeds']}{tied} ({found['against']})"
            out.setdefault(found["claim"], {"claim": found["claim"]})[NAMES[found["by"]]] = cell
    return list(out.values())


def draw(report: Report) -> None:
    """The picture of shares of stories at the largest budget."""
    budget = max(row["budget"] for row in report["rows"])
    plot_panels(
        [panels_of(report["rows"], report["references"], budget, key) for key in (VALID, PARSED)], PICTURE
    )


#: What stands between the marks of a document, by their names.
DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demos}
    | ({"families": lambda: families(families_report())} if REPORT.exists() else {}),
    "docs/objectives.md": {"objectives": lambda: ablation("objectives")},
}


def insert(document: str, name: str, text: str) -> str:
    """A document with a measured part replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}"


def filled(name: str) -> str:
    """A document with all its measured parts as they are now."""
    document = (ROOT / name).read_text(encoding="utf-8")
    for part, text in DOCUMENTS[name].items():
        document = insert(document, part, text())
    return document


if __name__ == "__main__":
    for name in DOCUMENTS:
        (ROOT / name).write_text(filled(name), encoding="utf-8")
    if REPORT.exists():
        write_json(COMPARED, compared(families_report()))
        draw(families_report())
