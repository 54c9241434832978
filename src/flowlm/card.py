"""A model to hand on: a folder of weights, tokenizer and a card that says what it is, how it was made, how good it is.

Everything on the card comes from the run's own files and from what `flowlm evaluate` measured; a person adds the
title and the licence.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowlm import files
from flowlm.evaluation.report import calls_text, markdown, numbered, views
from flowlm.model import FlowLM, describe_data
from flowlm.provenance import ABOUT, cost_of, made, read_about, sources_of
from flowlm.trained_on import ROWS, corpus_of, save_rows

__all__ = ["CARD", "export", "save_with_card", "write_card"]

CARD = "README.md"


def export(
    run: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    title: str = "",
    licence: str = "",
    text: bool = False,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> FlowLM:
    """Write a run's model into `folder`, to be generated from, evaluated or taught from elsewhere.

    Args:
        run: a run directory.
        folder: made when missing; of an earlier export the model's files are replaced.
        dtype: of the stored weights: "float32", "bfloat16" or "int8"; they are computed with as ever.
        title, licence: for the card; whose licence it is to give depends on the data.
        text: put the tokenised text beside the model, so that it can be evaluated where the text is not.
        force: write into a folder that holds something else; files of the same names in it are replaced.
        say: where plain messages go.

    Returns:
        The model, as it will be loaded.

    Raises:
        ValueError: no model there, another dtype, a folder that is a run or holds something else, or a text that is
            not there any more.
    """
    if folder.resolve() == run.resolve():
        raise ValueError(f"{folder} is the run itself: give another folder to write the model to")
    _check_folder(folder, force)
    model = FlowLM.from_pretrained(run)
    runs = made(run)
    corpus = corpus_of(run, model, say) if text else None
    # What an earlier export says of its model is not true of this one, not even for a moment.
    model._save(folder, dtype, (ROWS, ABOUT, CARD) if (folder / ABOUT).exists() else ())
    if corpus is None:
        (folder / ROWS).unlink(missing_ok=True)
    else:
        save_rows(folder, corpus)
    if (run / "config.toml").exists():
        files.write_data(folder / "config.toml", (run / "config.toml").read_text(encoding="utf-8"))
    command = _export_command(run, folder, dtype, title, licence, text)
    _describe(model, folder, title or run.name, licence, dtype, runs, command)
    return FlowLM.from_pretrained(folder)


def save_with_card(model: FlowLM, folder: Path, name: str, *, dtype: str, licence: str = "") -> None:
    """Write a model in hand into a new folder, with a card: how it was made, if it is what a run or an export holds,
    weight for weight.

    Args:
        name: the card's title, unless an export gave it one.
        dtype, licence: as in `export`.

    Raises:
        ValueError: another dtype, or the files that say how it was made are damaged.
    """
    model.save_pretrained(folder, dtype=dtype)
    runs, title = [], ""
    if model.source is not None and model.is_as_loaded():
        source = model.source.parent
        if (source / ABOUT).exists():
            about = read_about(source)
            title, licence = about["title"], licence or about["licence"]
        runs = sources_of(str(source))
        if runs and (source / "ema.safetensors").exists() and model.source.name != "ema.safetensors":
            runs[-1] |= {"held_out": None, "chosen": None}  # which is that of the averaged weights
    _describe(model, folder, title or name, licence, dtype, runs, "")


def _describe(
    model: FlowLM,
    folder: Path,
    title: str,
    licence: str,
    dtype: str,
    runs: Sequence[Mapping[str, Any]],
    command: str,
) -> None:
    """about.json of the model that was written there, and its card."""
    about = {
        "title": title,
        "licence": licence,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "dtype": dtype,
        "bytes": sum(
            p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name not in (ABOUT, CARD, ROWS)
        ),
        "runs": runs,
        "export": command,
    }
    files.write_json(folder / ABOUT, about)
    write_card(folder)


def _check_folder(folder: Path, force: bool) -> None:
    """ValueError: the folder holds what no export made."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder to write the model to")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found and not force and ABOUT not in found:
        raise ValueError(
            f"{folder} holds what no export made ({', '.join(found[:5])}), and files of the same names would be "
            "replaced: choose another folder with --out, or write into it with --force"
        )


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


def write_card(
    folder: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    command: str = "",
    samples: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """The card of an exported model, README.md: with what was measured, where it was.

    ValueError: the folder was not made by `export` or `save_with_card`.
    """
    path = folder / ABOUT
    if not path.exists():
        raise ValueError(f"{folder} has no {ABOUT}: a card is written for what flowlm export made")
    about, data = read_about(folder), describe_data(folder)
    model = FlowLM.from_pretrained(folder)
    tags = ["flow-language-model"] * (model.denoiser.config.family == "flow")
    tags += ["one-step-generation"] * (model.family.name == "flow-map")
    front = ["---", "library_name: flowlm", f"tags: [{', '.join(['text-generation', *tags])}]"]
    front += [f"license: {about['licence']}"] * bool(about["licence"]) + ["---"]
    text = ["\n".join(front), f"# {about['title']}"]
    text.append(
        f"{model.family.label}: {model.family.writes} "
        + f"{about['parameters']:,} parameters, {about['bytes'] / 1e6:.1f} MB with weights in {about['dtype']}; "
        f"passages of {model.length} tokens, a vocabulary of {model.tokenizer.vocab_size:,}."
    )
    text.append(f"```sh\nflowlm generate FOLDER --num 5{_steps(model, about)}\n```")
    text.append("## Data\n\n" + _data_text(data, model))
    if about["runs"]:
        commands = "\n".join(filter(None, [*(r["command"] for r in about["runs"]), about["export"]]))
        text.append(f"## How it was made\n\n```sh\n{commands}\n```\n\n{cost_of(about['runs'])}.")
    else:
        text.append("## How it was made\n\nNot known: its weights are not those of a run that is kept.")
    if rows:
        tables = "\n".join(markdown(view) for view in views(rows))
        text.append(f"## How good it is\n\n{tables}\nMeasured by `{command}`. {_reading(rows)}")
    for steps, shown in (samples or {}).items():
        text += [f"## In {calls_text(steps)}", numbered(shown)]
    text.append(
        "## Limits\n\nIt knows nothing but how the passages of its data look, means nothing by what it writes, may "
        "repeat phrases of its training text, and is not to be relied on."
    )
    files.write_data(folder / CARD, "\n\n".join(text) + "\n")


def _steps(model: FlowLM, about: Mapping[str, Any]) -> str:
    """How many network calls to ask for: as many as its training showed samples in, where that is known; of some
    families the length."""
    if model.family.calls(1, model.length) == model.length:
        return ""
    if not about["runs"]:
        return f" --steps {1 if model.family.name == 'flow-map' else 64}"
    return f" --steps {about['runs'][-1]['config'].get('train', {}).get('sample_steps', 1)}"


#: What the columns of the tables mean, said where a row has them.
_READING = {
    "known": "Known words: share that the training text has; of a model that writes whole words only [PAD] is none, "
    "filling that it put between words.",
    "copied": "Copied: share of samples that stand word for word in a training passage; longest copy: words in a row, "
    "mean.",
    "self_bleu": "Self-BLEU depends on the number of samples.",
    "frechet": "Fréchet: distance of the samples from held-out passages on the scorer's features; of held-out text, of "
    "one half from the other.",
    "law": "The law of the language is known: valid is the share of stories that it can tell, and slot and pair TV are "
    "distances of what is told from how often it tells it, beside what as many exact samples leave to chance; pair "
    "coverage is how much of it is told at all, by the law's own odds.",
}


def _reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """How to read the tables of these rows."""
    said = []
    if scorer := next((row["scorer"] for row in rows if row.get("scorer") and row.get("perplexity")), None):
        ours = scorer.startswith("Kneser-Ney")
        unit = ", fitted to the training text, for each word or sign and the end" if ours else ""
        said.append(
            f"Perplexity is that of {scorer}{unit}; a low one alone is no merit, so compare with held-out text and the "
            "n-gram model's own samples, which take no network call."
        )
    said += [text for key, text in _READING.items() if any(row.get(key) is not None for row in rows)]
    said.append("In brackets: 95 % intervals over the samples.")
    return " ".join(said)


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
    if "label" in data:
        parts.append(data["label"])
    if "repository" in data:
        parts.append(f"from {data['repository']} at commit {data['commit']}")
    if "licence" in data:
        parts.append(f"licence: {data['licence']}")
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
