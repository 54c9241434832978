"""FLM: cross-entropy of the clean tokens given the noisy state (arXiv 2602.16813, the FLM objective).

E_{τ~U[0,1]} mean_l -log D_{t(τ)}(y_t)_l[token_l]

Or the squared error Σ_k (D_k - 1[k = token])², which the paper compares it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowlm import rng
from flowlm.clock import Clock
from flowlm.denoiser import Denoiser
from flowlm.device import moved
from flowlm.families import Objective
from flowlm.objectives.draws import stratified
from flowlm.path import DenseNoise, IsotropicNoise, LowRankNoise, corrupt


@dataclass(frozen=True)
class FlowConfig:
    """How a flow is trained."""

    loss: str = "cross-entropy"
    """To the clean tokens: "cross-entropy", or "squared-error" of probabilities, for comparison."""

    def __post_init__(self) -> None:
        if self.loss not in ("cross-entropy", "squared-error"):
            raise ValueError(f"flow.loss = {self.loss!r}: use 'cross-entropy' or 'squared-error'")


class FlowObjective(Objective):
    """The FLM objective.

    Args:
        clock: sampling clock, in whose τ times are uniform.
        config: the loss.
    """

    def __init__(self, clock: Clock, config: FlowConfig | None = None):
        self.clock, self.config = clock, config or FlowConfig()
        self._noise: DenseNoise | LowRankNoise | IsotropicNoise | None = None

    def prepare(self, model: Denoiser, step: int | None = None) -> None:
        self._noise = model.noise_law()

    @property
    def noise_width(self) -> int:
        assert self._noise is not None
        return self._noise.width

    def noise(self, rows: Sequence[tuple[int | str, ...]], length: int, device: torch.device) -> Tensor:
        return rng.normal_rows(rows, (length, self.noise_width), device)

    def place(self, model: Denoiser, draws: dict[str, Tensor]) -> Tensor:
        return model.clock.tau(moved(draws["t"], model.embedding.device))

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"t": self.clock.time(stratified(num, generator)).float()}

    def losses(self, model: Denoiser, tokens: Tensor, xi: Tensor, draws: dict[str, Tensor]) -> Tensor:
        assert self._noise is not None
        t = moved(draws["t"], tokens.device)
        with model.frozen_embedding():
            y = corrupt(tokens, t, model.embedding, self._noise(xi))
            posterior = model(y, t)
            if self.config.loss == "squared-error":
                return posterior.squared_error(tokens)
            return posterior.cross_entropy(tokens)
