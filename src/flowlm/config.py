"""Configuration: frozen dataclasses, read from TOML recipes, overridden on the command line, saved resolved.

A key that no dataclass knows is an error that names the nearest one; so is a value of the wrong type.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flowlm.data.corpora import DataConfig
from flowlm.data.registry import CORPORA
from flowlm.denoiser import DenoiserConfig, as_it_was
from flowlm.discrete.di4c import Di4CConfig
from flowlm.discrete.distil import RoundsConfig
from flowlm.discrete.duo import DuoConfig
from flowlm.families import NAMES, family
from flowlm.objectives.flow import FlowConfig
from flowlm.objectives.flow_map import FlowMapConfig

T = TypeVar("T")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer: AdamW, with Muon for the matrices inside the blocks."""

    lr: float = 5e-3
    """AdamW's rate: embeddings, head, norms, biases, time conditioning; every parameter when muon_lr is 0."""
    muon_lr: float = 0.02
    """Muon's rate for the matrices inside the blocks; 0 gives them to AdamW."""
    muon_momentum: float = 0.95
    """Muon's momentum."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.99
    """AdamW's second decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay of both."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 for none."""
    warmup: int = 30
    """Steps of linear warm-up."""
    schedule: str = "trapezoid"
    """After warm-up: "constant", "cosine" to 0, or "trapezoid" (constant, then linear to 0)."""
    cooldown: float = 0.4
    """Share of the steps in the trapezoid's descent."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine", "trapezoid"):
            raise ValueError(f"optim.schedule = {self.schedule!r}: use 'constant', 'cosine' or 'trapezoid'")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        for name in ("muon_momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"optim.cooldown is a share of the steps in [0, 1], got {self.cooldown}")
        for name in ("muon_lr", "weight_decay", "clip", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} cannot be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class SamplingClockConfig:
    """Where training times are drawn."""

    kind: str = "fixed"
    """"fixed" (uniform in the conditioning clock's τ) or "adaptive" (dense where the loss falls)."""
    refit_every: int = 500
    """Steps between refits of the adaptive clock."""
    floor: float = 0.2
    """Share of the adaptive density that stays uniform in τ."""

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "adaptive"):
            raise ValueError(f"clock.kind = {self.kind!r}: use 'fixed' or 'adaptive'")
        if self.refit_every < 1:
            raise ValueError(f"clock.refit_every must be at least 1, got {self.refit_every}")
        if not 0 < self.floor <= 1:
            raise ValueError(
                f"clock.floor must lie in (0, 1], got {self.floor}: some times would never be drawn"
            )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps."""
    batch: int = 64
    """Passages per optimizer step, over all micro-batches."""
    micro_batch: int = 0
    """Passages per forward pass; 0 takes the whole batch at once. Without dropout the result does
    not depend on it."""
    ema: float = 0.999
    """Decay of the averaged weights, ramped as min(ema, (1+n)/(10+n))."""
    eval_every: int = 250
    """Steps between held-out losses (by bins of τ) and printed samples; 0 for only at the end."""
    sample_steps: int = 8
    """Network calls of the printed samples."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept, beside the chosen one."""
    choose: str = "last"
    """The checkpoint exported at the end: "last", or "best" (lowest held-out loss of the averaged weights)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Seed of everything: weights, data order, noise, times."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "mps"."""
    dtype: str = "auto"
    """"auto" (bfloat16 where the hardware multiplies it, else float32), "bfloat16" or "float32"."""
    shard: bool = False
    """Under torchrun, each process keeps a part of weights, gradients, averages and moments (FSDP2), not all of them
    (DDP): for a model that does not fit beside them on one device."""
    compile: bool = False
    """torch.compile the networks: 1.4 to 1.8 times as fast on a CPU after some ten seconds; needs a C++ compiler."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "log_every", "keep", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} cannot be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema must lie in [0, 1), got {self.ema}")
        if self.choose not in ("last", "best"):
            raise ValueError(f"train.choose = {self.choose!r}: use 'last' or 'best'")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what is trained, on what, and how."""

    recipe: str = ""
    """Name of the recipe, for reports; filled in from its file."""
    objective: str = "flow"
    """"flow" (FLM: cross-entropy on the data), "flow-map" (FMLM: distillation into the flow map), "correction" (of a
    flow, the first of two stages); "ar", "mdlm", "sedd", "duo"; few-step "sdtt", "duo-dcd", "di4c", "duo-di4c"."""
    teacher: str = ""
    """flow-map: run directory of the FLM to distil; empty for self-distillation from the data."""
    init: str = ""
    """Run directory whose weights training starts from; empty for fresh ones (the teacher's, if any)."""
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    duo: DuoConfig = field(default_factory=DuoConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    di4c: Di4CConfig = field(default_factory=Di4CConfig)
    clock: SamplingClockConfig = field(default_factory=SamplingClockConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        kind = family(self.objective)
        if self.train.choose == "best" and not kind.held_out_ranks:
            raise ValueError(
                f"train.choose = 'best' means nothing for {self.objective!r}: its held-out loss is taken to a moving "
                "target; use 'last', and compare checkpoints by their samples"
            )
        if self.teacher and not kind.taught:
            raise ValueError(
                f"teacher is set but the objective is {self.objective!r}, which learns from data alone: use "
                f"{', '.join(repr(name) for name in NAMES if family(name).taught)}"
            )
        kind.check(self)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint naming the known name nearest to a wrong one, or listing them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """A dataclass from nested dictionaries, strictly.

    Raises:
        ValueError: unknown key (with the nearest known one), wrong type, or a value its class refuses.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{where.rstrip('.') or cls.__name__} is a section: expected a table, got {values!r}"
        )
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ValueError(f"unknown key {where + key!r}: {nearest(name, names)}")
        hint = hints[name]
        path = f"{where}{name}"
        if dataclasses.is_dataclass(hint):
            out[name] = from_dict(hint, value, path + ".")  # type: ignore[arg-type]
        else:
            out[name] = _coerce(hint, value, path)
    return cls(**out)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{path} must be a list, got {type(value).__name__} {value!r}")
        (kind,) = typing.get_args(hint)
        return [_coerce(kind, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path} must be {hint.__name__}, got {type(value).__name__} {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of a config."""
    return dataclasses.asdict(config)


def resolved(config: RunConfig) -> dict[str, Any]:
    """What of a run's configuration its result depends on: not where things lie, nor on what it is computed."""
    values = to_dict(config)
    for path in ("teacher", "init", "recipe"):
        del values[path]
    del values["train"]["device"], values["train"]["shard"], values["data"]["path"]
    return values


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: a path, or the bare name of one that comes with the package ("grammar")."""
    path = Path(name)
    if path.suffix or len(path.parts) > 1:
        return path
    here = Path(__file__).resolve().parent
    folders = [here / "recipes", here.parents[1] / "recipes"]  # installed; from a checkout
    for folder in folders:
        if (folder / f"{name}.toml").exists():
            return folder / f"{name}.toml"
    known = sorted({p.stem for folder in folders for p in folder.glob("*.toml")})
    raise ValueError(
        f"no recipe named {str(name)!r}: {nearest(str(name), known)}; or give the path of a .toml file"
    )


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as dictionaries, with errors that name it."""
    path = Path(path)
    try:
        with path.open("rb") as f:
            return tomllib.load(f)
    except FileNotFoundError:
        raise ValueError(
            f"no recipe at {path}: give the path of a .toml file, such as recipes/grammar.toml"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: a recipe is a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def read_run_config(folder: str | Path) -> RunConfig:
    """config.toml of a run directory.

    Raises:
        ValueError: no run there, or a damaged one.
    """
    path = Path(folder) / "config.toml"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.toml: it is not a run directory")
    try:
        values = read_toml(path)
        if values.get("model", {}).get("vocabulary"):  # a model that was made
            values["model"] = as_it_was(values["model"])
            values["flow_map"] = maps_as_they_were(values)
        return from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def maps_as_they_were(values: dict[str, Any]) -> dict[str, Any]:
    """The flow map's table of a run's saved values, with what has become a choice, or another default, as it was then.

    Before there was a choice, a teacher that there was made the targets of the diagonal, and without one a frozen
    embedding meant nothing. To other objectives nothing of it means anything.
    """
    table = values.get("flow_map", {})
    if values.get("objective") not in ("flow-map", "correction"):
        return {}
    if not isinstance(table, dict) or "diagonal_target" in table:
        return table
    return (
        {**table, "diagonal_target": "teacher"}
        if values.get("teacher")
        else {**table, "freeze_embedding": False}
    )


def load_recipe(path: str | Path, corpus: str = "") -> RunConfig:
    """A recipe, with a corpus by name in place of its own where one is given."""
    values = with_corpus(read_toml(recipe_path(path)), corpus)
    try:
        return from_dict(RunConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def with_corpus(values: dict[str, Any], corpus: str) -> dict[str, Any]:
    """The tables of a recipe for a corpus by name: what they say of another text and its vocabulary goes, and passages
    are as long as is usual for it. As they are for any other corpus, or their own."""
    if corpus not in CORPORA or values.get("data", {}).get("corpus") == corpus:
        return values
    model = {name: value for name, value in values.get("model", {}).items() if name != "vocab_size"}
    return values | {"data": {"corpus": corpus}, "model": model | {"length": CORPORA[corpus].length}}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the second's values over the first's."""
    out = dict(base)
    for key, value in over.items():
        out[key] = (
            merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
        )
    return out


def nested(dotted: typing.Mapping[str, Any]) -> dict[str, Any]:
    """{"train.steps": 4} as {"train": {"steps": 4}}."""
    out: dict[str, Any] = {}
    for name, value in dotted.items():
        *sections, last = name.split(".")
        branch: dict[str, Any] = {last: value}
        for section in reversed(sections):
            branch = {section: branch}
        out = merge(out, branch)
    return out


def dotted(values: typing.Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """{"train": {"steps": 4}} as {"train.steps": 4}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= dotted(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return out


def dump_toml(config: RunConfig) -> str:
    """The resolved config as TOML."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def default_run_folder(recipe: str | Path) -> Path:
    """runs/<recipe's name>, under the present folder."""
    return Path("runs") / Path(os.path.basename(recipe)).stem
