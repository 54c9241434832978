"""One training step of an objective on random tokens, and the flow with its one-hot state in full."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flowlm import rng
from flowlm.clock import Clock
from flowlm.config import OptimConfig
from flowlm.device import moved, precision
from flowlm.families import Objective
from flowlm.objectives import FlowObjective
from flowlm.training.optim import Optimizer


def clock_of(model: Any) -> Clock:
    """The clock that times are drawn by, on the CPU as in training."""
    clock: Clock = copy.deepcopy(model.clock).cpu()
    return clock


def optimizer_of(model: nn.Module, config: OptimConfig | None = None) -> Optimizer:
    """Its optimizer with its moments: they come with a parameter's first gradient, outlive the step and are not its own
    memory. One parameter at a time, so that no gradients pile up."""
    optimizer = Optimizer(model, config or OptimConfig(), steps=1000)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step(0)
    return optimizer


class TrainingStep:
    """Draws, forward, backward and optimizer, each time it is called, with draws of their own.

    Args:
        model, objective, optimizer: what is trained, towards what, by what.
        tokens: (B, L), of every step, where the model is.
        dtype: compute dtype of the network.
    """

    def __init__(self, model: Any, objective: Objective, optimizer: Optimizer, tokens: Tensor, dtype: str):
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self.tokens, self.dtype = tokens, getattr(torch, dtype)
        self.count = 0

    def loss(self) -> Tensor:
        """The mean loss of the next step."""
        device, (batch, length) = self.tokens.device, self.tokens.shape
        self.model.train()
        self.objective.prepare(self.model, self.count)
        draws = self.objective.draw(batch, rng.generator(0, "draw", self.count))
        noise = self.objective.noise([(0, "noise", self.count, i) for i in range(batch)], length, device)
        with precision(device, self.dtype):
            return self.objective.losses(self.model, self.tokens, noise, draws).mean()

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step(self.count)
        self.count += 1
        return float(loss.detach())


class DenseFlow(FlowObjective):
    """The flow's objective by the formulas as they stand: z, the one-hots and x_t = (1-t) z + t·onehot, (B, L, V), and
    y = x_t E, by which the gradient reaches E."""

    _vocab = 0

    def prepare(self, model: Any, step: int | None = None) -> None:
        self._vocab = model.config.vocab_size

    @property
    def noise_width(self) -> int:
        return self._vocab

    def losses(self, model: Any, tokens: Tensor, z: Tensor, draws: dict[str, Tensor]) -> Tensor:
        t = moved(draws["t"], z.device)
        x = self.state(tokens, z, t[:, None, None])
        # In float32, as the package makes its states: autocast would round the noise.
        with torch.autocast(x.device.type, enabled=False):
            y = x @ model.embedding
        losses: Tensor = model(y, t).cross_entropy(tokens)
        return losses

    def state(self, tokens: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x_t (B, L, V)."""
        onehot = torch.zeros_like(z).scatter_(-1, tokens[..., None], 1.0)
        return (1 - t) * z + t * onehot


class DenseFlowInPlace(DenseFlow):
    """The same x in the memory of z, and no one-hot: as thrifty as a dense state can be."""

    def state(self, tokens: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return z.mul_(1 - t).scatter_add_(-1, tokens[..., None], t.expand(*tokens.shape, 1))
