"""From a run to rows of numbers: generate sample files, then score the files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowlm.data.grammar import Grammar
from flowlm.device import resolve_dtype
from flowlm.evaluation.metrics import samples_row
from flowlm.evaluation.samples import Header, Record, current_commit, read_samples, write_samples
from flowlm.model import FlowLM


def describe_data(folder: Path) -> dict[str, Any]:
    """data.json of a run; empty for a model saved without one."""
    path = folder / "data.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
        sampler: gamma, prior_scale, temperature, last.
    """
    data = describe_data(run)
    start = time.perf_counter()
    records: list[Record] = []
    for part in model.generate_in_parts(num, steps, seed=seed, dtype=dtype, batch=256, **sampler):
        for text, tokens in zip(part.texts, part.tokens.tolist()):
            records.append(Record(len(records), text, tokens, part.nfe, seed))
        if tick is not None:
            tick(len(records))
    seconds = time.perf_counter() - start
    used, _ = resolve_dtype(dtype, model.embedding.device)
    options = {"gamma": 0.0, "prior_scale": 1.0, "temperature": 1.0, "last": "argmax"} | sampler
    header = Header(
        model="FMLM" if model.denoiser.config.two_times else "FLM",
        recipe=run.name,
        nfe=steps,
        sampler=options,
        seed=seed,
        dtype=str(used)[6:],
        commit=current_commit(),
        tokenizer=model.tokenizer.sha256,
        seconds=round(seconds, 3),
        extra={"corpus": data.get("corpus", ""), "law": data.get("law_sha256")},
    )
    write_samples(path, header, records)


def score_file(path: Path, *, grammar: Grammar | None = None) -> dict[str, Any]:
    """The row of one sample file; against the grammar's law when the file names it or a grammar is given."""
    header, records = read_samples(path)
    law = header.extra.get("law")
    if grammar is None and law:
        grammar = Grammar()
        if grammar.hash != law:
            raise ValueError(
                f"{path} was written for the law {law[:12]}…, this version's is {grammar.hash[:12]}…: "
                "score it with the version of flowlm that wrote it"
            )
    return samples_row(header, records, grammar)


def evaluate_run(
    run: Path,
    steps: Sequence[int],
    num: int,
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tick: Callable[[int, int], None] | None = None,
    **sampler: Any,
) -> list[dict[str, Any]]:
    """One row per step count: generates `run`/samples/nfe-*.jsonl and scores these files.

    Args:
        tick: called with (step count, passages done).
    """
    model = FlowLM.from_pretrained(run, device=device)
    rows = []
    for k in steps:
        path = run / "samples" / f"nfe-{k:04d}-seed-{seed}.jsonl"
        inner = None if tick is None else (lambda done, k=k: tick(k, done))
        write_run_samples(model, run, path, num, k, seed=seed, dtype=dtype, tick=inner, **sampler)
        rows.append(score_file(path))
    return rows
