"""A model to hand on: a folder of weights, tokenizer and a card that says what it is, how it was made, how good it is.

Everything on the card comes from the run's own files and from what `flowlm evaluate` measured; a person adds the
title and the licence.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowlm import files
from flowlm.config import RunConfig, dotted, from_dict, load_recipe, read_toml, recipe_path, to_dict
from flowlm.evaluation.report import calls_text, markdown, numbered, views
from flowlm.families import family
from flowlm.model import FlowLM, describe_data
from flowlm.trained_on import ROWS, corpus_of, save_rows
from flowlm.training.checkpoint import ORIGIN

__all__ = ["ABOUT", "CARD", "command_of", "describe_run", "export", "write_card"]

ABOUT, CARD = "about.json", "README.md"

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
    config = from_dict(RunConfig, read_toml(run / "config.toml"))
    word = "distill" if config.objective == "flow-map" else "train"
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
    """How a run was made: command, steps, passages, seconds, held-out loss; from its own files.

    ValueError: it has no config.toml, or no metrics.
    """
    config = from_dict(RunConfig, read_toml(run / "config.toml"))
    path = run / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{run} has no metrics.jsonl: it is not a run that was trained here")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # those of students are taken to a moving target
    ranks = family(config.objective).held_out_ranks
    held_out = [line["held_out"] for line in lines if "held_out" in line and ranks]
    origin = run / ORIGIN
    return {
        "command": command_of(run),
        "objective": config.objective,
        "steps": max((line["step"] for line in lines), default=0),
        "batch": config.train.batch,
        "seed": config.train.seed,
        "seconds": round(_seconds(lines)),
        "held_out": held_out[-1] if held_out else None,
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


def export(
    run: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    title: str = "",
    licence: str = "",
    text: bool = False,
    say: Callable[[str], None] | None = None,
) -> FlowLM:
    """Write a run's model into `folder`, to be generated from, evaluated or taught from elsewhere.

    Args:
        run: a run directory.
        folder: made when missing; the model's files in it are replaced.
        dtype: of the stored weights: "float32", "bfloat16" or "int8"; they are computed with as ever.
        title, licence: for the card; whose licence it is to give depends on the data.
        text: put the tokenised text beside the model, so that it can be evaluated where the text is not.
        say: where plain messages go.

    Returns:
        The model, as it will be loaded.

    Raises:
        ValueError: no model there, another dtype, a folder that is the run, or a text that is not there any more.
    """
    if folder.resolve() == run.resolve():
        raise ValueError(f"{folder} is the run itself: give another folder to write the model to")
    model = FlowLM.from_pretrained(run)
    made = _made(run)
    corpus = corpus_of(run, model, say) if text else None
    model.save_pretrained(folder, dtype=dtype)
    if corpus is None:
        (folder / ROWS).unlink(missing_ok=True)
    else:
        save_rows(folder, corpus)
    if (run / "config.toml").exists():
        files.write_data(folder / "config.toml", (run / "config.toml").read_text(encoding="utf-8"))
    about = {
        "title": title or run.name,
        "licence": licence,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "dtype": dtype,
        "bytes": sum(
            p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name not in (ABOUT, CARD, ROWS)
        ),
        "runs": made,
        "export": _export_command(run, folder, dtype, title, licence, text),
    }
    files.write_json(folder / ABOUT, about)
    write_card(folder)
    return FlowLM.from_pretrained(folder)


def _export_command(run: Path, folder: Path, dtype: str, title: str, licence: str, text: bool) -> str:
    given = {"--dtype": dtype, "--title": title, "--licence": licence}
    options = [f"{name} {shlex.quote(value)}" for name, value in given.items() if value]
    return " ".join(
        [
            "flowlm export",
            shlex.quote(str(run)),
            "--out",
            shlex.quote(str(folder)),
            *options,
            *["--text"] * text,
        ]
    )


def _made(run: Path) -> list[dict[str, Any]]:
    """How a model came to be: its own run, after that of its teacher where that is still there."""
    if (run / ABOUT).exists():  # exported before
        return list(json.loads((run / ABOUT).read_text(encoding="utf-8"))["runs"])
    if not (run / "config.toml").exists():
        raise ValueError(f"{run} has no config.toml: it is not a run, and nothing tells how it was made")
    teacher = Path(read_toml(run / "config.toml").get("teacher", ""))
    before = _made(teacher) if teacher.name and teacher.is_dir() else []
    return [*before, describe_run(run)]


def write_card(
    folder: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    command: str = "",
    samples: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """The card of an exported model, README.md: with what was measured, where it was.

    ValueError: the folder was not made by `export`.
    """
    path = folder / ABOUT
    if not path.exists():
        raise ValueError(f"{folder} has no {ABOUT}: a card is written for what flowlm export made")
    about, data = json.loads(path.read_text(encoding="utf-8")), describe_data(folder)
    model = FlowLM.from_pretrained(folder)
    front = ["---", "library_name: flowlm", "tags: [flow-language-model, one-step-generation]"]
    front += [f"license: {about['licence']}"] * bool(about["licence"]) + ["---"]
    text = ["\n".join(front), f"# {about['title']}"]
    text.append(
        f"{model.family.label}: {model.family.writes} "
        + f"{about['parameters']:,} parameters, {about['bytes'] / 1e6:.1f} MB with weights in {about['dtype']}; "
        f"passages of {model.length} tokens, a vocabulary of {model.tokenizer.vocab_size:,}."
    )
    text.append("```sh\nflowlm generate FOLDER --num 5 --steps 1\n```")
    text.append("## Data\n\n" + _data_text(data, model))
    made = "\n".join([*(r["command"] for r in about["runs"]), about["export"]])
    cost = "; ".join(
        f"{family(r['objective']).label}: {r['steps']:,} steps of {r['batch']} passages, "
        f"{r['seconds'] / 60:,.0f} minutes, seed {r['seed']}"
        + (f", held-out loss {r['held_out']:.4f} nats a token" if r["held_out"] is not None else "")
        + _origin_text(r.get("origin"))
        for r in about["runs"]
    )
    text.append(f"## How it was made\n\n```sh\n{made}\n```\n\n{cost}.")
    if rows:
        tables = "\n".join(markdown(view) for view in views(rows))
        reading = READING + LAW_READING * any(row.get("law") for row in rows)
        text.append(f"## How good it is\n\n{tables}\nMeasured by `{command}`. {reading}")
    for steps, shown in (samples or {}).items():
        text += [f"## In {calls_text(steps)}", numbered(shown)]
    text.append(
        "## Limits\n\nA small model of a narrow text. It knows nothing but how the sentences of its data look, means "
        "nothing by what it writes, and may repeat phrases of its training text. It was made to show one-step "
        "generation, not to be relied on."
    )
    files.write_data(folder / CARD, "\n\n".join(text) + "\n")


def _origin_text(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return ""
    return (
        f", on {origin['machine']} in {origin['dtype']}, torch {origin['torch']}, commit `{origin['commit']}`"
    )


READING = (
    "Perplexity is that of the n-gram model fitted to the training text, for each word or sign and the end; a low one "
    "alone is no merit, so compare with held-out text and the n-gram model's own samples, which take no network call. "
    "Known words: share that the training text has; of a model that writes whole words only [PAD] is none, filling "
    "that it put between words. Copied: share of samples that stand word for word in a training passage; longest copy: "
    "words in a row, mean. Self-BLEU depends on the number of samples. In brackets: 95 % intervals over the samples."
)

LAW_READING = (
    " The law of the language is known: valid is the share of stories that it can tell, and slot and pair TV are "
    "distances of what is told from how often it tells it, beside what as many exact samples leave to chance; pair "
    "coverage is how much of it is told at all, by the law's own odds."
)


def _data_text(data: Mapping[str, Any], model: FlowLM) -> str:
    if not data:
        return "Not known."
    parts = [f"`{data.get('corpus')}`, sha256 `{data.get('sha256') or data.get('law_sha256')}`"]
    if "law_sha256" in data:
        parts[0] += " of its law: stories that flowlm draws itself, by rules and odds of its own"
    if "versions" in data:
        parts.append(
            "made of " + ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        )
    if "licences" in data:
        parts.append(
            "licences: " + ", ".join(f"{name} {licence}" for name, licence in data["licences"].items())
        )
    parts.append(f"{data.get('train', 0):,} training and {data.get('held_out', 0):,} held-out rows")
    if data.get("dropped_unknown"):
        parts.append(f"{data['dropped_unknown']:,} passages with words outside the vocabulary left out")
    parts.append(
        f"tokens: {model.tokenizer.kind}" + (f" ({losses})" if (losses := model.tokenizer.losses) else "")
    )
    return "; ".join(parts) + "."
