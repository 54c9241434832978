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
from flowlm.model import describe_data
from flowlm.training.checkpoint import ORIGIN, read_metrics

__all__ = ["ABOUT", "SOURCES", "command_of", "cost_of", "describe_run", "made", "read_about", "sources_of"]

#: Of an exported model, the file that says it.
ABOUT = "about.json"
#: In origin.json of a run, how its teacher or start was made: that folder may be gone, or be another run's, later.
SOURCES = "sources"

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
        path = recipe_path(config.recipe)
        recipe, own = load_recipe(path, config.data.corpus), load_recipe(path).data.corpus
    except ValueError:  # it had none, or one that is not there any more
        return f"flowlm {word} {run / 'config.toml'}"
    mine, theirs = dotted(to_dict(config)), dotted(to_dict(recipe))
    theirs["data.corpus"] = own  # which is an option where it is another one
    if config.teacher:  # of which a student takes the model, and the data unless others are given
        teacher: dict[str, Any] = next(reversed(_sources(run)), {"config": {}})
        theirs |= dotted({"data": teacher["config"].get("data", {})})
        same_text = teacher.get("text", _text(run)) == _text(run)
        taken = ("model.", "data.path") if same_text else ("model.",)
        mine = {name: value for name, value in mine.items() if not name.startswith(taken)}
    options = [
        _option(name, value)
        for name, value in mine.items()
        if theirs.get(name) != value and name not in _FILLED
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
    """How a run was made: command, steps, passages, seconds, held-out loss, text, configuration; from its own files.

    ValueError: it has no config.toml, or no metrics, or they are damaged.
    """
    config = read_run_config(run)
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} has no metrics.jsonl: it is not a run that was trained here")
    lines = read_metrics(path)
    # those of students are taken to a moving target
    ranks = family(config.objective).held_out_ranks
    curve = [(line["held_out"], line["step"]) for line in lines if "held_out" in line and ranks]
    # What is exported is the last checkpoint, or the one that did best.
    chosen = (min(curve) if config.train.choose == "best" else curve[-1]) if curve else None
    origin = {name: value for name, value in _origin(run).items() if name != SOURCES}
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
        "text": _text(run),
        "config": resolved(config),
        **({"origin": origin} if origin else {}),
    }


def _text(run: Path) -> str | None:
    """sha256 of what a run learned from."""
    data = describe_data(run)
    return data.get("sha256") or data.get("law_sha256")


def _origin(run: Path) -> dict[str, Any]:
    return _read(run / ORIGIN, {}) if (run / ORIGIN).exists() else {}


def _read(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with at least the keys of `like`, each of its kind. ValueError: the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or make the folder again") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(k), type(v)) for k, v in like.items()):
        raise ValueError(
            f"{path} is damaged: it lacks {', '.join(like) or 'an object'}; make the folder again"
        )
    return found


def read_about(folder: Path) -> dict[str, Any]:
    """about.json of an exported model. ValueError: it is damaged."""
    return _read(
        folder / ABOUT,
        {"title": "", "licence": "", "parameters": 0, "dtype": "", "bytes": 0, "runs": [], "export": ""},
    )


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Of all the times a run was gone on with: each counts from 0."""
    total = before = 0.0
    for line in lines:
        now = line.get("seconds", before)
        total += now - before if now >= before else now
        before = now
    return total


def made(run: Path) -> list[dict[str, Any]]:
    """How a model came to be: its own run, after those of what it learned or started from.

    ValueError: it is not a run, or its files are damaged.
    """
    if (run / ABOUT).exists():  # exported before
        return list(read_about(run)["runs"])
    if not (run / "config.toml").exists():
        raise ValueError(f"{run} has no config.toml: it is not a run, and nothing tells how it was made")
    return [*_sources(run), describe_run(run)]


def _sources(run: Path) -> list[dict[str, Any]]:
    """How a run's teacher, or what it started from, was made: as it was when the run began."""
    if (kept := _origin(run).get(SOURCES)) is not None:
        return list(kept)
    # Of runs that kept nothing of it, what is there now.
    return sources_of(read_toml(run / "config.toml").get("teacher", ""))


def sources_of(source: str) -> list[dict[str, Any]]:
    """How the model in a folder, a teacher or a start, was made; empty where nothing tells."""
    folder = Path(source)
    if not source or not ((folder / ABOUT).exists() or (folder / "metrics.jsonl").exists()):
        return []
    return made(folder)


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
            best = run["config"]["train"]["choose"] == "best"
            text += f" at step {run['chosen']:,}" + ", whose weights these are" * best
    if (origin := run.get("origin")) is not None:
        text += f", on {origin['machine']} in {origin['dtype']}, torch {origin['torch']}, commit `{origin['commit']}`"
    return text
