"""What a comparison is: models with one network, data and optimizer in common, budgets of compute, seeds, a judge."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowlm.config import (
    RunConfig,
    dotted,
    from_dict,
    merge,
    nearest,
    nested,
    read_toml,
    recipe_path,
)
from flowlm.families import family

__all__ = ["Claim", "CompareConfig", "Comparison", "Entry", "load_comparison"]

#: What a comparison decides itself, for every model alike.
_DECIDED = ("train.steps", "train.seed", "teacher", "init")


@dataclass(frozen=True)
class CompareConfig:
    """How the models are trained and judged."""

    budgets: list[float] = field(default_factory=lambda: [50.0, 200.0])
    """Training compute of each model, in TFLOP (10¹² floating-point operations), counted by `flops_of_step`."""
    share: float = 0.5
    """Of a student's budget, the share that goes to its teacher."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of training and of the samples."""
    rates: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Multiples of a model's learning rates, tried for each at the least budget."""
    search_seed: int = 1000
    """Of the runs that choose rates, samplers and knobs, of the scorer, and of the references: of nothing that is
    reported."""
    search_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Network calls at which students are judged for choosing rates: their held-out losses do not rank."""
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """Network calls at which all models are judged."""
    num: int = 1000
    """Passages a row."""
    search_num: int = 0
    """Passages by which rates, samplers and knobs are chosen; as many as for a row when 0."""
    frontier: list[int] = field(default_factory=lambda: [1, 8])
    """Of these network calls, those at which a knob of every sampler is turned, to compare at the entropy of the data;
    which one, the search's seed says. It takes some six times the samples, in the search some fifteen times: in many
    calls more than the training."""
    scorer: str = ""
    """Whose perplexity is taken: a model of the comparison of the family AR, trained for it with the search's seed; or
    what `flowlm evaluate --scorer` takes; empty: the n-gram model's alone."""
    scorer_budget: float = 0.0
    """TFLOP for a scorer of the comparison's own; as much as the largest budget when 0."""

    def __post_init__(self) -> None:
        if self.scorer_budget < 0:
            raise ValueError(f"compare.scorer_budget cannot be negative, got {self.scorer_budget}")
        for name in ("budgets", "seeds", "rates", "search_steps", "steps", "frontier"):
            values = getattr(self, name)
            if not values and name != "frontier":
                raise ValueError(f"compare.{name} is empty: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"compare.{name} = {values} names one twice")
        for name in ("budgets", "rates", "search_steps", "steps"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"compare.{name} = {getattr(self, name)}: all must be positive")
        if not set(self.frontier) <= set(self.steps):
            raise ValueError(
                f"compare.frontier = {self.frontier}: knobs are turned at some of compare.steps = {self.steps}: "
                "set compare.frontier to some of them, or to none"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"compare.share = {self.share}: a share in (0, 1), so that both stages get some")
        for name, least in (("num", 2), ("search_num", 0)):
            if getattr(self, name) < least or getattr(self, name) == 1:
                raise ValueError(f"compare.{name} = {getattr(self, name)}: judge at least two passages")
        if self.search_seed in self.seeds:
            raise ValueError(
                f"compare.search_seed = {self.search_seed} is one of the seeds that are reported: rates and "
                "samplers would be chosen by what they are judged by; take another"
            )


@dataclass(frozen=True)
class Entry:
    """One model of a comparison."""

    name: str
    base: str
    """Of a student, the entry whose kind of model teaches it, which may be a student itself; empty for none."""
    values: dict[str, Any]
    """Its run's configuration, but for what the comparison decides."""
    samplers: list[dict[str, Any]]
    """Options of its sampler to choose from, at each number of network calls, with the search's seed."""


@dataclass(frozen=True)
class Claim:
    """What a comparison is to show: one model's quality above another's."""

    better: str
    at: int
    """Its network calls."""
    than: str
    than_at: int


@dataclass(frozen=True)
class Comparison:
    """A comparison's recipe, read and checked."""

    title: str
    config: CompareConfig
    entries: tuple[Entry, ...]
    """Bases before their students."""
    claims: tuple[Claim, ...]

    def root(self, entry: Entry) -> Entry:
        """Of a student, the entry from whose kind of model its teachers go back to; of others itself."""
        while entry.base:
            entry = self.entry(entry.base)
        return entry

    def entry(self, name: str) -> Entry:
        """ValueError: there is none of that name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise ValueError(f"no model named {name!r}: {nearest(name, [e.name for e in self.entries])}")


def _bases(entries: Sequence[Entry], entry: Entry) -> list[str]:
    """Of a student, its teacher's entry, that one's teacher's, and so on; up to the first that comes again."""
    of = {other.name: other.base for other in entries}
    out: list[str] = []
    while (base := of.get(out[-1] if out else entry.name, "")) and base not in out:
        out.append(base)
    return out


def _check_base(entry: Entry, base: Entry) -> None:
    """Refuse a teacher that the student's family cannot have, before any is trained."""
    student, teacher = (from_dict(RunConfig, e.values) for e in (entry, base))
    model = dataclasses.replace(teacher.model, **family(teacher.objective).fill(teacher))
    try:
        student = dataclasses.replace(student, teacher=base.name)
        family(student.objective).check_source(student, model, base.name)
    except ValueError as error:
        raise ValueError(f"models.{entry.name}.base = {base.name!r}: {error}") from None


def load_comparison(
    path: str | Path, over: Mapping[str, Any] | None = None, compare: Mapping[str, Any] | None = None
) -> Comparison:
    """Read a comparison.

    A recipe of a comparison has tables [compare] (`CompareConfig`), [common] (any fields of a run, for all models),
    [models.NAME] (what is this model's own; `base = "NAME"` for students, `samplers = [{…}, …]` to choose from) and
    [[claims]]. `recipe = "…"` in [common] or a model takes that recipe's fields first.

    Args:
        path: a .toml file, or the name of one that comes with the package.
        over: over all of them, by dotted names of a run's fields.
        compare: over [compare].

    Raises:
        ValueError: what is wrong, and where.
    """
    raw = read_toml(recipe_path(path))
    try:
        return _comparison(raw, nested(over or {}), compare or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _comparison(raw: dict[str, Any], over: dict[str, Any], compare: Mapping[str, Any]) -> Comparison:
    known = ("title", "compare", "common", "models", "claims")
    for name in raw:
        if name not in known:
            raise ValueError(f"unknown key {name!r}: {nearest(name, known)}")
    if not raw.get("models"):
        raise ValueError("there are no models: add [models.NAME] tables")
    config = from_dict(CompareConfig, merge(raw.get("compare", {}), dict(compare)), "compare.")
    _refuse_decided(raw.get("common", {}), "common")
    _refuse_decided(over, "option")
    shared = _with_recipe(raw.get("common", {}))
    entries = [_entry(name, values, shared, over) for name, values in raw["models"].items()]
    names = [entry.name for entry in entries]
    for entry in entries:
        if entry.base:
            if entry.base not in names:
                raise ValueError(f"models.{entry.name}.base = {entry.base!r}: {nearest(entry.base, names)}")
            if entry.name in _bases(entries, entry):
                raise ValueError(
                    f"models.{entry.name}.base = {entry.base!r} comes back to {entry.name!r} itself"
                )
            _check_base(entry, entries[names.index(entry.base)])
    out = Comparison(
        str(raw.get("title", "")),
        config,
        tuple(sorted(entries, key=lambda entry: len(_bases(entries, entry)))),
        tuple(from_dict(Claim, values, f"claims[{i}].") for i, values in enumerate(raw.get("claims", []))),
    )
    if config.scorer in names and out.entry(config.scorer).values.get("objective") != "ar":
        raise ValueError(
            f"compare.scorer = {config.scorer!r} is a model without an exact likelihood: name one of objective = 'ar'"
        )
    for claim in out.claims:
        for name, at in ((claim.better, claim.at), (claim.than, claim.than_at)):
            run = from_dict(RunConfig, out.entry(name).values)
            calls = family(run.objective).calls
            if at not in {calls(k, run.model.length) for k in config.steps}:
                raise ValueError(
                    f"a claim is about {name} at {at} network calls, which are not among compare.steps"
                )
            turned = {calls(k, run.model.length) for k in config.frontier}
            if run.data.corpus != "grammar" and turned and at not in turned:
                raise ValueError(
                    f"a claim is about {name} at {at} network calls, where nothing is measured at the entropy of the "
                    "data: add them to compare.frontier"
                )
    return out


def _with_recipe(values: dict[str, Any]) -> dict[str, Any]:
    name = values.get("recipe", "")
    if not name:
        return values
    # A teacher that a recipe names is for those who train by it alone; here it is an entry.
    found = {key: value for key, value in read_toml(recipe_path(name)).items() if key != "teacher"}
    return merge(found, values)


def _refuse_decided(values: dict[str, Any], where: str) -> None:
    for path in _DECIDED:
        if path in dotted(values):
            raise ValueError(
                f"{where}.{path} is the comparison's to decide, for all models alike: leave it out"
            )


def _entry(name: str, values: dict[str, Any], shared: dict[str, Any], over: dict[str, Any]) -> Entry:
    own = dict(values)
    _refuse_decided(values, f"models.{name}")
    base, samplers = own.pop("base", ""), own.pop("samplers", [{}])
    own = _with_recipe(own)
    if base and "model" in own:
        raise ValueError(
            f"models.{name} has a base and a [model] of its own: a student is made like its teacher"
        )
    merged = merge(merge(shared, own), over)
    try:
        run = from_dict(RunConfig, merged)
        kind = family(run.objective)
        for sampler in samplers:
            kind.check_options(sampler)
    except ValueError as error:
        raise ValueError(f"models.{name}: {error}") from None
    if kind.taught and kind.name != "flow-map" and not base:
        raise ValueError(
            f"models.{name}: {kind.label} learns from a teacher; name its kind of model with base = …"
        )
    return Entry(name, base, merged, [dict(sampler) for sampler in samplers])


def identity(values: Mapping[str, Any] | Sequence[Any]) -> str:
    """A hash of settings, twelve digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
