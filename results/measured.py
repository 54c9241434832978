"""Writes the measured part of the README from results/demo/report.json: python results/measured.py."""

from __future__ import annotations

import json
from pathlib import Path

from flowlm.evaluation.report import markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
COLUMNS = (
    "model",
    "nfe",
    "num",
    "valid",
    "parsed",
    "nll_per_token",
    "entropy",
    "unique",
    "slot_tv",
    "pair_tv",
)


def measured(report: dict) -> str:
    """The section's text: circumstances in a sentence, then the table."""
    steps = report["steps"]
    head = (
        f"`make demo` on {report['machine']}, torch {report['torch']}, seed {report['seed']}, commit "
        f"`{report['commit']}`: {steps['flm']} steps of the FLM, {steps['fmlm']} of the FMLM, {report['minutes']} "
        f"minutes in all. Law `{report['law']['hash'][:8]}`, {report['law']['entropy']:.2f} nats a story. Parsed: the "
        "skeleton of a story is there, right or wrong. TV: mean total variation of the slots of parsed stories, and of "
        "pairs of slots, from the law; the law's own row is what as many exact samples leave to chance."
    )
    return f"{head}\n\n{markdown(report['rows'], columns=COLUMNS)}"


def insert(readme: str, text: str) -> str:
    """The README with its measured part replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    report = json.loads((ROOT / "results" / "demo" / "report.json").read_text(encoding="utf-8"))
    path.write_text(insert(path.read_text(encoding="utf-8"), measured(report)), encoding="utf-8")
