"""FLM and FMLM as families: what the loop, the samplers and the files ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from flowlm.clock import AdaptiveClock, Clock
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.families import TEMPERATURES, Ask, Family, Objective, Start
from flowlm.objectives import FlowMapObjective, FlowObjective
from flowlm.samplers import DEFAULTS, Sample, sample

if TYPE_CHECKING:
    from flowlm.config import RunConfig

#: Passages, spread over the training data, whose mean a flow map's head start goes towards.
MEAN_ROWS = 8192


class FLM(Family):
    """A flow over one-hot tokens."""

    name, label, network_name = "flow", "FLM", "flow"
    about = "flow, one time"
    writes = "A flow language model: it writes a passage along a flow, in many small steps."
    options = DEFAULTS
    sweep: ClassVar[Mapping[str, Sequence[Any]]] = {
        "temperature": TEMPERATURES,
        "prior_scale": (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
        "gamma": (0.0, 0.25, 0.5, 1.0),
        "last": ("argmax", "categorical"),
    }

    def fill(self, run: RunConfig) -> dict[str, Any]:
        # A run that goes on has a vocabulary, and the head start it once was given.
        if run.model.head_start and not run.model.vocabulary:
            raise ValueError(
                f"model.head_start = {run.model.head_start} is filled in by itself: set flow_map.head_start, of a "
                "flow map (objective = 'flow-map')"
            )
        return {"family": "flow"}

    def check(self, run: RunConfig) -> None:
        if run.model.output == "linear" and (run.flow.loss, self.name) != ("squared-error", "flow"):
            raise ValueError(
                "model.output = 'linear' is a regression, for objective = 'flow' with flow.loss = 'squared-error' "
                "alone: use model.output = 'softmax'"
            )

    def network(self, config: DenoiserConfig) -> Denoiser:
        return Denoiser(config)

    def begin(self, network: Denoiser, start: Start, run: RunConfig, tokens: Callable[[int], Tensor]) -> None:
        if network.config.local_posterior and start.source is None and start.teacher is None:
            network.local.tell_apart(tokens(MEAN_ROWS), network.embedding)

    def after_step(self, network: Denoiser) -> None:
        network.constrain()

    def clocks(self, network: Denoiser, run: RunConfig) -> tuple[Clock, Clock]:
        clock: Clock = copy.deepcopy(network.clock)
        # Held-out times follow the conditioning clock: two losses are of one law, whatever training draws.
        held_out: Clock = copy.deepcopy(network.clock)
        if run.clock.kind == "adaptive":
            clock = AdaptiveClock(clock, floor=run.clock.floor)
        return clock, held_out

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        assert clock is not None
        return FlowObjective(clock, run.flow)

    def unit(self, run: RunConfig) -> str:
        squared = self.name == "flow" and run.flow.loss == "squared-error"
        return "of squared error a token" if squared else super().unit(run)

    def matters(self, option: str, config: DenoiserConfig, steps: int, options: Mapping[str, Any]) -> bool:
        if config.output == "linear" and option in ("temperature", "last"):
            return False  # it has no probabilities
        # One step mixes nothing and re-noises nothing: the likeliest tokens are those of any temperature.
        if option == "temperature":
            return steps > 1 or options["last"] == "categorical"
        return option != "gamma" or steps > 1

    def sample(self, network: Denoiser, ask: Ask, **options: Any) -> Sample:
        return sample(
            network,
            ask.num,
            ask.length,
            ask.steps,
            seed=ask.seed,
            first=ask.first,
            clock=ask.clock,
            callback=ask.callback,
            **options,
        )


class FMLM(FLM):
    """Its flow map."""

    name, label, about = "flow-map", "FMLM", "flow map, two times"
    writes = "A flow map language model: it writes a whole passage in one network call, or in a few."
    taught, held_out_ranks = True, False

    def fill(self, run: RunConfig) -> dict[str, Any]:
        return super().fill(run) | {
            "family": "flow",
            "two_times": True,
            "head_start": run.flow_map.head_start,
        }

    def check(self, run: RunConfig) -> None:
        super().check(run)
        if run.teacher and run.flow_map.flow_first:
            raise ValueError(
                f"flow_map.flow_first = {run.flow_map.flow_first} is for learning without a teacher: a student has its "
                "teacher's flow from the start; leave it out, or the teacher"
            )
        if run.clock.kind == "adaptive" and not run.flow_map.diagonal:
            raise ValueError(
                "clock.kind = 'adaptive' follows the losses of rows on the diagonal, and flow_map.diagonal = 0 has "
                "none: give it some, or leave the clock fixed"
            )
        if run.flow_map.weight == "inverse" and run.clock.kind == "adaptive":
            raise ValueError(
                "flow_map.weight = 'inverse' and clock.kind = 'adaptive' both follow the losses, and the clock would "
                "follow weighted ones: leave one of them out"
            )

    def check_source(self, run: RunConfig, source: DenoiserConfig, name: str) -> None:
        if name == run.teacher and (source.family == "correction") != (run.flow_map.identity == "correction"):
            raise ValueError(
                f"the teacher {name} is of the family {source.family!r}, and flow_map.identity = "
                f"{run.flow_map.identity!r}: a flow map is regressed on a corrected flow with identity = 'correction', "
                "and learned from an FLM by the others"
            )
        if source.family == "correction" and name == run.teacher:
            return
        super().check_source(run, source, name)
        if source.output == "linear":
            raise ValueError(
                f"{name} was trained with model.output = 'linear' and has no probabilities: a flow map is distilled "
                "from a flow with model.output = 'softmax'"
            )
        coupled = run.flow_map.asks_the_teacher and not run.flow_map.freeze_embedding
        if source.state != "one-hot" and coupled:
            raise ValueError(
                f"{name} was trained with model.state = {source.state!r}, whose noise is that of one embedding: use "
                "flow_map.freeze_embedding = true"
            )
        if name == run.teacher:
            if source.two_times:
                raise ValueError(
                    f"the teacher {name} is a flow map already: distil from the FLM it came from"
                )
        elif source.two_times and source.head_start != run.flow_map.head_start:
            raise ValueError(
                f"flow_map.head_start is {run.flow_map.head_start}, but {name} was distilled with "
                f"{source.head_start} and cannot change it: use --flow-map.head-start {source.head_start}"
            )

    def part(self, network: Any, source: DenoiserConfig) -> tuple[nn.Module, str]:
        return network, "flow." if source.family == "correction" else ""

    def missing(self, source: DenoiserConfig) -> tuple[str, ...]:
        # What an FLM has not: the second time and the mean of the head start.
        return () if self._is_map(source) else ("end_embedding.", "mean")

    @staticmethod
    def _is_map(source: DenoiserConfig) -> bool:
        return source.two_times and source.family == "flow"

    def begin(self, network: Denoiser, start: Start, run: RunConfig, tokens: Callable[[int], Tensor]) -> None:
        super().begin(network, start, run, tokens)
        if start.teacher is None and run.flow_map.freeze_embedding:
            raise ValueError(
                "flow_map.freeze_embedding keeps a teacher's embedding, and there is no teacher: name one with "
                "--teacher RUN, or use --flow-map.no-freeze-embedding"
            )
        if network.config.head_start and not (start.source is not None and self._is_map(start.source)):
            network.set_mean(tokens(MEAN_ROWS))
        if start.teacher is not None and run.flow_map.freeze_embedding:
            theirs: Tensor = start.teacher.embedding  # type: ignore[assignment]
            if not torch.equal(network.embedding, theirs.to(network.embedding.device)):
                raise ValueError(
                    "flow_map.freeze_embedding shares one embedding, but the student's differs from its teacher's: "
                    "start from the teacher (leave out --init), or use --flow-map.no-freeze-embedding"
                )
            network.embedding.requires_grad_(False)
            if network.config.head_start:
                network.mean.requires_grad_(False)

    def keeps_teacher(self, run: RunConfig) -> bool:
        return run.flow_map.asks_the_teacher

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        assert clock is not None
        return FlowMapObjective(run.flow_map, clock, teacher, averaged, run.train.steps)
