"""What a comparison found: quality of every model at every number of network calls, and whether the claims hold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowlm.comparison.recipe import Claim, Comparison
from flowlm.comparison.runs import Runner
from flowlm.device import describe, resolve_device
from flowlm.evaluation.oracle import EVEN
from flowlm.evaluation.plots import Panel, level_of, panels_across, plot_frontier, plot_panels
from flowlm.evaluation.report import (
    NOT_REACHED,
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

__all__ = [
    "Verdict",
    "check_former",
    "judged",
    "panels_of",
    "pivot",
    "qualities",
    "remarks",
    "report",
    "summary",
    "verdicts",
]

PICTURE, REPORT = "quality.png", "report.json"

#: What is averaged over seeds.
_MEANS = (
    "valid",
    "parsed",
    "perplexity_at_data_entropy",
    "perplexity",
    "ngram_perplexity_at_data_entropy",
    "self_bleu_at_data_entropy",
    "ngram_perplexity",
    "known",
    "entropy",
    "unique",
    "distinct_2",
    "self_bleu",
    "copied",
    "longest_copy",
    "slot_tv_even",
    "pair_tv_even",
    "slot_tv",
    "pair_tv",
    "pair_coverage",
    "passage_nats",
    "frechet",
    "latency",
    "tokens_per_second",
)
#: What a row's numbers depend on, the same for all its seeds.
_CIRCUMSTANCES = ("num", "dtype", "parameters", "training_steps", "scorer", "commit")


VALID, AT_ENTROPY, PLAIN = "valid", "perplexity_at_data_entropy", "perplexity"
NGRAM_AT_ENTROPY, ALIKE = "ngram_perplexity_at_data_entropy", "self_bleu_at_data_entropy"
#: Where the best of a sampler's curves passes the entropy of the data, under the scorer and under the n-gram model, and
#: how much alike its samples are there.
TURNED = (AT_ENTROPY, NGRAM_AT_ENTROPY, ALIKE)
PARSED, NGRAM, ENTROPY = "parsed", "ngram_perplexity", "entropy"
SHARES = (VALID, PARSED)
#: Distances from a law: of the slots of passages, and of pairs of slots, which show who always tells the same. Of as
#: many passages for all: the fewer there are, the farther chance alone puts them.
DISTANCES = ("slot_tv_even", "pair_tv_even")


def qualities(rows: Sequence[Row]) -> list[str]:
    """The keys that models are ranked by: the share of valid passages and the distances of what they say where a law
    tells; perplexity at the entropy of the data where frontiers were measured, under the scorer and beside it under the
    n-gram model; perplexity by itself where there is neither."""
    lawful = any(row.get(VALID) is not None for row in rows)
    turned = [row for row in rows if row.get("frontier")]
    by_two = any(row.get(NGRAM_AT_ENTROPY) not in (None, row.get(AT_ENTROPY)) for row in turned)
    apart = [key for key in DISTANCES if any(key in row for row in rows)]
    found = [VALID, *apart] * lawful + [AT_ENTROPY] * bool(turned) + [NGRAM_AT_ENTROPY] * by_two
    return found or [PLAIN]


def beside(rows: Sequence[Row]) -> list[str]:
    """What ranks nothing and is shown too: of a law, the share of passages that can be read as one of its own, right or
    wrong, which distances are measured of, and perplexity, which says something of the others; and entropy, by which
    what is too sure of itself is seen, or not sure enough. Where frontiers were measured, how much alike samples are at
    the entropy of the data."""
    lawful = any(row.get(VALID) is not None for row in rows)
    turned = any(row.get("frontier") for row in rows)
    return [PARSED, NGRAM] * lawful + [ENTROPY] + [ALIKE] * turned


def _asked(rows: Sequence[Row], key: str) -> list[Row]:
    """Of the rows those where this was measured, whatever came out."""
    return [row for row in rows if key not in TURNED or row.get("frontier")]


def _groups(rows: Sequence[Row]) -> dict[tuple[float, str, int], list[Row]]:
    """By budget, model and network calls, in the order in which they come."""
    out: dict[tuple[float, str, int], list[Row]] = {}
    for row in rows:
        out.setdefault((row["budget"], row["model"], row["nfe"]), []).append(row)
    return out


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each model, budget and number of network calls: means over seeds, deviations of the qualities, and
    what the numbers depend on."""
    keys = qualities(rows)
    out = []
    for (budget, model, nfe), same in _groups(rows).items():
        values: dict[str, Any] = {"budget": budget, "model": model, "nfe": nfe, "seeds": len(same)}
        for name in _MEANS:
            known = [value for row in same if (value := row.get(name)) is not None]
            if known:
                values[name] = _typical(name, known)
            if name in keys:
                if len(known) > 1:
                    values[f"{name}_sd"] = statistics.stdev(known)
                if name == AT_ENTROPY and len(known) < len(_asked(same, name)):
                    values["reached"] = len(known)
                    values.setdefault(name, NOT_REACHED)
        if same[0].get("sampler"):
            values["sampler"] = ", ".join(f"{name} {value}" for name, value in same[0]["sampler"].items())
        for name in _CIRCUMSTANCES:
            if (value := same[0].get(name)) is not None:
                values[name] = value
        out.append(values)
    return out


def pivot(rows: Sequence[Row], budget: float, key: str) -> list[dict[str, Any]]:
    """One quality at one budget, a row for each model, a column for each number of network calls."""
    groups = {
        k: found for k, same in _groups(rows).items() if k[0] == budget and (found := _asked(same, key))
    }
    calls = sorted({nfe for _, _, nfe in groups})
    out: dict[str, dict[str, Any]] = {}
    for (_, model, nfe), same in groups.items():
        cells = out.setdefault(model, {"model": model, **{str(k): "" for k in calls}})
        cells[str(nfe)] = _shown(key, [row.get(key) for row in same])
    return list(out.values())


def _shown(key: str, values: Sequence[float | None]) -> str:
    """Mean ± deviation over seeds, and how many of them reach it."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_REACHED if key in TURNED else "not judged"
    scale, digits = (100, 1) if key in SHARES else (1, 3 if key in (*DISTANCES, ENTROPY, ALIKE) else 1)
    spread = f" ± {scale * statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    part = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{scale * statistics.fmean(known):.{digits}f}{spread}{part}"


class Verdict:
    """Whether a claim holds, seed by seed, at one budget and by one quality.

    Args:
        claim: which.
        budget: TFLOP.
        key: the quality.
        pairs: of each seed, the quality of the one and of the other; None where it does not reach the entropy of the
            data, and is worth nothing, or where too few of its passages can be read for a distance, and nothing is
            known.
    """

    def __init__(
        self,
        claim: Claim,
        budget: float,
        key: str,
        pairs: Mapping[int, tuple[float | None, float | None]],
    ):
        self.claim, self.budget, self.key, self.pairs = claim, budget, key, dict(pairs)
        both = [(a, b) for a, b in pairs.values() if a is not None and b is not None]
        self.held = sum((a > b) if key == VALID else (a < b) for a, b in both)
        self.tied = sum(a == b for a, b in both)
        """Seeds in which nothing is decided because both are equal, as where neither writes a valid passage."""
        unknown = self.key in DISTANCES
        self.undecided = {
            claim.better: sum(a is None and unknown for a, _ in pairs.values()),
            claim.than: sum(b is None and a is not None for a, b in pairs.values()),
        }
        """Of both, seeds in which nothing is decided because of it: the other does not reach the entropy of the data,
        or one of them could not be judged."""

    def __str__(self) -> str:
        why = "does not reach it" if self.key in TURNED else "could not be judged"
        apart = "".join(
            f", {count} not decided, as {model} {why}" for model, count in self.undecided.items() if count
        )
        apart += f", {self.tied} not decided, as both are equal" * bool(self.tied)
        return (
            f"{self.what}, by {NAMES[self.key]}: holds for {self.held} of {len(self.pairs)} seeds{apart} "
            f"({self.against})"
        )

    @property
    def what(self) -> str:
        """The claim in words."""
        claim = self.claim
        return f"{claim.better} in {calls_text(claim.at)} above {claim.than} in {calls_text(claim.than_at)}"

    @property
    def against(self) -> str:
        """Mean ± deviation of the one, and of the other."""
        sides = [[pair[i] for pair in self.pairs.values()] for i in (0, 1)]
        one, other = (_shown(self.key, side) + " %" * (self.key == VALID) for side in sides)
        return f"{one} against {other}"


NAMES = {
    VALID: "valid passages",
    PARSED: "passages that can be read",
    NGRAM: "perplexity under the n-gram model",
    "slot_tv_even": f"distance of slots, of {EVEN} stories that can be read",
    "pair_tv_even": f"distance of pairs, of {EVEN} stories that can be read",
    PLAIN: "perplexity",
    AT_ENTROPY: "perplexity at data entropy",
    NGRAM_AT_ENTROPY: "n-gram perplexity at data entropy",
    ALIKE: "self-BLEU at data entropy",
    ENTROPY: "entropy within a passage, nats",
}


def judged(rows: Sequence[Row], entry: str, nfe: int, budget: float, key: str) -> dict[int, float]:
    """A number of a model by seed."""
    return {
        row["seed"]: float(value)
        for row in rows
        if (row["entry"], row["nfe"], row["budget"]) == (entry, nfe, budget)
        and (value := row.get(key)) is not None
    }


def verdicts(comparison: Comparison, rows: Sequence[Row]) -> list[Verdict]:
    """Of every claim at every budget, by every quality that was measured of both."""
    out = []
    for budget in comparison.config.budgets:
        for claim in comparison.claims:
            sides = ((claim.better, claim.at), (claim.than, claim.than_at))
            for key in qualities(rows):
                there = [
                    _asked([row for row in rows if (row["entry"], row["nfe"]) == side], key) for side in sides
                ]
                if not all(there):
                    continue
                mine, theirs = (judged(rows, name, at, budget, key) for name, at in sides)
                pairs = {seed: (mine.get(seed), theirs.get(seed)) for seed in comparison.config.seeds}
                out.append(Verdict(claim, budget, key, pairs))
    return out


def remarks(
    comparison: Comparison, rows: Sequence[Row], rates: Mapping[str, float], unsearched: Mapping[str, str]
) -> list[str]:
    """What a reader of the tables has to know of single models: who diverged, whose sampler is therefore not chosen,
    and whose best learning rate was at an end of those that were tried, beyond which a better one may lie."""
    out = [
        f"{model} diverged in the run that its samplers are chosen by: it has the first of them, and no knob of it was "
        f"turned ({why})"
        for model, why in unsearched.items()
    ]
    for (budget, model, _), same in _groups(rows).items():
        for row in same:
            if "diverged" in row:
                out.append(f"{model} at {budget:g} TFLOP, seed {row['seed']}, diverged: {row['diverged']}")
    tried = comparison.config.rates
    ends = {min(tried): "least", max(tried): "largest"} if len(tried) > 1 else {}
    for model, rate in rates.items():
        if rate in ends:
            out.append(f"{model}: the {ends[rate]} of the learning rates was the best of those tried.")
    return list(dict.fromkeys(out))


def panels(comparison: Comparison, rows: Sequence[Row], references: Sequence[Row]) -> list[list[Panel]]:
    """A row of pictures for each budget and quality."""
    return [
        panels_of(rows, references, budget, key)
        for budget in comparison.config.budgets
        for key in qualities(rows)
    ]


def panels_of(rows: Sequence[Row], references: Sequence[Row], budget: float, key: str) -> list[Panel]:
    """Pictures of one quality at one budget: against network calls, seconds for one passage, and entropy."""
    groups = {k: same for k, same in _groups(rows).items() if k[0] == budget}
    models = list(dict.fromkeys(model for _, model, _ in groups))

    def lines(across: str) -> dict[str, Any]:
        return {
            model: [
                point
                for (_, own, _), same in sorted(groups.items(), key=lambda item: item[0][2])
                if own == model and (point := _over_seeds(same, across, key)) is not None
            ]
            for model in models
        }

    level = level_of(references, key)
    return panels_across(f"{budget:g} TFLOP: {NAMES[key]}", lines, share=key in SHARES, level=level)


def _over_seeds(same: Sequence[Row], across: str, key: str) -> tuple[float, float, float, float] | None:
    """Where the seeds of a model lie: means, and the least and the largest quality."""
    known = [
        (row[across], float(value))
        for row in same
        if row.get(across) is not None and (value := row.get(key)) is not None
    ]
    if not known:
        return None
    places, values = zip(*known, strict=True)
    return _typical(across, places), statistics.fmean(values), min(values), max(values)


def _typical(key: str, values: Sequence[float]) -> float:
    """Of several seeds the mean; of seconds the median, since another program may have taken some."""
    return statistics.median(values) if key == "latency" else statistics.fmean(values)


def check_former(folder: Path, command: str, force: bool = False) -> None:
    """Refuse a folder that has the report of another comparison, or of this one with other options.

    ValueError: it does, and is not forced.
    """
    try:
        former = json.loads((folder / REPORT).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if former != command and not force:
        raise ValueError(
            f"{folder} holds the report of `{former}`, which that of `{command}` would replace: choose another --out, "
            "or use --force, which leaves finished runs and rows as they are"
        )


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
    machine = describe(resolve_device(runner.device))
    write_json(
        folder / REPORT,
        {
            "title": comparison.title,
            "command": command,
            "commit": runner.commit,
            "machine": machine,
            "torch": torch.__version__,
            "data": runner.texts(),
            "rates": rates,
            "samplers": {
                entry.name: {
                    calls: entry.samplers[choice.sampler]
                    for calls, choice in runner.samplers.get(entry.name, {}).items()
                }
                for entry in comparison.entries
            },
            "knobs": {
                name: {calls: choice.knob for calls, choice in own.items() if choice.knob}
                for name, own in runner.samplers.items()
            },
            "claims": [
                {
                    "claim": v.what,
                    "by": v.key,
                    "budget": v.budget,
                    "held": v.held,
                    "tied": v.tied,
                    "seeds": len(v.pairs),
                    "against": v.against,
                    "text": str(v),
                }
                for v in found
            ],
            "settings": runner.settings(),
            "rows": rows,
            "references": references,
        },
    )
    plot_panels(panels(comparison, rows, references), folder / PICTURE)
    sources = ", ".join(f"{text['corpus']} sha256 {text['sha256'][:12]}" for text in runner.texts())
    about = (
        f"`{command}`, commit {runner.commit}, on {machine}. Seeds {', '.join(map(str, compare.seeds))}; "
        f"{compare.num} passages a row; learning rates times "
        + ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())
        + f", chosen with seed {compare.search_seed} at {min(compare.budgets):g} TFLOP, as each sampler at each number "
        f"of calls, of as many as its recipe lists, by {compare.search_num or compare.num} passages"
        + ", and the one knob that is turned towards the entropy of the data"
        * bool(compare.frontier)
        + f". Of a student's budget {100 * compare.share:.0f} % went to its teacher, and so on with that one's own. "
        f"Text: {sources}."
    )
    shown = "Quality against network calls, milliseconds for one passage, and entropy; bands over seeds."
    lines = [f"# {comparison.title}", about, f"![{shown}]({PICTURE})", shown]
    sections: list[Any] = [Text(about.replace("`", "")), Picture(folder / PICTURE, caption=shown)]
    for path, shown in _frontiers(runner, rows, references).items():
        lines += [f"![{shown}]({path.name})", shown]
        sections.append(Picture(path, caption=shown))
    for budget in compare.budgets:
        heading = f"{budget:g} TFLOP of training each"
        lines.append(f"## {heading}")
        for number, key in enumerate([*qualities(rows), *beside(rows)]):
            table = pivot(rows, budget, key)
            unit = NAMES[key] + ", %" * (key in SHARES)
            caption = f"By number of network calls: {unit}, mean ± deviation over seeds."
            lines += [markdown(table).rstrip(), caption]
            sections.append(Table(table, heading=heading if number == 0 else "", caption=caption))
        claims = [f"{v}." for v in found if v.budget == budget]
        lines.append("\n".join(f"- {claim}" for claim in claims))
        sections.append(Text("\n\n".join(claims)))
    if said := remarks(comparison, rows, rates, runner.unsearched):
        lines += ["## To keep in mind", "\n".join(f"- {remark}" for remark in said)]
        sections.append(Text("\n\n".join(said)))
    for budget in compare.budgets:
        full = summary([row for row in rows if row["budget"] == budget])
        heading = f"All that was measured, {budget:g} TFLOP"
        lines += [f"## {heading}", markdown(full, columns=_columns(full)).rstrip(), _EACH]
        sections.append(Table(full, heading=heading, columns=_columns(full), caption=_EACH))
    if references:
        lines += ["## What is no model", markdown(references).rstrip()]
        sections.append(Table(references, heading="What is no model"))
    for heading, of in runner.samples().items():
        if not of:
            continue  # all of them diverged
        lines.append(f"## {heading}, side by side")
        for model, texts in of.items():
            lines += [f"### {model}", numbered(texts)]
        each = [
            (model, text)
            for same in zip(*of.values(), strict=True)
            for model, text in zip(of, same, strict=True)
        ]
        labels, told = zip(*each, strict=True)
        sections.append(Samples(told, heading=f"{heading}, side by side", labels=labels))
    write_data(folder / "README.md", "\n\n".join(line for line in lines if line) + "\n")
    html_report(folder / "report.html", title=comparison.title or "Comparison", sections=sections)


_EACH = (
    "Means over seeds; of the seconds for one passage, medians. Each seed by itself, with 95 % bootstrap intervals "
    "over its passages, is in report.json."
)


def _frontiers(runner: Runner, rows: Sequence[Row], references: Sequence[Row]) -> dict[Path, str]:
    """Pictures of the swept curves, perplexity against entropy, of the first seed; and what each shows."""
    compare, out = runner.comparison.config, {}
    for budget in compare.budgets:
        for k in compare.frontier:
            swept = [
                row
                for row in rows
                if (row["budget"], row["seed"]) == (budget, compare.seeds[0])
                and row["nfe"] in (k, runner.calls(runner.comparison.entry(row["entry"]), k))
                and (row.get("frontier") or {}).get("curves")
            ]
            if swept:
                path = runner.out / f"frontier-{budget:g}-tflop-{k}.png"
                plot_frontier([*swept, *references], path)
                others = {row["model"]: row["nfe"] for row in swept if row["nfe"] != k}
                but = "".join(f", {model} in {calls_text(own)}" for model, own in others.items())
                out[path] = (
                    f"Perplexity against entropy in {calls_text(k)}{but}, {budget:g} TFLOP, seed {compare.seeds[0]}: "
                    "a knob of each sampler turned."
                )
    return out


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
