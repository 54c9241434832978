"""Training and judging every model of a comparison, each thing once: what is finished is found again by its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from flowlm import files
from flowlm.comparison.recipe import Comparison, Entry, identity
from flowlm.config import RunConfig, from_dict, resolved
from flowlm.data.corpora import Corpus, load_corpus
from flowlm.data.grammar import Grammar
from flowlm.device import resolve_device, resolve_dtype
from flowlm.evaluation.judge import TextJudge
from flowlm.evaluation.metrics import passage
from flowlm.evaluation.report import calls_text
from flowlm.evaluation.runs import (
    evaluate_run,
    held_out_curve,
    law_reference,
    of_the_data,
    shown_samples,
)
from flowlm.evaluation.samples import current_commit
from flowlm.evaluation.scorers import Scorer, feature_texts, open_scorer
from flowlm.families import family
from flowlm.progress import Part, Progress
from flowlm.training.checkpoint import RunDirectory
from flowlm.training.flops import flops_of_step
from flowlm.training.loop import DivergedError, Trainer, TrainingError, open_run

__all__ = ["Choice", "Interrupted", "Job", "Runner", "source_hash"]

TERA = 1e12
ROWS = "rows"
SHOWN = 5
"""Passages of a row that are kept beside it."""
_JUDGING = 0.3
"""Of the time for a model, what its samples take; the rest is its training."""


def source_hash() -> str:
    """Of the package's own source and torch's version: what trains and judges. Twelve digits."""
    package = Path(files.__file__).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def silent(line: str) -> None:
    """Of a model within a comparison, the comparison tells what matters."""


class Interrupted(KeyboardInterrupt):
    """The user stopped it; what is finished is kept, and a training goes on from its checkpoint."""


@dataclass(frozen=True)
class Choice:
    """How a model is asked for passages in some number of network calls."""

    sampler: int
    """Which of its entry's samplers."""
    knob: str = ""
    """The sampler's option that is turned towards the entropy of the data; empty where none is."""


@dataclass(frozen=True)
class Job:
    """One training of one model."""

    entry: Entry
    config: RunConfig
    """But for its teacher."""
    teacher: Job | None
    flops: float
    """Operations of the whole of it, its teacher's not counted."""
    data: str
    """Hash of its text and tokens."""
    where: str
    """On what kind of device and in which arithmetic it is computed."""

    @property
    def hash(self) -> str:
        """Of all that its result depends on."""
        return identity(
            [resolved(self.config), self.teacher.hash if self.teacher else "", self.data, self.where]
        )

    @property
    def total(self) -> float:
        """Its operations with its teacher's, and those of that one's teacher."""
        return self.flops + (self.teacher.total if self.teacher else 0.0)

    @property
    def folder(self) -> str:
        """Name of its run directory."""
        kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.entry.name.lower())
        return f"{kept}-{self.config.train.seed}-{self.hash}"


class Runner:
    """Works through a comparison.

    Args:
        comparison: its recipe.
        out: a folder; made when missing. What the same source of this package finished there of the same recipe is
            used; runs, choices and rows lie in its folder versions/HASH.
        say: where plain messages go.

    Raises:
        ValueError: the data cannot be read, or a budget is too small for a step.
    """

    def __init__(self, comparison: Comparison, out: Path, say: Callable[[str], None]):
        self.comparison, self.out, self.say = comparison, out, say
        self.commit = current_commit()
        # Another source may train and judge otherwise: what it left is not taken for this one's.
        self.work = out / "versions" / source_hash()
        if others := [
            path.parent.name for path in out.glob(f"versions/*/{ROWS}") if path.parent != self.work
        ]:
            say(
                f"{out} holds rows of {len(others)} other version{'s' * (len(others) > 1)} of this package's source: "
                "they are left alone, and nothing of them is used"
            )
        self._runs: dict[str, RunConfig] = {e.name: self._plain(e) for e in comparison.entries}
        self._corpora: dict[str, Corpus] = {}
        self._judges: dict[int, TextJudge] = {}
        self._scorer: Scorer | None = None
        self._references: list[dict[str, Any]] | None = None
        self._flops: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        """Of each model, the multiple of its learning rates that was chosen."""
        self._chosen_by: dict[str, set[Path]] = {"rates": set(), "samplers": set()}
        self._texts: dict[tuple[str, float, int], dict[str, list[str]]] = {}
        self.samplers: dict[str, dict[int, Choice]] = {}
        """Of each model and number of network calls, which of its samplers was chosen, and which knob."""
        self.unsearched: dict[str, str] = {}
        """Of models whose run to choose samplers by diverged, why: nothing was chosen, and no knob is turned."""

    # -- what there is to do -----------------------------------------------------------------------------------

    def _plain(self, entry: Entry) -> RunConfig:
        values = dict(entry.values)
        if entry.base:
            values.pop("model", None)  # made like its teacher
        return from_dict(RunConfig, values)

    def corpus(self, entry: Entry) -> Corpus:
        """The data of an entry: read once for all that share it."""
        config = self._runs[self.comparison.root(entry).name]
        key = identity([dataclasses.asdict(config.data), config.model.length])
        if key not in self._corpora:
            self._corpora[key] = load_corpus(config.data, config.model.length, None, self.say)
        return self._corpora[key]

    def data(self, entry: Entry) -> str:
        """A hash of the text and the tokens of an entry, wherever they lie."""
        meta = self.corpus(entry).meta
        named = ("sha256", "law_sha256", "tokenizer_sha256", "train", "held_out")
        return identity([meta.get(name) for name in named])

    def where(self, config: RunConfig) -> str:
        """The kind of device and the arithmetic of a run."""
        device = resolve_device(config.train.device)
        return f"{device.type} {resolve_dtype(config.train.dtype, device)[0]}"

    @property
    def device(self) -> str:
        """What is trained and judged on."""
        return self._runs[self.comparison.entries[0].name].train.device

    def is_lawful(self, entry: Entry) -> bool:
        """Whether the law of its language is known."""
        return self.corpus(entry).meta.get("corpus") == "grammar"

    def judge(self, entry: Entry) -> TextJudge:
        """By the training text."""
        corpus = self.corpus(entry)
        if id(corpus) not in self._judges:
            self._judges[id(corpus)] = TextJudge(corpus, self.say)
        return self._judges[id(corpus)]

    def scorer(self, part: Part | None = None) -> Scorer | None:
        """Whose perplexity is taken in place of the n-gram model's; trained when it is first asked for."""
        compare = self.comparison.config
        if compare.scorer and self._scorer is None:
            name = compare.scorer
            if (job := self._scorer_job()) is not None:
                self._tell(part, f"{name}: trained with seed {compare.search_seed}, to judge the others")
                name = str(self.train(job, part))
            self._scorer = open_scorer(name, device=self.device)
        return self._scorer

    def _scorer_job(self) -> Job | None:
        """The training of a scorer of the comparison's own."""
        compare = self.comparison.config
        if compare.scorer not in self._runs:
            return None
        entry = self.comparison.entry(compare.scorer)
        budget = compare.scorer_budget or max(compare.budgets)
        return self.job(entry, budget, compare.search_seed, self.rate(entry))

    def flops(self, entry: Entry) -> float:
        """Of one step of an entry's training, in floating-point operations; counted once, kept in the folder."""
        config = self._runs[entry.name]
        base = self.comparison.entry(entry.base) if entry.base else None
        key = identity([self._line(entry), self.data(entry)])
        path = self.work / "flops" / f"{key}.json"
        if key not in self._flops and path.exists():
            self._flops[key] = float(json.loads(path.read_text(encoding="utf-8"))["flops"])
        if key not in self._flops:
            self.say(f"{entry.name}: counting the operations of a step")
            teacher = None
            if base is not None:
                # Any weights do: it is counted, not trained.
                teacher = self._untrained(base)
                config = dataclasses.replace(config, model=self._runs[self.comparison.root(entry).name].model)
            self._flops[key] = flops_of_step(config, corpus=self.corpus(entry), teacher=teacher)
            files.write_json(path, {"model": entry.name, "flops": self._flops[key]})
        return self._flops[key]

    def _line(self, entry: Entry) -> list[Any]:
        """The settings of an entry and of all that its teachers go back to."""
        return [
            resolved(self._runs[entry.name]),
            *(self._line(self.comparison.entry(entry.base)) if entry.base else ()),
        ]

    def _untrained(self, entry: Entry) -> nn.Module:
        config = self._runs[entry.name]
        train = dataclasses.replace(config.train, compile=False, device="cpu")
        model = self._runs[self.comparison.root(entry).name].model
        trainer = Trainer(
            dataclasses.replace(config, train=train, model=model),
            self.work / "flops",
            say=silent,
            corpus=self.corpus(entry),
            teacher=self._untrained(self.comparison.entry(entry.base)) if entry.base else None,
        )
        network: nn.Module = trainer.model.eval().requires_grad_(False)
        return network

    def job(self, entry: Entry, budget: float, seed: int, rate: float) -> Job:
        """The training of an entry, with its teacher's.

        Args:
            budget: TFLOP for both.
            rate: multiple of its learning rates; its teacher's are the ones that were chosen for it.
        """
        compare = self.comparison.config
        teacher = None
        if entry.base:
            base = self.comparison.entry(entry.base)
            teacher = self.job(base, compare.share * budget, seed, self.rate(base))
            budget *= 1 - compare.share
        config, each = self._runs[entry.name], self.flops(entry)
        steps = int(budget * TERA / each)
        if steps < 1:
            raise ValueError(
                f"{entry.name}: a step takes {each / TERA:.3g} TFLOP, and {budget:.3g} are its budget: give more in "
                "compare.budgets, or a smaller batch or network"
            )
        optim = dataclasses.replace(
            config.optim, lr=config.optim.lr * rate, muon_lr=config.optim.muon_lr * rate
        )
        train = dataclasses.replace(config.train, steps=steps, seed=seed, keep=1)
        config = dataclasses.replace(config, optim=optim, train=train)
        return Job(entry, config, teacher, each * steps, self.data(entry), self.where(config))

    def _searches(self, entry: Entry) -> Iterator[tuple[float, Job]]:
        compare = self.comparison.config
        for rate in compare.rates:
            yield rate, self.job(entry, min(compare.budgets), compare.search_seed, rate)

    # -- doing it ----------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """All rows of the comparison.

        Raises:
            Interrupted: asked to stop.
            ValueError, TrainingError: as in training and evaluation.
        """
        compare = self.comparison.config
        entries = self.comparison.entries
        if not compare.scorer and len({id(self.corpus(entry)) for entry in entries}) > 1:
            raise ValueError(
                "the models learn from different texts, or from passages of different lengths, each with an n-gram "
                "model of its own: perplexities under several do not compare; name one judge with compare.scorer"
            )
        for entry in entries:
            self.flops(entry)
        least = min(compare.budgets)
        own = compare.scorer in self._runs
        if not own:
            self.scorer()  # whose name may lead nowhere, which is told before hours of training
        # By compute: judging takes a share of it.
        searches = [len(compare.rates) * least if len(compare.rates) > 1 else 0.0 for _ in entries]
        scorer = (compare.scorer_budget or max(compare.budgets)) if own else 0.0
        choices = [least if len(entry.samplers) > 1 or compare.frontier else 0.0 for entry in entries]
        total = (
            sum(searches) + scorer + sum(choices) + len(compare.seeds) * len(entries) * sum(compare.budgets)
        )
        rows: list[dict[str, Any]] = []
        with Progress(math.ceil(total), 0, 0, self.say, label="TFLOP") as whole:
            done = 0.0
            if own:
                # First of all: without it nothing that a student writes is judged.
                judge = self.comparison.entry(compare.scorer)
                place = entries.index(judge)
                self.rate(judge, whole.part(done, searches[place]))
                done, searches[place] = done + searches[place], 0.0
                self.scorer(whole.part(done, scorer))
                done += scorer
            for entry, size in zip(entries, searches, strict=True):
                self.rate(entry, whole.part(done, size))
                done += size
            for entry, size in zip(entries, choices, strict=True):
                self.sampler(entry, whole.part(done, size))
                done += size
            for budget in compare.budgets:
                for seed in compare.seeds:
                    for entry in entries:
                        job = self.job(entry, budget, seed, self.rates[entry.name])
                        rows += self._measured(job, budget, whole.part(done, budget))
                        done += budget
        return rows

    def rate(self, entry: Entry, part: Part | None = None) -> float:
        """The multiple of its rates with which an entry does best at the least budget."""
        if entry.name not in self.rates:
            self.rates[entry.name] = self._choose(entry, part)
        return self.rates[entry.name]

    def _choose(self, entry: Entry, part: Part | None) -> float:
        compare = self.comparison.config
        if len(compare.rates) == 1:
            return compare.rates[0]
        ranks = family(self._runs[entry.name].objective).held_out_ranks
        asked: list[Any] = [job.hash for _, job in self._searches(entry)]
        if not ranks:
            asked += [compare.search_steps, entry.samplers[0], self._search_num, *self._judging()]
        path = self.work / "rates" / f"{identity(asked)}.json"
        self._chosen_by["rates"].add(path)
        if path.exists():
            return float(json.loads(path.read_text(encoding="utf-8"))["chosen"])
        found: dict[float, float] = {}
        diverged: list[str] = []
        for i, (rate, job) in enumerate(self._searches(entry)):
            training, judging = (
                part.share(i, len(compare.rates)).split(1 - _JUDGING) if part else (None, None)
            )
            if job.teacher is not None:
                self.train(job.teacher, _in_two(job, training)[0])  # its failure is not this model's
            try:
                folder = self.train(job, training)
            except DivergedError as error:
                diverged.append(f"{entry.name} at {rate:g} times its learning rates: {error}")
                self._tell(part, diverged[-1])
                found[rate] = math.inf
                continue
            fault = self._fault(job, folder, judging)
            found[rate] = fault if math.isfinite(fault) else math.inf
        if len(diverged) == len(found) or (ranks and min(found.values()) == math.inf):
            raise TrainingError(
                f"{entry.name} diverges at every learning rate of compare.rates: lower them"
                + "".join(f"\n{line}" for line in diverged)
            )
        # Of equals, the one that changes least.
        chosen = min(found, key=lambda rate: (found[rate], abs(math.log(rate))))
        self._tell(
            part,
            f"{entry.name}: {chosen:g} times its learning rates, of "
            + ", ".join(f"{rate:g} ({fault:.4f})" for rate, fault in found.items()),
        )
        files.write_json(
            path,
            {
                "model": entry.name,
                "chosen": chosen,
                "by": {f"{rate:g}": fault if math.isfinite(fault) else None for rate, fault in found.items()},
                "seed": compare.search_seed,
                "commit": self.commit,
            },
        )
        return chosen

    def _fault(self, job: Job, folder: Path, part: Part | None) -> float:
        """What the choice of rates makes small: the held-out loss, or of a student what its passages lack."""
        if family(job.config.objective).held_out_ranks:
            losses = [loss for _, loss in held_out_curve(folder)]
            return min(losses) if job.config.train.choose == "best" else losses[-1]
        rows = self._rows(job, folder, self.comparison.config.search_steps, job.entry.samplers[0], part)
        return sum(self._lack(job.entry, row) for row in rows) / len(rows)

    def _lack(self, entry: Entry, row: dict[str, Any]) -> float:
        """How far the passages of a row are from the data, graded, whether they are too bad or too much alike.

        In nats: how far log perplexity and entropy are from those of held-out text, and how many passages fewer there
        are than would be if none were another's copy. Of a law also the shares of stories that it does not have, and
        that cannot even be read: alone, these would be the same for all whose budget was too small for a valid story.
        """
        if row["perplexity"] is None:
            return math.inf
        data = next(
            one for one in self.references() if one["model"] == "held-out" and one["of"] == self.data(entry)
        )
        lack = abs(math.log(row["perplexity"] / data["perplexity"])) + abs(row["entropy"] - data["entropy"])
        lack += 1.0 - float(row["unique"])
        if self.is_lawful(entry):
            lack += 1.0 - float(row["valid"]) + 1.0 - float(row["parsed"])
        return lack

    def calls(self, entry: Entry, steps: int) -> int:
        """Network calls that a model takes when it is asked for as many steps."""
        config = self._runs[self.comparison.root(entry).name]
        return family(self._runs[entry.name].objective).calls(steps, config.model.length)

    def sampler(self, entry: Entry, part: Part | None = None) -> dict[int, Choice]:
        """Of each number of network calls, which of an entry's samplers does best, and which knob brings it best to the
        entropy of the data: with the search's seed, at the least budget, so that nothing reported is the best of many.
        """
        compare = self.comparison.config
        calls = list(dict.fromkeys(self.calls(entry, k) for k in compare.steps))
        if len(entry.samplers) == 1 and not compare.frontier:
            self.samplers[entry.name] = dict.fromkeys(calls, Choice(0))
        if entry.name in self.samplers:
            return self.samplers[entry.name]
        job = self.job(entry, min(compare.budgets), compare.search_seed, self.rate(entry))
        path = (
            self.work
            / "samplers"
            / f"{identity([job.hash, entry.samplers, self._search_num, *self._judging()])}.json"
        )
        self._chosen_by["samplers"].add(path)
        if not path.exists():
            training, judging = part.split(1 - _JUDGING) if part else (None, None)
            found = {
                "model": entry.name,
                "samplers": entry.samplers,
                "seed": compare.search_seed,
                "commit": self.commit,
            }
            try:
                found["calls"] = self._choices(job, self.train(job, training), calls, judging)
            except DivergedError as error:
                # Other seeds may not; they are asked for passages in the first way, and no knob is turned.
                self._tell(part, f"{entry.name}, seed {compare.search_seed}, diverged: {error}")
                found |= {"calls": {str(k): {"sampler": 0} for k in calls}, "diverged": str(error)}
            files.write_json(path, found)
        kept = json.loads(path.read_text(encoding="utf-8"))
        if "diverged" in kept:
            self.unsearched[entry.name] = kept["diverged"]
        self.samplers[entry.name] = {
            int(k): Choice(own["sampler"], own.get("knob", "")) for k, own in kept["calls"].items()
        }
        return self.samplers[entry.name]

    def _choices(
        self, job: Job, folder: Path, calls: Sequence[int], part: Part | None
    ) -> dict[str, dict[str, Any]]:
        """Of each number of network calls, what was chosen, and by what."""
        compare, entry = self.comparison.config, job.entry
        turned = {self.calls(entry, k): k for k in reversed(compare.frontier)}
        count = len(entry.samplers) + len(turned)
        out: dict[str, dict[str, Any]] = {str(k): {"sampler": 0} for k in calls}
        if len(entry.samplers) > 1:
            found: dict[int, list[float]] = {k: [] for k in calls}
            for i, sampler in enumerate(entry.samplers):
                own = part.share(i, count) if part else None
                for row in self._rows(job, folder, compare.steps, sampler, own):
                    found[row["nfe"]].append(self._lack(entry, row))
            for k, lacks in found.items():
                by = [x if math.isfinite(x) else None for x in lacks]
                out[str(k)] = {"sampler": lacks.index(min(lacks)), "by": by}
        for number, k in enumerate(k for k in calls if k in turned):
            own = part.share(len(entry.samplers) + number, count) if part else None
            sampler = entry.samplers[out[str(k)]["sampler"]]
            (row,) = self._rows(job, folder, [turned[k]], sampler, own, frontier=[turned[k]])
            out[str(k)] |= {"knob": _knob(row["frontier"])}
        return out

    def train(self, job: Job, part: Part | None) -> Path:
        """The finished run of a job; trained, gone on with, or found."""
        folder = self.work / "runs" / job.folder
        config = job.config
        if job.teacher is not None:
            before, part = _in_two(job, part)
            config = dataclasses.replace(config, teacher=str(self.train(job.teacher, before)))
        run = RunDirectory(folder)
        there = run.steps()
        if there and there[-1] >= config.train.steps and run.is_exported():
            return folder
        if there:
            # Text and teacher may have moved with the folder or without it.
            places = {"data.path": config.data.path, "teacher": config.teacher}
            trainer = open_run(folder, say=silent, changes={k: place for k, place in places.items() if place})
        else:
            trainer = Trainer(config, folder, say=silent, corpus=self.corpus(job.entry))
            trainer.start(force=True)
        self._tell(
            part, f"{job.entry.name}, seed {config.train.seed}: {config.train.steps:,} steps, in {folder}"
        )
        if not trainer.train(part).finished or trainer.interrupted:
            raise Interrupted
        return folder

    def _rows(
        self,
        job: Job,
        folder: Path,
        steps: Sequence[int],
        sampler: dict[str, Any],
        part: Part | None,
        frontier: Sequence[int] = (),
        knobs: Mapping[int, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Rows to report, which knobs were chosen for; or, without those, to choose by: no latency is taken of them."""
        return evaluate_run(
            folder,
            steps,
            self.comparison.config.num if knobs is not None else self._search_num,
            seed=job.config.train.seed,
            device=job.config.train.device,
            dtype=job.config.train.dtype,
            judge=self.judge(job.entry),
            scorer=self.scorer(part),
            frontier=frontier,
            knobs=knobs,
            timed=knobs is not None,
            references=False,  # judged once for all
            reuse=True,
            say=lambda line: self._tell(part, line),
            part=part,
            **sampler,
        )

    @property
    def _search_num(self) -> int:
        return self.comparison.config.search_num or self.comparison.config.num

    def _judging(self) -> list[Any]:
        """What rows depend on beside the model and its sampler."""
        compare = self.comparison.config
        scorer = ""
        if (job := self._scorer_job()) is not None:
            scorer = job.hash
        elif (given := self.scorer()) is not None:
            scorer = given.name
        return [compare.steps, compare.frontier, compare.num, scorer]

    def _measured(self, job: Job, budget: float, part: Part) -> list[dict[str, Any]]:
        """The rows of one model, one budget and one seed: judged now, or found."""
        entry = job.entry
        chosen = self.sampler(entry)
        settings = sorted((k, dataclasses.astuple(choice)) for k, choice in chosen.items())
        asked = [job.hash, entry.samplers, settings, *self._judging()]
        path = self.work / ROWS / f"{job.folder}-{identity(asked)}.json"
        if not path.exists():
            try:
                rows = self._measure(job, budget, part)
                # Whole by itself: the run may be deleted afterwards.
                texts = shown_samples(rows, self.work / "runs" / job.folder / "samples", SHOWN)
            except DivergedError as error:
                self._tell(part, f"{entry.name}, seed {job.config.train.seed}, diverged: {error}")
                rows, texts = self._diverged(job, budget, error), {}
            found = {"model": entry.name, "hash": job.hash, "commit": self.commit, "rows": rows}
            files.write_json(path, found | {"samples": {str(k): own for k, own in texts.items()}})
        kept = json.loads(path.read_text(encoding="utf-8"))
        self._texts[entry.name, budget, job.config.train.seed] = kept["samples"]
        return list(kept["rows"])

    def _measure(self, job: Job, budget: float, part: Part) -> list[dict[str, Any]]:
        """The rows of one model, one budget and one seed, trained and judged."""
        compare, entry = self.comparison.config, job.entry
        chosen = self.sampler(entry)
        training, judging = part.split(1 - _JUDGING)
        folder = self.train(job, training)
        rows = []
        groups: dict[int, list[int]] = {}
        for k in compare.steps:
            groups.setdefault(chosen[self.calls(entry, k)].sampler, []).append(k)
        knobs = {k: choice.knob for k, choice in chosen.items()}
        for number, (i, steps) in enumerate(groups.items()):
            own = judging.share(number, len(groups))
            turned = [k for k in compare.frontier if k in steps and entry.name not in self.unsearched]
            found = self._rows(job, folder, steps, entry.samplers[i], own, turned, knobs)
            rows += [row | {"chosen": entry.samplers[i]} for row in found]
        rows.sort(key=lambda row: row["nfe"])
        return [row | {"model": entry.name} | self._about(job, budget, folder) for row in rows]

    def _diverged(self, job: Job, budget: float, error: DivergedError) -> list[dict[str, Any]]:
        """The rows of a model that there is none of: with nothing measured, and why."""
        calls = dict.fromkeys(self.calls(job.entry, k) for k in self.comparison.config.steps)
        about = self._about(job, budget, None) | {"seed": job.config.train.seed, "diverged": str(error)}
        asked = {"num": self.comparison.config.num, "dtype": self.where(job.config).split()[-1]}
        return [{"model": job.entry.name, "nfe": k} | about | asked for k in calls]

    def _about(self, job: Job, budget: float, folder: Path | None) -> dict[str, Any]:
        return {
            "entry": job.entry.name,
            "budget": budget,
            "rate": self.rates[job.entry.name],
            "training_steps": job.config.train.steps,
            "training_tflop": job.total / TERA,
            "parameters": _parameters(folder / "ema.safetensors") if folder else None,
            "run": job.folder,
            "hash": job.hash,
        }

    def _tell(self, part: Part | None, line: str) -> None:
        (self.say if part is None else part.tell)(line)

    # -- beside it ---------------------------------------------------------------------------------------------

    def references(self) -> list[dict[str, Any]]:
        """Rows of what is no model: held-out text and the n-gram model's samples; of a law, exact samples of it too.
        ``of`` is the hash of their text."""
        if self._references is not None:
            return self._references
        compare, rows = self.comparison.config, []
        seed, scorer = compare.search_seed, self.scorer()
        for data, entry in {self.data(entry): entry for entry in self.comparison.entries}.items():
            judge, lawful = self.judge(entry), self.is_lawful(entry)
            others = None
            if scorer is not None:
                others = feature_texts(scorer, [passage(text) for text in judge.halves(compare.num, seed)[1]])
            found = judge.reference_rows(compare.num, seed, Grammar() if lawful else None, scorer, others)
            found[0] |= of_the_data(found[0])
            if lawful:
                near = {"num": compare.num, "frechet": None if scorer is None else 0.0}
                found.append(law_reference(near, seed, scorer) | {"passage_nats": Grammar().entropy})
            rows += [row | {"of": data} for row in found]
        self._references = rows
        return rows

    def settings(self) -> dict[str, Any]:
        """All that decides what is found, and by what it was chosen: for those who read the report."""
        chosen = {
            kind: [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
            for kind, paths in self._chosen_by.items()
        }
        return {
            "source": self.work.name,
            "compare": dataclasses.asdict(self.comparison.config),
            "models": {
                entry.name: {
                    "base": entry.base,
                    "flops_of_step": self.flops(entry),
                    "config": resolved(self._runs[entry.name]),
                    "samplers": entry.samplers,
                }
                for entry in self.comparison.entries
            },
            "chosen": chosen,
        }

    def texts(self) -> list[dict[str, Any]]:
        """What the models learned from: name and sha256."""
        metas = [self.corpus(entry).meta for entry in self.comparison.entries]
        found = {meta.get("sha256") or meta.get("law_sha256"): meta.get("corpus") for meta in metas}
        return [{"corpus": name, "sha256": sha256} for sha256, name in found.items()]

    def samples(self) -> dict[str, dict[str, list[str]]]:
        """Passages of each model, of the largest budget and the first seed, at the network calls that claims are
        about, or at the fewest; who takes others, as many as there are tokens, stands beside with its own."""
        compare = self.comparison.config
        of = {
            e.name: self._texts[e.name, max(compare.budgets), compare.seeds[0]]
            for e in self.comparison.entries
        }
        claimed = {k for claim in self.comparison.claims for k in (claim.at, claim.than_at)}
        out: dict[str, dict[str, list[str]]] = {}
        for k in sorted(claimed or {min(compare.steps)}):
            shown = out[calls_text(k)] = {}
            for name, texts in of.items():
                if not texts:
                    continue  # it diverged
                own = min((abs(int(number) - k), int(number)) for number in texts)[1]
                shown[name if own == k else f"{name} ({calls_text(own)})"] = texts[str(own)]
        return out


def _knob(frontier: Mapping[str, Any]) -> str:
    """Of a frontier, the knob that reaches the entropy of the data at the least perplexity; where none does, the one
    that comes nearest to it; empty where there is none."""
    if frontier["knob"] is not None:
        return str(frontier["knob"])
    if not frontier["curves"]:
        return ""  # nothing of this sampler can be turned
    return min(
        frontier["curves"],
        key=lambda knob: min(
            (abs(point["entropy"] - frontier["entropy"]) for point in frontier["curves"][knob]),
            default=math.inf,
        ),
    )


def _in_two(job: Job, part: Part | None) -> tuple[Part | None, Part | None]:
    """A student's stretch of the bar: its teachers' share of the compute, and its own."""
    if part is None or job.teacher is None:
        return None, part
    return part.split(job.teacher.total / job.total)


def _parameters(weights: Path) -> int:
    """How many numbers lie in a file of weights."""
    with safetensors.safe_open(weights, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
