"""Families of models: what training, sampling and files need to know of one, and nothing else of it.

A family is one class, in one file: its network, its objective, its sampler. The loop, the command line and the reports
know families by this protocol alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flowlm.clock import Clock
    from flowlm.config import RunConfig
    from flowlm.denoiser import DenoiserConfig
    from flowlm.samplers import Sample, Step


TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""At which frontiers are measured."""


class Objective:
    """What the training loop asks of an objective. What is not said here needs nothing between steps.

    It splits in two so that a batch may be accumulated or sharded in any way with the same result: `draw` makes the
    per-row randomness of the whole batch, `losses` works on any of its rows.
    """

    gather: Callable[[list[Any]], list[Any]] = list
    """What all processes of a run have seen of a batch, in the order of its rows; set by the loop. Every process must
    ask, and what is on a device be brought to the CPU before."""
    steady: bool = True
    """Whether `losses` asks the network it trains as often for any rows as for any others."""
    kinds: tuple[str, ...] = ()
    """Names of the kinds of rows, if there are several."""

    def prepare(self, model: Any, step: int | None = None) -> None:
        """Called once a step, before any micro-batch; the step is None where none is taken, for a held-out loss."""

    def noise(self, rows: Sequence[tuple[int | str, ...]], length: int, device: torch.device) -> Tensor:
        """Random numbers of each row (len(rows), ...), keyed by its name; after `prepare`."""
        raise NotImplementedError

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Per-row draws of a global batch of num rows, after `prepare`: tensors (num,), on the CPU. "kind" numbers
        `kinds`."""
        raise NotImplementedError

    def losses(self, model: Any, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Per-token losses (B, L), nats.

        Args:
            tokens: (B, L).
            noise: of `noise`.
            draws: the rows' share of `draw`, on the CPU.
        """
        raise NotImplementedError

    def place(self, model: Any, draws: dict[str, Tensor]) -> Tensor | None:
        """Where in [0, 1] each row's noise level lies, for held-out losses by bins; None where there is none."""
        return None

    def report(self) -> dict[str, float]:
        """Figures of the last step for metrics.jsonl, beside its loss; every process of a run asks for them."""
        return {}

    def warning(self) -> str:
        """What has gone wrong for long, and what helps; asked after each `report`, empty most of the time."""
        return ""

    def remedy(self) -> str:
        """What helps a model whose passages repeat themselves."""
        return "lower --optim.lr and --optim.muon-lr, or train longer"

    def networks(self) -> list[nn.Module]:
        """Of its own, beside those that it was made with: copies, that nothing else reaches."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What a resume needs beyond the weights; every process of a run asks for it."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Ask:
    """What a sampler is asked for, whatever its family. Passage i depends on (seed, first + i) alone."""

    num: int
    length: int
    """Tokens in a passage."""
    steps: int
    seed: int
    first: int
    clock: Clock | None = None
    """In whose τ a flow's grid is uniform; the network's own when None."""
    callback: Callable[[Step], None] | None = None
    """Called at each network call."""


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    teacher: nn.Module | None
    """The network to distil, frozen."""
    source: DenoiserConfig | None
    """Of the weights it starts with; None for fresh ones."""


class Family:
    """One family of models. What is not said here is as for an undistilled one without clocks."""

    name: ClassVar[str]
    """In recipes: objective = name."""
    label: ClassVar[str]
    """In tables."""
    about: ClassVar[str]
    """What it is, in a few words."""
    writes: ClassVar[str]
    """How it writes, a sentence."""
    network_name: ClassVar[str]
    """Families that share it share the network: a student and its teacher do."""
    taught: ClassVar[bool] = False
    """Whether it may learn from a teacher."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Of the sampler, with their defaults."""
    sweep: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Options that trade entropy for perplexity, with the values at which a frontier is measured, one at a time."""
    held_out_ranks: ClassVar[bool] = True
    """Whether held-out losses of two checkpoints can be compared: not those taken to a moving target."""
    likelihood: ClassVar[str] = ""
    """What the held-out loss, summed over a passage, is of -log p of it: "exact", a "bound", or neither."""

    def fill(self, run: RunConfig) -> dict[str, Any]:
        """Fields of the model that the objective decides."""
        return {"family": self.name}

    def check(self, run: RunConfig) -> None:
        """ValueError for settings that mean nothing here."""

    def check_source(self, run: RunConfig, source: DenoiserConfig, name: str) -> None:
        """ValueError for weights of `name` that this family cannot start from, or a teacher it cannot have."""
        if family(source.family).network_name != self.network_name:
            raise ValueError(
                f"{name} is of the family {source.family!r}, and {self.name!r} needs one of {self.network_name!r}: "
                "they have different networks"
            )

    def network(self, config: DenoiserConfig) -> nn.Module:
        """An untrained network."""
        raise NotImplementedError

    def part(self, network: Any, source: DenoiserConfig) -> tuple[nn.Module, str]:
        """What of a network takes the weights of `source`, and under which beginning of their names they lie there."""
        return network, ""

    def missing(self, source: DenoiserConfig) -> tuple[str, ...]:
        """Beginnings of the names of parameters that weights of `source` do not have."""
        return ()

    def begin(self, network: Any, start: Start, run: RunConfig, tokens: Callable[[int], Tensor]) -> None:
        """What is set before the first step; tokens(n): n rows of training tokens, from all over."""

    def after_step(self, network: Any) -> None:
        """What is done to a network after each step of the optimizer, and to the average."""

    def clocks(self, network: Any, run: RunConfig) -> tuple[Clock | None, Clock | None]:
        """In which times are drawn for training, and for held-out losses."""
        return None, None

    def keeps_teacher(self, run: RunConfig) -> bool:
        """Whether a run needs its teacher beyond where it starts."""
        return True

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        """What is minimised; the teacher is None where none is kept."""
        raise NotImplementedError

    def unit(self, run: RunConfig) -> str:
        """Of held-out losses."""
        return "nats a token"

    def calls(self, steps: int, length: int) -> int:
        """Network calls that `steps` asked for are."""
        return steps

    def sample(self, network: Any, ask: Ask, **options: Any) -> Sample:
        """The passages asked for, by options of `check_options`."""
        raise NotImplementedError

    def matters(self, option: str, config: DenoiserConfig, steps: int, options: Mapping[str, Any]) -> bool:
        """Whether an option of the sweep changes what a network writes in so many steps, beside the other options."""
        return True

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's options, with defaults for what is not given. ValueError: one that it does not have."""
        other = sorted(options.keys() - self.options.keys())
        if other:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"{self.label} has no sampler option {', '.join(other)}: it has {known}")
        return {**self.options, **options}


_WHERE = {
    "flow": "flowlm.flows:FLM",
    "flow-map": "flowlm.flows:FMLM",
    "ar": "flowlm.discrete.ar:AR",
    "mdlm": "flowlm.discrete.mdlm:MDLM",
    "sedd": "flowlm.discrete.sedd:SEDD",
    "duo": "flowlm.discrete.duo:Duo",
    "sdtt": "flowlm.discrete.sdtt:SDTT",
    "duo-dcd": "flowlm.discrete.consistency:DCD",
    "di4c": "flowlm.discrete.di4c:Di4C",
    "duo-di4c": "flowlm.discrete.di4c:DuoDi4C",
    "correction": "flowlm.correction:Correction",
}
"""Of each objective, by its name in recipes: module and class."""

NAMES = tuple(_WHERE)


def family(name: str) -> Family:
    """The family of an objective. ValueError: there is none of that name."""
    if name not in _WHERE:
        raise ValueError(f"objective = {name!r}: use {', '.join(repr(known) for known in NAMES)}")
    module, cls = _WHERE[name].split(":")
    made: Family = getattr(importlib.import_module(module), cls)()
    return made


def family_of(config: DenoiserConfig) -> Family:
    """The family of a saved model."""
    return family("flow-map" if config.family == "flow" and config.two_times else config.family)
