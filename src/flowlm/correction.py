"""A correction around a frozen flow, the first of two stages of distillation (arXiv 2602.16813, first version).

    F_{s,t}(x) = x + (t-s) b_s(x) + ½ (t-s)² g_{s,t}(x),   b_s = (D_s - x)/(1-s)

is a step X_{s,t} = x + (t-s)/(1-s) (δ - x) of the flow map with

    δ_{s,t} = D_s + ½ (1-s)(t-s) g_{s,t},

the flow's own posterior on the diagonal, whatever g is. It is learned by the semigroup identity in squared errors. δ
need not lie on the simplex: in the second stage a flow map with a softmax is regressed on it (flow_map.identity =
"correction").
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm.clock import Clock
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.families import Ask, Objective, Start
from flowlm.flows import FLM
from flowlm.objectives import FlowMapObjective
from flowlm.path import DenseNoise, IsotropicNoise, LowRankNoise, times_like
from flowlm.posterior import Posterior, Regression
from flowlm.samplers import Sample

if TYPE_CHECKING:
    from flowlm.config import RunConfig


class CorrectedFlow(nn.Module):
    """A frozen denoiser of one time, and a network g of two times that makes a flow map of it.

    Args:
        config: of the flow, but for its family and the second time.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        flow = dataclasses.replace(config, family="flow", two_times=False, head_start=0.0)
        self.flow = Denoiser(flow)
        self.correction = Denoiser(dataclasses.replace(flow, two_times=True, tied_head=False))
        # g has no bias and no cap: it is a change, and none at first.
        self.correction.head = _Nothing()  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.backbone.width))
        self.flow.requires_grad_(False)
        self.correction.embedding.requires_grad_(False)

    @property
    def embedding(self) -> nn.Parameter:
        """E (V, d), the flow's."""
        return self.flow.embedding

    @property
    def clock(self) -> Clock:
        """The flow's."""
        return self.flow.clock

    def noise_law(self) -> DenseNoise | LowRankNoise | IsotropicNoise:
        """The flow's."""
        return self.flow.noise_law()

    def train(self, mode: bool = True) -> CorrectedFlow:
        super().train(mode)
        self.flow.eval()  # frozen: no dropout of its own
        return self

    @contextlib.contextmanager
    def frozen_embedding(self) -> Iterator[None]:
        """As of `Denoiser`."""
        with self.flow.frozen_embedding(), self.correction.frozen_embedding():
            yield

    def begin(self) -> None:
        """Let the correction start from the flow's weights, and from no change."""
        self.correction.load_state_dict(self.correction.state_dict() | _without_head(self.flow.state_dict()))

    def forward(self, y: Tensor, s: Tensor | float, t: Tensor | float | None = None) -> Posterior:
        """The flow's D_s(y) when t is None, else δ_{s,t}(y), a mean that need not lie on the simplex.

        Args:
            y: state (B, L, d).
            s, t: flow times, scalar, (B,) or (B, L), s ≤ t.
        """
        flow = self.flow(y, s)
        if t is None:
            return flow
        change = self.correction(y, s, t).hidden
        start, end = times_like(s, y), times_like(t, y)
        scale = (0.5 * (1 - start) * (end - start)).to(change.dtype)
        head = _mean_of(flow.head, self.weight)
        return Regression(torch.cat([flow.hidden, scale * change], -1), head, self.embedding)


class _Nothing(nn.Module):
    """In the place of a head that is not used."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def _mean_of(head: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Hidden states of flow and correction, side by side (..., 2d), to the mean of the one-hot token (..., V)."""

    def mean(hidden: Tensor) -> Tensor:
        flow, change = hidden.chunk(2, -1)
        return head(flow).softmax(-1) + F.linear(change, weight.to(change.dtype)).float()

    return mean


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


#: Of the objective's settings, those that it cannot do without.
_NEEDED: Mapping[str, Any] = {
    "diagonal": 0.0,
    "flow_first": 0.0,
    "identity": "psd",
    "loss": "squared-error",
    "boundary_target": "self",
    "freeze_embedding": True,
}


class Correction(FLM):
    """An FLM with its correction: the first of two stages."""

    name, label, network_name = "correction", "FLM+g", "correction"
    about = "flow with a correction, two times"
    writes = (
        "A flow language model with a correction of its steps: it writes in a few steps, each of which calls two "
        "networks."
    )
    taught, held_out_ranks = True, False
    sweep: ClassVar[Mapping[str, Any]] = {name: FLM.sweep[name] for name in ("prior_scale", "gamma")}

    def fill(self, run: RunConfig) -> dict[str, Any]:
        return {"family": self.name, "two_times": True, "head_start": 0.0}

    def check(self, run: RunConfig) -> None:
        for name, value in _NEEDED.items():
            if getattr(run.flow_map, name) != value:
                raise ValueError(
                    "objective = 'correction' learns by the semigroup in squared errors around a frozen flow, and is "
                    f"that flow on the diagonal: set flow_map.{name} = {value!r}, not "
                    f"{getattr(run.flow_map, name)!r}"
                )

        if run.clock.kind == "adaptive":
            raise ValueError(
                "clock.kind = 'adaptive' follows the losses of rows on the diagonal, and objective = 'correction' has "
                "none: leave the clock fixed"
            )

    def check_source(self, run: RunConfig, source: DenoiserConfig, name: str) -> None:
        if source.family == self.name and name == run.init:
            return
        if (
            source.family != "flow"
            or source.two_times
            or source.output == "linear"
            or source.state != "one-hot"
        ):
            raise ValueError(
                f"{name} is no FLM with probabilities over one-hot tokens: a correction is put around one, with "
                "--teacher RUN"
            )

    def network(self, config: DenoiserConfig) -> CorrectedFlow:  # type: ignore[override]
        return CorrectedFlow(config)

    def part(self, network: Any, source: DenoiserConfig) -> tuple[nn.Module, str]:
        return (network.flow if source.family == "flow" else network), ""

    def begin(self, network: Any, start: Start, run: RunConfig, tokens: Callable[[int], Tensor]) -> None:
        if start.source is None and start.teacher is None:
            raise ValueError(
                "objective = 'correction' is put around a trained FLM: name it with --teacher RUN"
            )
        if start.source is None or start.source.family == "flow":
            network.begin()

    def after_step(self, network: Any) -> None:
        pass

    def unit(self, run: RunConfig) -> str:
        return "of squared error a token"

    def matters(self, option: str, config: DenoiserConfig, steps: int, options: Mapping[str, Any]) -> bool:
        return option not in ("temperature", "last") and super().matters(option, config, steps, options)

    def calls(self, steps: int, length: int) -> int:
        return 2 * steps  # the flow and its correction

    def sample(self, network: Any, ask: Ask, **options: Any) -> Sample:
        return Sample(super().sample(network, ask, **options).tokens, self.calls(ask.steps, ask.length))

    def keeps_teacher(self, run: RunConfig) -> bool:
        return False  # it is a part of the network

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        assert clock is not None
        return FlowMapObjective(run.flow_map, clock, network.flow, averaged, run.train.steps)
