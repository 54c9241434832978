"""Writes what was measured into the README and docs/objectives.md, from results/: python results/measured.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowlm.comparison.report import NAMES, SHARES, beside, pivot, qualities
from flowlm.evaluation.report import markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
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


#: What stands between the marks of a document.
DOCUMENTS = {"README.md": demos, "docs/objectives.md": lambda: ablation("objectives")}


def insert(document: str, text: str) -> str:
    """A document with its measured part replaced."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name, text in DOCUMENTS.items():
        path = ROOT / name
        path.write_text(insert(path.read_text(encoding="utf-8"), text()), encoding="utf-8")
