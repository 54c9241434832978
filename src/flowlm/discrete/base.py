"""What the discrete families have in common: the network over tokens, draws by row, and no clocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowlm import rng
from flowlm.denoiser import DenoiserConfig
from flowlm.device import moved
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from flowlm.families import TEMPERATURES, Ask, Family, Objective
from flowlm.objectives.draws import stratified
from flowlm.samplers import check_temperature

if TYPE_CHECKING:
    from flowlm.config import RunConfig

#: Fields of a model that mean something for flows alone.
FLOWS_ALONE = (
    "two_times",
    "clock",
    "state",
    "output",
    "input_scaling",
    "local_posterior",
    "prior_rank",
    "local_tokens",
    "head_start",
)
SCHEDULE = LogLinear()
#: Of those whose sampler has a temperature and a rule of the last step.
SWEEP: Mapping[str, Sequence[Any]] = {"temperature": TEMPERATURES, "last": ("categorical", "argmax")}

#: (network, tokens, noise, draws) -> losses (B, L).
Losses = Callable[[TokenNetwork, Tensor, Tensor, dict[str, Tensor]], Tensor]


class DiscreteObjective(Objective):
    """Losses of tokens, with uniform draws for each position.

    Args:
        losses: of a network, tokens, draws (n, B, L) on [0, 1) in float64, and times.
        uniforms: n.
        timed: whether rows have times, stratified on (0, 1).
        seeded: whether rows have a "seed" each, a number on the CPU: of noise too large to be drawn
            beforehand.
    """

    def __init__(self, losses: Losses, uniforms: int, timed: bool, seeded: bool = False):
        self._losses, self._uniforms, self._timed, self._seeded = losses, uniforms, timed, seeded

    def noise(self, rows: Sequence[tuple[int | str, ...]], length: int, device: torch.device) -> Tensor:
        return rng.uniform_rows(rows, (self._uniforms, length), device)

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        if not self._timed:
            return {"row": torch.arange(num)}
        draws = {"t": SCHEDULE.times(stratified(num, generator)).float()}
        if self._seeded:
            draws["seed"] = torch.randint(2**63 - 1, (num,), generator=generator)
        return draws

    def losses(self, model: Any, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        device = tokens.device
        # Generators are seeded from the CPU.
        there = {name: value if name == "seed" else moved(value, device) for name, value in draws.items()}
        return self._losses(model, tokens, noise.transpose(0, 1), there)

    def place(self, model: Any, draws: dict[str, Tensor]) -> Tensor | None:
        return draws.get("t")


class Discrete(Family):
    """A family over tokens themselves."""

    causal: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    """Whether the network reads a time."""
    extra: ClassVar[int] = 1
    """Tokens that are read and never written: the mask, or the beginning."""

    def check(self, run: RunConfig) -> None:
        plain = DenoiserConfig()
        for name in FLOWS_ALONE:
            if getattr(run.model, name) != getattr(plain, name):
                raise ValueError(
                    f"model.{name} = {getattr(run.model, name)!r} is for flows, and means nothing for objective = "
                    f"{self.name!r}: leave it out"
                )
        if run.clock.kind != "fixed":
            raise ValueError(
                f"clock.kind = {run.clock.kind!r} is for flows: objective = {self.name!r} draws its times evenly"
            )

    def matters(self, option: str, config: DenoiserConfig, steps: int, options: Mapping[str, Any]) -> bool:
        # The likeliest tokens are those of any temperature.
        return option != "temperature" or steps > 1 or options["last"] == "categorical"

    def needed(self, teacher: TokenNetwork | None) -> TokenNetwork:
        """The teacher. ValueError: there is none."""
        if teacher is None:
            raise ValueError(f"objective = {self.name!r} learns from a teacher alone: add --teacher RUN")
        return teacher

    def network(self, config: DenoiserConfig) -> TokenNetwork:
        return TokenNetwork(config, causal=self.causal, timed=self.timed, extra=self.extra)

    def _uniforms(
        self, ask: Ask, stream: str, shape: tuple[int, ...], device: torch.device
    ) -> Callable[[int], Tensor]:
        """Of each step, draws (..., num, L), of which row i depends on (seed, first + i) alone."""

        def at(step: int) -> Tensor:
            rows = [(ask.seed, stream, step, ask.first + i) for i in range(ask.num)]
            return rng.uniform_rows(rows, shape, device).movedim(0, -2)

        return at


def check_rule(temperature: float, last: str) -> None:
    """Refuse sampler options that mean nothing, with the reason."""
    check_temperature(temperature)
    if last not in ("categorical", "argmax"):
        raise ValueError(f"last = {last!r}: the last step's rule is 'argmax' or 'categorical'")
