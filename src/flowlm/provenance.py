"""How a model came to be: the commands that make it again, what they took, on what machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowlm.config import (
    dotted,
    load_recipe,
    read_run_config,
    read_toml,
    recipe_path,
    resolved,
    to_dict,
)
from flowlm.families import family
from flowlm.training.checkpoint import ORIGIN

__all__ = ["ABOUT", "command_of", "cost_of", "describe_run", "made"]

#: Of an exported model, the file that says it.
ABOUT = "about.json"

#: What data, objective or source fill in: no one types it.
_FILLED = {
    "recipe",
    "teacher",
    "init",
    "model.vocab_size",
    "model.vocabulary",
    "model.family",
    "model.two_times",
    "model.head_start",
}


def command_of(run: Path) -> str:
    """What to type to make a run again: its recipe, and all that differs from it."""
    config = read_run_config(run)
    word = "distill" if config.teacher else "train"
    try:
        recipe = load_recipe(recipe_path(config.recipe)) if config.recipe else None
    except ValueError:
        recipe = None
    if recipe is None:
        return f"flowlm {word} {run / 'config.toml'}"
    mine, theirs = dotted(to_dict(config)), dotted(to_dict(recipe))
    # A student takes model and data from its teacher.
    given = ("model.", "data.") if config.teacher else ("\0",)
    options = [
        _option(name, value)
        for name, value in mine.items()
        if theirs.get(name) != value and name not in _FILLED and not name.startswith(given)
    ]
    sources = [
        f"--{name} {shlex.quote(value)}" for name in ("teacher", "init") if (value := getattr(config, name))
    ]
    return " ".join([f"flowlm {word} {config.recipe}", *sources, f"--out {shlex.quote(str(run))}", *options])


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        *section, last = flag.split(".")
        return "--" + ".".join([*section, last if value else f"no-{last}"])
    return f"--{flag} {shlex.quote(str(value))}"


def describe_run(run: Path) -> dict[str, Any]:
    """How a run was made: command, steps, passages, seconds, held-out loss, configuration; from its own files.

    ValueError: it has no config.toml, or no metrics.
    """
    config = read_run_config(run)
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} has no metrics.jsonl: it is not a run that was trained here")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # those of students are taken to a moving target
    ranks = family(config.objective).held_out_ranks
    curve = [(line["held_out"], line["step"]) for line in lines if "held_out" in line and ranks]
    # What is exported is the last checkpoint, or the one that did best.
    chosen = (min(curve) if config.train.choose == "best" else curve[-1]) if curve else None
    origin = run / ORIGIN
    return {
        "command": command_of(run),
        "objective": config.objective,
        "steps": max((line["step"] for line in lines), default=0),
        "batch": config.train.batch,
        "seed": config.train.seed,
        "seconds": round(_seconds(lines)),
        "held_out": chosen[0] if chosen else None,
        "chosen": chosen[1] if chosen else None,
        "unit": family(config.objective).unit(config),
        "config": resolved(config),
        **({"origin": json.loads(origin.read_text(encoding="utf-8"))} if origin.exists() else {}),
    }


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Of all the times a run was gone on with: each counts from 0."""
    total = before = 0.0
    for line in lines:
        now = line.get("seconds", before)
        total += now - before if now >= before else now
        before = now
    return total


def made(run: Path) -> list[dict[str, Any]]:
    """How a model came to be: its own run, after that of its teacher where that is still there."""
    if (run / ABOUT).exists():  # exported before
        return list(json.loads((run / ABOUT).read_text(encoding="utf-8"))["runs"])
    if not (run / "config.toml").exists():
        raise ValueError(f"{run} has no config.toml: it is not a run, and nothing tells how it was made")
    teacher = Path(read_toml(run / "config.toml").get("teacher", ""))
    before = made(teacher) if teacher.name and teacher.is_dir() else []
    return [*before, describe_run(run)]


def cost_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """Steps, minutes, seed, held-out loss and machine of the runs that `made` returns, a sentence."""
    return "; ".join(map(_cost, runs))


def _cost(run: Mapping[str, Any]) -> str:
    text = (
        f"{family(run['objective']).label}: {run['steps']:,} steps of {run['batch']} passages, "
        f"{run['seconds'] / 60:,.0f} minutes, seed {run['seed']}"
    )
    if run["held_out"] is not None:
        text += f", held-out loss {run['held_out']:.4f} {run['unit']}"
        if run["chosen"] != run["steps"]:
            text += f" at step {run['chosen']:,}, whose weights these are"
    if (origin := run.get("origin")) is not None:
        text += f", on {origin['machine']} in {origin['dtype']}, torch {origin['torch']}, commit `{origin['commit']}`"
    return text
