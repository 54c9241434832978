"""From a run to rows of numbers: generate sample files, then score the files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowlm.config import read_run_config, read_toml
from flowlm.data.corpora import DataConfig, load_corpus
from flowlm.data.grammar import Grammar
from flowlm.denoiser import DenoiserConfig
from flowlm.device import keep_freed_memory, resolve_dtype
from flowlm.evaluation.diversity import entropies, self_bleu
from flowlm.evaluation.frontier import Texts, best, passing_interval, settings
from flowlm.evaluation.judge import TextJudge
from flowlm.evaluation.metrics import law_row, merged, passage, samples_row, words
from flowlm.evaluation.samples import (
    DEFAULT_SAMPLER,
    Header,
    Record,
    current_commit,
    read_samples,
    write_samples,
)
from flowlm.evaluation.scorers import Scorer, distance, feature_texts, score_texts, scored
from flowlm.families import Family, family
from flowlm.model import FlowLM
from flowlm.progress import Part, Progress
from flowlm.provenance import describe_run
from flowlm.rng import key
from flowlm.trained_on import corpus_of
from flowlm.training.checkpoint import read_metrics

FEW = 100
"""Samples below which it is said that they are few."""
SHOWN = 10
"""Samples of a row that are shown."""
LONGEST = 1024
"""Words of a passage of a text that a sample file is judged by, at most."""
Features = NDArray[np.float64]


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
    timed: bool = False,
    **sampler: Any,
) -> None:
    """Generate num passages and write them as a sample file.

    Args:
        model: loaded from run.
        run: its directory, named in the header.
        path: the file.
        tick: called with the number of passages done.
        timed: also take the seconds of one passage by itself, ``latency`` of the header's extra.
        sampler: options of the family's sampler.
    """
    keep_freed_memory()
    start = time.perf_counter()
    records: list[Record] = []
    for part in model.generate_in_parts(num, steps, seed=seed, dtype=dtype, batch=256, **sampler):
        for text, tokens in zip(part.texts, part.tokens.tolist()):
            records.append(Record(len(records), text, tokens, part.nfe, seed))
        if tick is not None:
            tick(len(records))
    seconds = time.perf_counter() - start
    header = _header(model, run, steps, seed, dtype, sampler)
    extra = {"latency": _latency(model, steps, seed, dtype, sampler)} if timed else {}
    header = dataclasses.replace(header, seconds=round(seconds, 3), extra=header.extra | extra)
    write_samples(path, header, records)


def _latency(model: FlowLM, steps: int, seed: int, dtype: str, sampler: Mapping[str, Any]) -> float:
    """Seconds for one passage by itself: the median of five, after one that is not timed."""
    taken = []
    for i in range(6):
        start = time.perf_counter()
        model.generate(1, steps, seed=seed, first=i, dtype=dtype, **sampler)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken[1:]), 6)


def _header(
    model: FlowLM, run: Path, steps: int, seed: int, dtype: str, sampler: Mapping[str, Any]
) -> Header:
    """Of samples that are made now."""
    used, _ = resolve_dtype(dtype, model.embedding.device)
    return Header(
        model=model.family.label,
        recipe=_recipe(run),
        nfe=model.family.calls(steps, model.length),
        sampler=model.family.check_options(sampler),
        seed=seed,
        dtype=str(used)[6:],
        commit=current_commit(),
        tokenizer=model.tokenizer.sha256,
        extra={
            "corpus": model.data.get("corpus", ""),
            "law": model.data.get("law_sha256"),
            "weights": model.weights,
        },
    )


def _recipe(run: Path) -> str:
    """The recipe that a run's config.toml names; its folder's name where it names none."""
    path = run / "config.toml"
    return str(read_toml(path).get("recipe") or run.name) if path.exists() else run.name


def score_file(
    path: Path,
    *,
    grammar: Grammar | None = None,
    judge: TextJudge | None = None,
    scorer: Scorer | None = None,
    reference: Features | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The row of one sample file; against the grammar's law when the file names it or a grammar is given.

    Args:
        judge: by a training text; its perplexity gives way to that of a scorer.
        scorer: a causal model.
        reference: its features of the passages whose distance is taken.
        say: told what makes the numbers weak: few texts, empty ones, cut ones.

    Raises:
        ValueError: no sample file, one of another law, or one whose texts are all empty.
    """
    header, records = read_samples(path)
    if records and not any(passage(record.text) for record in records):
        raise ValueError(
            f"{path}: all {len(records):,} texts are empty: there is nothing to measure; look at what wrote them"
        )
    return _score(path, header, records, grammar, judge, scorer, reference, say)


def evaluate_file(
    path: Path,
    *,
    text: str = "",
    scorer: Scorer | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """The row of a sample file, whoever wrote it; with a text also those of held-out passages of it and of its n-gram
    model's samples, as many as the file has.

    Args:
        text: to judge by: a file or folder of text, a passage a line, or a run, whose text it is then.
        scorer: a causal model.
        seed: of what the file is compared with.
        say: as of `score_file`.

    Raises:
        ValueError: as of `score_file`, or no such text.
    """
    if not text:
        return [score_file(path, scorer=scorer, say=say)]
    num = len(read_samples(path)[1])  # what is wrong with it is told before the text is read
    judge, reference = _judge_by(Path(text), say), None
    if scorer is not None:
        reference = feature_texts(scorer, [passage(own) for own in judge.halves(num, seed + 1)[1]])
    row = score_file(path, judge=judge, scorer=scorer, reference=reference, say=say)
    grammar = Grammar() if row["law"] else None
    return [row, *judge.reference_rows(num, seed + 1, grammar, scorer, reference)]


def _judge_by(text: Path, say: Callable[[str], None] | None) -> TextJudge:
    """The judge by the text of a run, or by a text as it lies there. ValueError: it is neither."""
    if (text / "config.json").exists():
        return TextJudge(corpus_of(text, FlowLM.from_pretrained(text, device="cpu"), say), say)
    return TextJudge(
        load_corpus(DataConfig(corpus="text", path=str(text)), LONGEST, report=say, counts=False), say
    )


def _score(
    path: Path,
    header: Header,
    records: Sequence[Record],
    grammar: Grammar | None,
    judge: TextJudge | None,
    scorer: Scorer | None,
    reference: Features | None,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    law = header.extra.get("law")
    if grammar is None and law:
        grammar = Grammar()
        if grammar.hash != law:
            raise ValueError(
                f"{path} was written for the law {law[:12]}…, this version's is {grammar.hash[:12]}…: "
                "score it with the version of flowlm that wrote it"
            )
    texts = [record.text for record in records]
    if say is not None:
        for warning in _warnings(texts):
            say(f"{path.name}: {warning}")
    if judge is not None:
        more = judge.measure(texts)
    else:
        # Of stories the law says more, and sooner.
        alike = grammar is None and len(texts) > 1
        more = {"self_bleu": self_bleu([words(passage(text)) for text in texts])} if alike else {}
    if scorer is not None:
        more = merged(more, scored(scorer, texts, say))
        if reference is not None:
            more |= distance(scorer, texts, reference)
    return samples_row(header, records, grammar, more)


def _warnings(texts: Sequence[str]) -> list[str]:
    """What makes the numbers of texts weak."""
    found = []
    if len(texts) < FEW:
        found.append(
            f"{len(texts)} samples are few, and what they say is loose: take {FEW} at least, better 1,000"
        )
    empty = sum(not passage(text) for text in texts)
    if empty:
        found.append(
            f"{empty:,} of {len(texts):,} texts are empty: they count as passages with nothing in them, and lower the "
            "entropy"
        )
    return found


def judge_of(run: Path, model: FlowLM, say: Callable[[str], None], text: str = "") -> TextJudge | None:
    """The judge by a run's training text; None, and why, where that text is not known or not there any more.

    Args:
        text: where it is now, if it has moved; there it must be.
    """
    try:
        corpus = corpus_of(run, model, say, text)
    except (ValueError, OSError, ImportError) as error:
        if text:
            raise
        say(f"{error}: no perplexity, known words and copies are measured")
        return None
    return TextJudge(corpus, say)


def _sample_path(folder: Path, steps: int, seed: int, sampler: Mapping[str, Any]) -> Path:
    # Options that are not the default stand in the name: samples of one setting of the sampler never replace another's;
    # another number of them does, or another dtype.
    options = "".join(f"-{k}-{v}" for k, v in sorted(sampler.items()) if v != DEFAULT_SAMPLER.get(k))
    return folder / f"nfe-{steps:04d}-seed-{seed}{options}.jsonl"


def _is_written(path: Path, like: Header, num: int, timed: bool) -> bool:
    """Whether a sample file of the same weights and settings is there already, with its latency if that is asked."""
    try:
        header, records = read_samples(path)
    except (OSError, ValueError):
        return False
    same = ("model", "nfe", "sampler", "seed", "dtype", "tokenizer")
    return (
        len(records) == num
        and ("latency" in header.extra or not timed)
        and all(getattr(header, name) == getattr(like, name) for name in same)
        and header.extra.get("weights") is not None
        and header.extra.get("weights") == like.extra["weights"]
    )


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
    text: str = "",
    judge: TextJudge | None = None,
    scorer: Scorer | None = None,
    frontier: Sequence[int] = (),
    knobs: Mapping[int, str] | None = None,
    reuse: bool | None = None,
    references: bool = True,
    timed: bool = True,
    say: Callable[[str], None] | None = None,
    part: Part | None = None,
    **sampler: Any,
) -> list[dict[str, Any]]:
    """One row per step count: generates sample files, nfe-*.jsonl, and scores them.

    Where they are judged by the training text, rows of held-out passages and of an n-gram model's samples follow.

    Args:
        by_text: judge by the training text (perplexity, copies, …); None: where there is no law to judge by, and for
            a frontier.
        text: where the training text is now, if it has moved.
        judge: by that text, made before, for many runs on it.
        scorer: whose perplexity takes the place of the n-gram model's, and whose features the Fréchet distance.
        folder: of the sample files; `run`/samples when None.
        frontier: of `steps`, those at which to turn each knob of the family's sampler by itself, and to add
            ``frontier`` (the curves) and ``perplexity_at_data_entropy``.
        knobs: of network calls, the one knob to turn there; None: each of them.
        reuse: sample files of the same weights and settings are read and not written again, so that what was
            interrupted goes on; None: with a frontier.
        references: whether the rows of what is no model are wanted.
        timed: whether the seconds of one passage by itself are.
        say: where plain messages go; with it the progress is shown, in network calls of a passage.
        part: of a longer job's bar, in place of a bar of its own.

    Raises:
        ValueError: no run, options its sampler does not have, or a frontier without the text of the run.
    """
    model = FlowLM.from_pretrained(run, device=device)
    folder = folder or run / "samples"
    lawful = model.data.get("corpus") == "grammar"
    if by_text is None:
        by_text = bool(frontier) or not lawful
    if judge is None and by_text:
        judge = judge_of(run, model, say or (lambda line: None), text)
    if frontier and judge is None:
        raise ValueError(
            f"a frontier is measured at the entropy of held-out text, and that of {run} is not there: bring the text "
            "back, or export the run with --text"
        )
    options = model.family.check_options(sampler)
    # By network calls, in which rows are told, the steps to ask for: an autoregressive model takes as many calls as
    # there are tokens whatever is asked for, a flow with its correction two a step.
    ask: dict[int, int] = {}
    for k in steps:
        ask.setdefault(model.family.calls(k, model.length), k)
    steps = list(ask)
    reuse = bool(frontier) if reuse is None else reuse
    turned = {model.family.calls(k, model.length) for k in frontier}
    curves = {
        k: _curves(model.family, model.denoiser.config, ask[k], options) if k in turned else {} for k in steps
    }
    if knobs is not None:
        curves = {k: {knob: v for knob, v in own.items() if knob == knobs[k]} for k, own in curves.items()}
    asked = [(k, options) for k in steps]
    asked += [(k, options | {knob: v}) for k in steps for knob, values in curves[k].items() for v in values]
    files_of = {_sample_path(folder, k, seed, own): (ask[k], own) for k, own in asked}
    _write_all(
        model,
        run,
        files_of,
        num,
        len(steps) if timed else 0,
        seed=seed,
        dtype=dtype,
        reuse=reuse,
        say=say,
        part=part,
    )

    reference = None
    if scorer is not None:
        texts = judge.halves(num, seed + 1)[1] if judge is not None else []
        if judge is None and lawful:
            texts = _others_of_the_law(num, seed)
        reference = feature_texts(scorer, [passage(text) for text in texts]) if texts else None
    rows = []
    for k in steps:
        path = _sample_path(folder, k, seed, options)
        rows.append(_score(path, *read_samples(path), None, judge, scorer, reference, say))
    if (nats := passage_nats(run)) is not None:
        for row in rows:
            row["passage_nats"] = nats
        if say is not None:
            most = "at most " * (model.family.likelihood == "bound")
            law = f"; the law's entropy is {Grammar().entropy:.2f}" * lawful
            say(
                f"a held-out passage has {most}{nats:.2f} nats under the model, its end and filling included{law}"
            )
    for k, row in zip(steps, rows, strict=True):
        if k in turned and judge is not None:
            points = {
                knob: [
                    _setting(_sample_path(folder, k, seed, options | {knob: v}), v, judge, scorer)
                    for v in values
                ]
                for knob, values in curves[k].items()
            }
            row |= merged(row, _frontier(points, judge.entropy))
    if judge is None or not references:
        return rows
    others = judge.reference_rows(num, seed + 1, Grammar() if lawful else None, scorer, reference)
    if turned:
        others[0] |= of_the_data(others[0])
    return rows + others


def _others_of_the_law(num: int, seed: int) -> list[str]:
    """Exact samples that distances are taken to, from a stream of their own."""
    return Grammar().sample(num, key(seed, "others of the law"))


def law_reference(row: Mapping[str, Any], seed: int, scorer: Scorer | None = None) -> dict[str, Any]:
    """The row of as many exact samples of the law as stand behind a row of `evaluate_run` with this seed; with a
    scorer, under it, and where that row has a distance, at theirs from as many others."""
    law = Grammar()
    own = key(seed, "the law")  # a stream that no seed of training data is
    ours = law_row(law, row["num"], own) | {"seed": seed}
    if scorer is None:
        return ours
    texts = law.sample(row["num"], own)
    ours = merged(ours, scored(scorer, texts))
    if row["frechet"] is not None:
        ours |= distance(scorer, texts, feature_texts(scorer, _others_of_the_law(row["num"], seed)))
    return ours


def _write_all(
    model: FlowLM,
    run: Path,
    files_of: Mapping[Path, tuple[int, dict[str, Any]]],
    num: int,
    timed: int,
    *,
    seed: int,
    dtype: str,
    reuse: bool,
    say: Callable[[str], None] | None,
    part: Part | None,
) -> None:
    """Write sample files, of the first `timed` with their latency; those that are there already not, if reused."""
    missing = []
    plain = _header(model, run, 0, seed, dtype, {})
    for i, (path, (k, own)) in enumerate(files_of.items()):
        like = dataclasses.replace(plain, nfe=model.family.calls(k, model.length), sampler=own)
        with_latency = i < timed
        if not (reuse and _is_written(path, like, num, with_latency)):
            missing.append((path, k, own, with_latency))
    if reuse and say is not None:
        say(f"{len(files_of)} settings of the sampler, {len(files_of) - len(missing)} of them sampled before")
    calls = num * sum(model.family.calls(k, model.length) for _, k, _, _ in missing)
    shown: contextlib.AbstractContextManager[Progress | Part | None] = contextlib.nullcontext()
    if part is not None and calls:
        shown = part.of(calls)
    elif say is not None and calls:
        shown = Progress(calls, 0, 0, say, label="calls")
    with shown as progress:
        before = 0
        for path, k, own, with_latency in missing:
            each = model.family.calls(k, model.length)

            def tick(done: int, each: int = each, before: int = before) -> None:
                if progress is not None:
                    progress.advance(before + each * done)

            try:
                write_run_samples(
                    model, run, path, num, k, seed=seed, dtype=dtype, tick=tick, timed=with_latency, **own
                )
            except KeyboardInterrupt:
                if say is not None:
                    goes_on = "; the same command goes on from there" if reuse else ""
                    say(f"interrupted: sample files that are whole are kept in {path.parent}{goes_on}")
                raise
            before += each * num


def _curves(
    family: Family, config: DenoiserConfig, steps: int, options: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Where each knob of a family's sweep is set."""
    return {
        knob: settings(options[knob], values)
        for knob, values in family.sweep.items()
        if family.matters(knob, config, steps, options)
    }


#: Perplexities of a frontier: the scorer's, and the n-gram model's beside it.
_JUDGED = ("perplexity", "ngram_perplexity")


class _Setting(NamedTuple):
    """A setting of a knob, measured."""

    point: dict[str, Any]
    texts: dict[str, Texts]
    """By whose perplexity, each text by itself."""


def _setting(path: Path, value: Any, judge: TextJudge, scorer: Scorer | None) -> _Setting:
    texts = [passage(record.text) for record in read_samples(path)[1]]
    split = [words(text) for text in texts]
    each, by_words = entropies(split), judge.scores(texts)
    by = {
        "perplexity": by_words if scorer is None else score_texts(scorer, texts),
        "ngram_perplexity": by_words,
    }
    point = {
        "value": value,
        "entropy": math.fsum(each) / len(each),
        "self_bleu": self_bleu(split) if len(split) > 1 else None,
    }
    return _Setting(
        point | {name: scores.perplexity for name, scores in by.items()},
        {name: Texts(scores.nats, scores.tokens, each) for name, scores in by.items()},
    )


def _frontier(settings_of: Mapping[str, Sequence[_Setting]], entropy: float) -> dict[str, Any]:
    """Of a row: its curves, and where the best of them passes the entropy of the data."""
    # a setting whose texts the scorer could not judge at all is no point
    kept = {
        knob: [own for own in curve if own.point["perplexity"] is not None]
        for knob, curve in settings_of.items()
    }
    known = {knob: [own.point for own in curve] for knob, curve in kept.items()}
    found = {
        name: best({k: [(p["entropy"], p[name]) for p in c] for k, c in known.items()}, entropy)
        for name in _JUDGED
    }
    intervals = {
        f"{name}_at_data_entropy": passing_interval([own.texts[name] for own in kept[at[0]]], entropy)
        for name, at in found.items()
        if at is not None
    }
    values: dict[str, float | None] = {
        f"{name}_at_data_entropy": None if at is None else at[1].perplexity for name, at in found.items()
    }
    at, alike = found["perplexity"], None
    if at is not None:
        # How much alike the samples are there, where they are compared, and not at the sampler's own setting.
        along = [point["self_bleu"] for point in known[at[0]]]
        alike = None if None in along else at[1].between(along)
    return {
        **values,
        "self_bleu_at_data_entropy": alike,
        "frontier": {"entropy": entropy, "knob": None if at is None else at[0], "curves": known},
        "intervals": intervals,
    }


def of_the_data(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """Of the row of held-out text: its numbers are those at the entropy of the data, by definition."""
    names = {name: f"{name}_at_data_entropy" for name in (*_JUDGED, "self_bleu")}
    known = held_out.get("intervals") or {}
    within = {there: known[name] for name, there in names.items() if name in known}
    return {there: held_out[name] for name, there in names.items()} | {"intervals": known | within}


def passage_nats(run: Path) -> float | None:
    """-log p of a held-out passage, the mean, or a bound of it, as `Family.likelihood` says: from the losses of the
    run; None where its family has neither, or it says none."""
    try:
        said = describe_run(run)
    except ValueError:
        return None  # of an exported model
    if said["held_out"] is None or not family(said["objective"]).likelihood:
        return None
    return float(said["held_out"] * read_run_config(run).model.length)


def held_out_curve(run: Path, key: str = "held_out") -> list[tuple[int, float]]:
    """(step, held-out loss) of a run, from its metrics.jsonl; or another number that was taken with it."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [(line["step"], line[key]) for line in read_metrics(path) if key in line]


def shown_samples(
    rows: Sequence[Mapping[str, Any]], folder: Path, shown: int = SHOWN
) -> dict[int, list[str]]:
    """The first samples of each row that a model wrote, by step count."""
    own = [row for row in rows if row["nfe"]]
    paths = {row["nfe"]: _sample_path(folder, row["nfe"], row["seed"], row["sampler"]) for row in own}
    return {k: [r.text for r in read_samples(path)[1][:shown]] for k, path in paths.items()}
