"""From a run to rows of numbers: generate sample files, then score the files."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowlm import files
from flowlm.config import read_toml
from flowlm.data.grammar import Grammar
from flowlm.device import resolve_dtype
from flowlm.evaluation.judge import TextJudge
from flowlm.evaluation.metrics import samples_row
from flowlm.evaluation.report import markdown, views, write_json
from flowlm.evaluation.samples import (
    DEFAULT_SAMPLER,
    Header,
    Record,
    current_commit,
    read_samples,
    write_samples,
)
from flowlm.evaluation.scorers import Scorer, scored
from flowlm.model import FlowLM, describe_data
from flowlm.progress import Part, Progress
from flowlm.trained_on import corpus_of


def write_run_samples(
    model: FlowLM,
    run: Path,
    path: Path,
    num: int,
    steps: int,
    *,
    seed: int = 0,
    dtype: str = "auto",
    tick: Callable[[int], None] | None = None,
    **sampler: Any,
) -> None:
    """Generate num passages and write them as a sample file.

    Args:
        model: loaded from run.
        run: its directory, named in the header.
        path: the file.
        tick: called with the number of passages done.
        sampler: options of the family's sampler.
    """
    start = time.perf_counter()
    records: list[Record] = []
    for part in model.generate_in_parts(num, steps, seed=seed, dtype=dtype, batch=256, **sampler):
        for text, tokens in zip(part.texts, part.tokens.tolist()):
            records.append(Record(len(records), text, tokens, part.nfe, seed))
        if tick is not None:
            tick(len(records))
    seconds = time.perf_counter() - start
    used, _ = resolve_dtype(dtype, model.embedding.device)
    options = model.family.check_options(sampler)
    header = Header(
        model=model.family.label,
        recipe=_recipe(run),
        nfe=steps,
        sampler=options,
        seed=seed,
        dtype=str(used)[6:],
        commit=current_commit(),
        tokenizer=model.tokenizer.sha256,
        seconds=round(seconds, 3),
        extra={
            "corpus": model.data.get("corpus", ""),
            "law": model.data.get("law_sha256"),
            "weights": _weights(model.source),
        },
    )
    write_samples(path, header, records)


def _recipe(run: Path) -> str:
    """The recipe that a run's config.toml names; its folder's name where it names none."""
    path = run / "config.toml"
    return str(read_toml(path).get("recipe") or run.name) if path.exists() else run.name


def _weights(path: Path | None) -> str | None:
    """File and sha256 of the weights that wrote the samples: a run goes on training, its folder says nothing."""
    if path is None or not path.exists():
        return None
    return f"{path.name} {files.sha256(path)}"


def score_file(
    path: Path,
    *,
    grammar: Grammar | None = None,
    judge: TextJudge | None = None,
    scorer: Scorer | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The row of one sample file; against the grammar's law when the file names it or a grammar is given.

    Args:
        judge: by a training text; its perplexity gives way to that of a scorer.
        scorer: a causal model.
    """
    header, records = read_samples(path)
    law = header.extra.get("law")
    if grammar is None and law:
        grammar = Grammar()
        if grammar.hash != law:
            raise ValueError(
                f"{path} was written for the law {law[:12]}…, this version's is {grammar.hash[:12]}…: "
                "score it with the version of flowlm that wrote it"
            )
    texts = [record.text for record in records]
    more = judge.measure(texts) if judge is not None else {}
    if scorer is not None:
        more |= scored(scorer, texts, say)
    return samples_row(header, records, grammar, more)


def judge_of(run: Path, model: FlowLM, say: Callable[[str], None]) -> TextJudge | None:
    """The judge by a run's training text; None, and why, where that text is not known or not there any more."""
    try:
        corpus = corpus_of(run, model, say)
    except (ValueError, OSError, ImportError) as error:
        say(f"{error}: no perplexity, known words and copies are measured")
        return None
    return TextJudge(corpus, say)


def _sample_path(folder: Path, steps: int, seed: int, sampler: Mapping[str, Any]) -> Path:
    # Options that are not the default stand in the name: samples of one setting never replace another's.
    options = "".join(f"-{k}-{v}" for k, v in sorted(sampler.items()) if v != DEFAULT_SAMPLER.get(k))
    return folder / f"nfe-{steps:04d}-seed-{seed}{options}.jsonl"


def evaluate_run(
    run: Path,
    steps: Sequence[int],
    num: int,
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    folder: Path | None = None,
    by_text: bool | None = None,
    judge: TextJudge | None = None,
    scorer: Scorer | None = None,
    say: Callable[[str], None] | None = None,
    part: Part | None = None,
    **sampler: Any,
) -> list[dict[str, Any]]:
    """One row per step count: generates sample files, nfe-*.jsonl, and scores them.

    Where they are judged by the training text, rows of held-out passages and of an n-gram model's samples follow,
    unless the judge is given.

    Args:
        by_text: judge by the training text (perplexity, copies, …); None: where there is no law to judge by.
        judge: by that text, made before, for many runs on it.
        scorer: whose perplexity takes the place of the n-gram model's.
        folder: of the sample files; `run`/samples when None.
        say: where plain messages go; with it the progress is shown, in network calls of a passage.
        part: of a longer job's bar, in place of a bar of its own.
    """
    model = FlowLM.from_pretrained(run, device=device)
    lawful = model.data.get("corpus") == "grammar"
    alone = judge is None
    if judge is None and (by_text or not lawful):
        judge = judge_of(run, model, say or (lambda line: None))
    sampler = model.family.check_options(sampler)
    # An autoregressive model takes as many calls as there are tokens, whatever is asked for.
    steps = list(dict.fromkeys(model.family.calls(k, model.length) for k in steps))
    rows = []
    total = num * sum(steps)
    shown: contextlib.AbstractContextManager[Progress | Part | None] = contextlib.nullcontext()
    if part is not None:
        shown = part.of(total)
    elif say is not None:
        shown = Progress(total, 0, 0, say, label="calls")
    with shown as progress:
        before = 0
        for k in steps:
            path = _sample_path(folder or run / "samples", k, seed, sampler)

            def tick(done: int, k: int = k, before: int = before) -> None:
                if progress is not None:
                    progress.advance(before + k * done)

            write_run_samples(model, run, path, num, k, seed=seed, dtype=dtype, tick=tick, **sampler)
            before += k * num
            rows.append(score_file(path, judge=judge, scorer=scorer, say=say))
    if judge is None or not alone:
        return rows
    return rows + judge.reference_rows(num, seed + 1, Grammar() if lawful else None, scorer)


def held_out_curve(run: Path) -> list[tuple[int, float]]:
    """(step, held-out loss in nats a token) of a run, from its metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["held_out"]) for line in lines if "held_out" in line]


def shown_samples(rows: Sequence[Mapping[str, Any]], folder: Path, shown: int = 10) -> dict[int, list[str]]:
    """The first samples of each row that a model wrote, by step count."""
    own = [row for row in rows if row["nfe"]]
    paths = {row["nfe"]: _sample_path(folder, row["nfe"], row["seed"], row["sampler"]) for row in own}
    return {k: [r.text for r in read_samples(path)[1][:shown]] for k, path in paths.items()}


def write_report(
    folder: Path,
    run: Path,
    rows: Sequence[dict[str, Any]],
    command: str,
    shown: int = 10,
    samples_folder: Path | None = None,
) -> None:
    """A folder that says how good a run is: report.json and README.md, with samples at each step count.

    Args:
        folder: made when missing; its two files are replaced.
        run: the run that `evaluate_run` measured.
        rows: its rows.
        command: what to type to get this again.
        shown: samples per step count.
        samples_folder: of the sample files; `run`/samples when None.
    """
    seed = rows[0]["seed"]
    samples = shown_samples(rows, samples_folder or run / "samples", shown)
    curve, data = held_out_curve(run), describe_data(run)
    report = {
        "command": command,
        "commit": current_commit(),
        "seed": seed,
        "data": data,
        "held_out": curve,
        "rows": list(rows),
        "samples": samples,
    }
    write_json(folder / "report.json", report)
    text = [f"# {run.name}", f"`{command}`, commit {current_commit()}, seed {seed}."]
    text += [markdown(view).rstrip() for view in views(rows)]
    text.append(
        f"Data: {data.get('corpus')} sha256 {str(data.get('sha256') or data.get('law_sha256'))[:12]}, "
        f"{data.get('train')} training rows, V = {data.get('vocab_size')}, L = {data.get('length')}."
    )
    text.append("Held-out loss by step (nats a token): " + ", ".join(f"{a}: {b:.4f}" for a, b in curve) + ".")
    for k, texts in samples.items():
        text.append(f"## {k} network call{'s' if k > 1 else ''}")
        text.append("\n".join(f"{i}. {' '.join(t.split())}" for i, t in enumerate(texts, 1)))
    files.write_data(folder / "README.md", "\n\n".join(text) + "\n")
