"""What a comparison found: quality of every model at every number of network calls, and whether the claims hold."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flowlm.comparison.recipe import Claim, Comparison
from flowlm.comparison.runs import Runner
from flowlm.evaluation.plots import Panel, plot_panels
from flowlm.evaluation.report import (
    Picture,
    Row,
    Samples,
    Table,
    Text,
    calls_text,
    html_report,
    markdown,
    numbered,
    write_json,
)
from flowlm.files import write_data

__all__ = ["Verdict", "judged", "pivot", "quality", "report", "summary", "verdicts"]

PICTURE = "quality.png"

#: What is averaged over seeds.
_MEANS = (
    "valid",
    "parsed",
    "perplexity_at_data_entropy",
    "perplexity",
    "ngram_perplexity_at_data_entropy",
    "ngram_perplexity",
    "known",
    "entropy",
    "unique",
    "distinct_2",
    "self_bleu",
    "copied",
    "longest_copy",
    "slot_tv",
    "pair_tv",
    "pair_coverage",
    "frechet",
    "latency",
    "tokens_per_second",
)


def quality(rows: Sequence[Row]) -> str:
    """The key that models are ranked by: the share of valid passages where a law says so, else perplexity, at the
    entropy of the data where frontiers were measured."""
    if any(row.get("valid") is not None for row in rows):
        return "valid"
    return "perplexity_at_data_entropy" if any(row.get("frontier") for row in rows) else "perplexity"


def _groups(rows: Sequence[Row]) -> dict[tuple[float, str, int], list[Row]]:
    """By budget, model and network calls, in the order in which they come."""
    out: dict[tuple[float, str, int], list[Row]] = {}
    for row in rows:
        out.setdefault((row["budget"], row["model"], row["nfe"]), []).append(row)
    return out


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each model, budget and number of network calls: means over seeds, and deviations of the quality."""
    key = quality(rows)
    out = []
    for (budget, model, nfe), same in _groups(rows).items():
        values: dict[str, Any] = {"budget": budget, "model": model, "nfe": nfe, "seeds": len(same)}
        for name in _MEANS:
            known = [row[name] for row in same if row.get(name) is not None]
            if known:
                values[name] = statistics.fmean(known)
            if name == key and len(known) > 1:
                values[f"{name}_sd"] = statistics.stdev(known)
            if name == key and known and len(known) < len(same):
                values["reached"] = len(known)
        out.append(values)
    return out


def pivot(rows: Sequence[Row], budget: float) -> list[dict[str, Any]]:
    """The quality of one budget, a row for each model, a column for each number of network calls."""
    key = quality(rows)
    mine = [row for row in summary(rows) if row["budget"] == budget]
    calls = sorted({row["nfe"] for row in mine})
    out: dict[str, dict[str, Any]] = {}
    for row in mine:
        cells = out.setdefault(row["model"], {"model": row["model"], **{str(k): "" for k in calls}})
        cells[str(row["nfe"])] = _shown(key, row)
    return list(out.values())


def _shown(key: str, row: Row) -> str:
    value, deviation = row.get(key), row.get(f"{key}_sd")
    if value is None:
        return "not reached"
    scale = 100 if key == "valid" else 1
    spread = f" ± {scale * deviation:.1f}" if deviation is not None else ""
    part = f" ({row['reached']} of {row['seeds']})" if "reached" in row else ""
    return f"{scale * value:.1f}{spread}{part}"


class Verdict:
    """Whether a claim holds, seed by seed, at one budget.

    Args:
        claim: which.
        budget: TFLOP.
        pairs: of each seed, the quality of the one and of the other; None where it does not reach the entropy of the
            data, and is worth nothing.
        higher: whether more is better.
    """

    def __init__(
        self,
        claim: Claim,
        budget: float,
        pairs: Mapping[int, tuple[float | None, float | None]],
        *,
        higher: bool,
    ):
        self.claim, self.budget, self.pairs = claim, budget, dict(pairs)
        both = [(a, b) for a, b in pairs.values() if a is not None and b is not None]
        self.held = sum((a > b) if higher else (a < b) for a, b in both)
        self.alone = sum(a is not None and b is None for a, b in pairs.values())
        """Seeds in which the other does not reach the entropy of the data: they decide nothing."""
        self._both, self._percent = both, higher

    def __str__(self) -> str:
        claim = self.claim
        what = f"{claim.better} in {calls_text(claim.at)} above {claim.than} in {calls_text(claim.than_at)}"
        apart = f", {self.alone} not decided, as {claim.than} does not reach it" if self.alone else ""
        held = f"{what}: holds for {self.held} of {len(self.pairs)} seeds{apart}"
        if not self._both:
            return held
        means = [statistics.fmean(side) for side in zip(*self._both, strict=True)]
        one, other = (f"{100 * m:.1f} %" if self._percent else f"{m:.1f}" for m in means)
        return f"{held} ({one} against {other})"


_NAMES = {
    "valid": "valid passages",
    "perplexity": "perplexity",
    "perplexity_at_data_entropy": "perplexity at data entropy",
}


def judged(rows: Sequence[Row], entry: str, nfe: int, budget: float) -> dict[int, float]:
    """The quality of a model by seed; with several samplers, its best."""
    key = quality(rows)
    better = max if key == "valid" else min
    out: dict[int, float] = {}
    for row in rows:
        if (row["entry"], row["nfe"], row["budget"]) == (entry, nfe, budget) and row.get(key) is not None:
            value = float(row[key])
            out[row["seed"]] = better(out.get(row["seed"], value), value)
    return out


def verdicts(comparison: Comparison, rows: Sequence[Row]) -> list[Verdict]:
    """Of every claim at every budget."""
    out = []
    for budget in comparison.config.budgets:
        for claim in comparison.claims:
            mine = judged(rows, claim.better, claim.at, budget)
            theirs = judged(rows, claim.than, claim.than_at, budget)
            pairs = {seed: (mine.get(seed), theirs.get(seed)) for seed in comparison.config.seeds}
            out.append(Verdict(claim, budget, pairs, higher=quality(rows) == "valid"))
    return out


def panels(comparison: Comparison, rows: Sequence[Row], references: Sequence[Row]) -> list[list[Panel]]:
    """A row of pictures for each budget: quality against network calls, seconds for one passage, and entropy."""
    key = quality(rows)
    share, name = key == "valid", _NAMES[key]
    # the law, or held-out text
    level = next(
        (row[key] for row in references if row["model"] in ("law", "held-out") and row.get(key)), None
    )
    out = []
    for budget in comparison.config.budgets:
        groups = {k: same for k, same in _groups(rows).items() if k[0] == budget}
        models = list(dict.fromkeys(model for _, model, _ in groups))

        def lines(
            across: str, groups: Mapping[Any, list[Row]] = groups, models: Sequence[str] = models
        ) -> Any:
            return {
                model: [
                    point
                    for (_, own, _), same in sorted(groups.items(), key=lambda item: item[0][2])
                    if own == model and (point := _over_seeds(same, across, key)) is not None
                ]
                for model in models
            }

        title = f"{budget:g} TFLOP: {name}"
        times = {model: [(1000 * x, *y) for x, *y in points] for model, points in lines("latency").items()}
        out.append(
            [
                Panel(title, "calls", lines("nfe"), share=share, level=level),
                Panel(title, "milliseconds for one passage", times, share=share, spread=True, level=level),
                Panel(title, "entropy within a passage, nats", lines("entropy"), share=share, level=level),
            ]
        )
    return out


def _over_seeds(same: Sequence[Row], across: str, key: str) -> tuple[float, float, float, float] | None:
    """Where the seeds of a model lie: means, and the least and the largest quality."""
    known = [row for row in same if row.get(across) is not None and row.get(key) is not None]
    if not known:
        return None
    values = [float(row[key]) for row in known]
    return statistics.fmean(row[across] for row in known), statistics.fmean(values), min(values), max(values)


def report(runner: Runner, command: str) -> None:
    """Run a comparison to its end, and write what it found into its folder.

    That is report.json, README.md, report.html and a picture.

    Args:
        command: what to type to get this again.

    Raises:
        Interrupted, ValueError, TrainingError: as of `Runner.run`.
    """
    folder, comparison = runner.out, runner.comparison
    rows = runner.run()
    references, rates = runner.references(), runner.rates
    found, compare = verdicts(comparison, rows), comparison.config
    write_json(
        folder / "report.json",
        {
            "title": comparison.title,
            "command": command,
            "commit": runner.commit,
            "data": runner.texts(),
            "rates": rates,
            "claims": [
                {"text": str(v), "budget": v.budget, "held": v.held, "seeds": len(v.pairs)} for v in found
            ],
            "rows": rows,
            "references": references,
        },
    )
    plot_panels(panels(comparison, rows, references), folder / PICTURE)
    sources = ", ".join(f"{text['corpus']} sha256 {text['sha256'][:12]}" for text in runner.texts())
    unit = _NAMES[quality(rows)] + ", %" * (quality(rows) == "valid")
    about = (
        f"`{command}`, commit {runner.commit}. Seeds {', '.join(map(str, compare.seeds))}; {compare.num} passages a "
        f"row; learning rates times "
        + ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
        + f", chosen with seed {compare.search_seed} at {min(compare.budgets):g} TFLOP. Of a student's budget "
        f"{100 * compare.share:.0f} % went to its teacher. Text: {sources}."
    )
    shown = "Quality against network calls, milliseconds for one passage, and entropy; bands over seeds."
    lines = [f"# {comparison.title}", about, f"![{shown}]({PICTURE})", shown]
    sections: list[Any] = [Text(about.replace("`", "")), Picture(folder / PICTURE, caption=shown)]
    for budget in compare.budgets:
        heading = f"{budget:g} TFLOP of training each"
        table, claims = pivot(rows, budget), [str(v) for v in found if v.budget == budget]
        caption = f"By number of network calls: {unit}, mean ± deviation over seeds."
        lines += [
            f"## {heading}",
            markdown(table).rstrip(),
            caption,
            "\n".join(f"- {claim}." for claim in claims),
        ]
        sections += [
            Table(table, heading=heading, caption=caption),
            Text("\n\n".join(c + "." for c in claims)),
        ]
    full = summary(rows)
    lines += ["## All that was measured", markdown(full, columns=_columns(full)).rstrip()]
    sections.append(Table(full, heading="All that was measured", columns=_columns(full)))
    if references:
        lines += ["## What is no model", markdown(references).rstrip()]
        sections.append(Table(references, heading="What is no model"))
    for heading, texts in runner.samples(rows).items():
        lines += [f"## {heading}", numbered(texts)]
        sections.append(Samples(texts, heading=heading))
    write_data(folder / "README.md", "\n\n".join(line for line in lines if line) + "\n")
    html_report(folder / "report.html", title=comparison.title or "Comparison", sections=sections)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
