"""FLM: cross-entropy of the clean tokens given the noisy state (arXiv 2602.16813, the FLM objective).

E_{τ~U[0,1]} mean_l -log D_{t(τ)}(y_t)_l[token_l]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowlm import rng
from flowlm.clock import Clock
from flowlm.denoiser import Denoiser
from flowlm.families import Objective
from flowlm.objectives.draws import stratified
from flowlm.path import DenseNoise, LowRankNoise, corrupt


class FlowObjective(Objective):
    """The FLM objective.

    Args:
        clock: sampling clock, in whose τ times are uniform.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self._noise: DenseNoise | LowRankNoise | None = None

    def prepare(self, model: Denoiser, step: int | None = None) -> None:
        self._noise = model.noise_law()

    @property
    def noise_width(self) -> int:
        assert self._noise is not None
        return self._noise.width

    def noise(self, rows: Sequence[tuple[int | str, ...]], length: int, device: torch.device) -> Tensor:
        return rng.normal_rows(rows, (length, self.noise_width), device)

    def place(self, model: Denoiser, draws: dict[str, Tensor]) -> Tensor:
        return model.clock.tau(draws["t"].to(model.embedding.device))

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"t": self.clock.time(stratified(num, generator)).float()}

    def losses(self, model: Denoiser, tokens: Tensor, xi: Tensor, draws: dict[str, Tensor]) -> Tensor:
        assert self._noise is not None
        t = draws["t"].to(tokens.device)
        with model.frozen_embedding():
            y = corrupt(tokens, t, model.embedding, self._noise(xi))
            return model(y, t).cross_entropy(tokens)
