"""The main job: train an FLM on stories, distil the FMLM, and show what it writes in one step."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flowlm.config import RunConfig, from_dict, merge, read_toml, recipe_path, to_dict
from flowlm.data.corpora import Corpus, load_corpus
from flowlm.data.grammar import Grammar
from flowlm.device import can_compile, describe, resolve_device
from flowlm.evaluation.plots import plot_validity
from flowlm.evaluation.report import (
    Picture,
    Samples,
    Table,
    Text,
    html_report,
    table_text,
    write_json,
)
from flowlm.evaluation.runs import evaluate_run, law_reference
from flowlm.evaluation.samples import current_commit, read_samples
from flowlm.training.loop import Trainer

#: Share of the training time that goes to the FLM; the rest distils it.
FLOW_SHARE = 0.6
#: Network calls at which each model is measured.
FLOW_STEPS, MAP_STEPS = (1, 4, 16, 64), (1, 2, 4, 8)
#: What a comparison of the families found, where one was run to its end; `results/measured.py` writes it.
COMPARED = Path(__file__).with_name("compared.json")


class _Interrupted(KeyboardInterrupt):
    """The user stopped a training stage; it is saved."""


def run_demo(
    out: Path,
    *,
    minutes: float,
    seed: int = 0,
    num: int = 1000,
    device: str = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The whole job within about `minutes`; returns the report that it also writes.

    Writes out/flm and out/fmlm (run directories), out/report.json, out/report.html, out/quality.png; what an
    earlier demo left there is replaced.

    Raises:
        ValueError: minutes or num that leave nothing to do; runs in out that no demo made.
    """
    if minutes < 1:
        raise ValueError(f"--minutes {minutes}: the demo needs at least 1, and 13 to show what it is for")
    if num < 1:
        raise ValueError(f"--num {num}: measure at least one story")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the demo draws a plot: pip install "flowlm[plot]"')
    marker = out / "demo.json"
    made = ("flm", "fmlm", "report.json", "report.html", "quality.png")
    found = [name for name in made if (out / name).exists()]
    if found and not marker.exists():
        raise ValueError(
            f"{out} holds {', '.join(found)} that no demo made, and a demo would replace them: choose another --out"
        )
    write_json(marker, {"minutes": minutes, "seed": seed, "num": num})
    began = time.perf_counter()
    total = 60 * minutes
    law = Grammar()

    say("flowlm demo: learn a language of short stories, then write one in a single network call.\n")
    say(
        f"The law of the language is known: {law.entropy:.1f} nats a story, {len(law.vocabulary)} words and marks."
    )
    flow = _stage_config("grammar", seed, device, dtype)
    corpus = load_corpus(flow.data, flow.model.length, report=say)

    # Both stages are timed on a few steps, so that the plan can be told up front.
    say("How fast is this machine? Timing a few steps of both stages, half a minute …")
    pace = _pace(flow, corpus, out, say)
    evaluation = _evaluation_seconds(pace["flow"] / flow.train.batch, num)
    budget = total - (time.perf_counter() - began) - evaluation
    if budget < 0.2 * total:
        num = min(num, max(50, num // 4))
        say(f"Judging as many stories as asked would take too much of the time: {num} at each step count.")
        evaluation = _evaluation_seconds(pace["flow"] / flow.train.batch, num)
        budget = total - (time.perf_counter() - began) - evaluation
    flow_steps = max(10, int((FLOW_SHARE * budget - pace["flow start"]) / pace["flow"]))
    say(
        f"\nThe plan, {minutes:.0f} minutes on {describe(resolve_device(device))}:\n"
        f"  1. train the FLM (flow language model), {flow_steps} steps, {FLOW_SHARE * budget / 60:.1f} min\n"
        f"  2. distil it into the FMLM (flow map), {(1 - FLOW_SHARE) * budget / 60:.1f} min\n"
        f"  3. write stories with both and judge them by the law, {evaluation / 60:.1f} min\n"
    )

    say("1. FLM: learn to denoise")
    flow = dataclasses.replace(flow, train=_schedule(flow, flow_steps))
    _train(flow, out / "flm", corpus, say)

    say("\n2. FMLM: learn to jump")
    fmlm = _stage_config("grammar-fmlm", seed, device, dtype, teacher=out / "flm")
    # The second stage takes the time that is truly left: a noisy machine shifts the split, not the end.
    left = total - (time.perf_counter() - began) - evaluation - pace["flow-map start"]
    fmlm = dataclasses.replace(fmlm, train=_schedule(fmlm, max(10, int(left / pace["flow-map"]))))
    _train(fmlm, out / "fmlm", corpus, say)

    say("\n3. Judge by the law")

    def judge(name: str, steps: Sequence[int], count: int) -> list[dict[str, Any]]:
        say(f"  {name}: {count} stories in each of {', '.join(map(str, steps))} network calls")
        return evaluate_run(out / name, steps, count, seed=seed, device=device, dtype=dtype, say=say)

    rows = {
        "FLM": judge("flm", FLOW_STEPS, num),
        "FMLM": judge("fmlm", MAP_STEPS, num),
    }
    reference = law_reference(rows["FMLM"][0], seed)
    report = {
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "machine": describe(resolve_device(device)),
        "torch": torch.__version__,
        "seed": seed,
        "commit": current_commit(),
        "law": {"hash": law.hash, "entropy": law.entropy},
        "steps": {"flm": flow.train.steps, "fmlm": fmlm.train.steps},
        "seconds_per_step": pace,
        "rows": rows["FLM"] + rows["FMLM"] + [reference],
        "recipes": {"flm": to_dict(flow), "fmlm": to_dict(fmlm)},
    }
    write_json(out / "report.json", report)
    _show(out, rows, reference, report, say)
    return report


def _stage_config(recipe: str, seed: int, device: str, dtype: str, teacher: Path | None = None) -> RunConfig:
    values = {"recipe": recipe} | read_toml(recipe_path(recipe))
    if teacher is not None:
        values = merge({"data": read_toml(teacher / "config.toml")["data"]}, values) | {
            "teacher": str(teacher)
        }
    config = from_dict(RunConfig, values)
    # Compiling takes some ten seconds and gives them back within two minutes of training.
    compiled = can_compile(resolve_device(device))
    train = dataclasses.replace(config.train, seed=seed, device=device, dtype=dtype, compile=compiled)
    return dataclasses.replace(config, train=train)


def _schedule(config: RunConfig, steps: int) -> Any:
    every = max(1, -(-steps // 3))
    return dataclasses.replace(config.train, steps=steps, eval_every=every, save_every=every)


def _train(config: RunConfig, folder: Path, corpus: Corpus, say: Callable[[str], None]) -> None:
    trainer = Trainer(config, folder, say=say, corpus=corpus)
    trainer.start(force=True)
    if not trainer.train().finished or trainer.interrupted:
        raise _Interrupted


def _pace(flow: RunConfig, corpus: Corpus, out: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Seconds of a step of either stage, and of its start, on fresh weights that are thrown away."""
    pace = {}
    silent: Callable[[str], None] = lambda text: None  # noqa: E731
    trainer = Trainer(flow, out / "flm", say=silent, corpus=corpus)
    pace["flow start"], pace["flow"] = _time_steps(trainer)
    fmlm = from_dict(RunConfig, read_toml(recipe_path("grammar-fmlm")))
    trainer = Trainer(
        dataclasses.replace(flow, objective="flow-map", flow_map=fmlm.flow_map),
        out / "fmlm",
        say=silent,
        corpus=corpus,
        teacher=trainer.model.eval().requires_grad_(False),
    )
    pace["flow-map start"], pace["flow-map"] = _time_steps(trainer)
    return pace


def _time_steps(trainer: Trainer, warm: int = 3, enough: float = 8.0) -> tuple[float, float]:
    """Seconds that starting takes (compiling, above all), and seconds of a step after it."""
    taken: list[float] = []
    # Long enough that what a processor can do for a moment is not taken for what it keeps up.
    while len(taken) < warm + 12 or sum(taken[warm:]) < enough:
        start = time.perf_counter()
        trainer.optimize()
        taken.append(time.perf_counter() - start)
    # The median: another process that wakes up meanwhile is not this machine's pace.
    seconds = statistics.median(taken[warm:])
    return max(0.0, sum(taken[:warm]) - warm * seconds), seconds


def _evaluation_seconds(pace: float, num: int) -> float:
    # A forward pass costs about two fifths of a step with its backward pass; `pace` is seconds a passage.
    calls = num * (sum(FLOW_STEPS) + sum(MAP_STEPS))
    return 10 + 0.4 * pace * calls


def _show(
    out: Path,
    rows: dict[str, list[dict[str, Any]]],
    reference: dict[str, Any],
    report: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    from rich.console import Console

    seed = report["seed"]
    _, records = read_samples(out / "fmlm" / "samples" / f"nfe-0001-seed-{seed}.jsonl")
    stories = [record.text for record in records[:10]]
    say("\nTen stories, each written in one network call:\n")
    for story in stories:
        say(f"  {story}\n")
    Console().print(table_text(report["rows"]))
    picture = out / "quality.png"
    plot_validity(rows, picture, reference)
    beside: list[Text | Table] = []
    if COMPARED.exists():
        compared = json.loads(COMPARED.read_text(encoding="utf-8"))
        heading, about = (
            "Beside it, families of models on this language, at equal compute",
            f"{compared['command']}, {compared['about']}.",
        )
        say(f"\n{heading}.\n{about}\n")
        beside.append(Text(about, heading=heading))
        for table in compared["tables"]:
            own, columns = table["rows"], list(table["rows"][0])
            Console().print(table_text(own, title=table["caption"], columns=columns))
            beside.append(Table(own, caption=table["caption"], columns=columns))
    one = rows["FMLM"][0]
    summary = (
        f"In one network call, {100 * one['valid']:.1f} % of the FMLM's stories obey every rule of the language "
        f"(n = {one['num']}); the FLM it was distilled from reaches {100 * rows['FLM'][-1]['valid']:.1f} % in "
        f"{rows['FLM'][-1]['nfe']} calls. All of it took {report['minutes']:.1f} minutes on {report['machine']}."
    )
    html_report(
        out / "report.html",
        title="flowlm demo",
        sections=[
            Text(summary),
            Samples(stories, heading="Ten stories, one network call each"),
            Table(report["rows"], heading="Quality against network calls"),
            Picture(
                picture, heading="Validity and distance from the law", alt="validity against network calls"
            ),
            *beside,
        ],
    )
    say(summary)
    say(f"\nSaved: {out}/report.json, report.html, quality.png; models in {out}/flm and {out}/fmlm.")
    say(f"Write more: flowlm generate {out}/fmlm --num 5 --seed 1")
