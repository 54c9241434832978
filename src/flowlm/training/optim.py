"""The optimizer: Muon for the matrices inside the blocks, AdamW for everything else."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowlm.config import OptimConfig
from flowlm.weights import like, whole


class Optimizer:
    """AdamW and Muon behind one step, with the learning-rate schedule; its state is named by parameter.

    Args:
        model: parameters without gradient are left out.
        config: rates and schedule.
        steps: length of the schedule.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int):
        self.config, self.steps = config, steps
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {name: p for name, p in named.items() if config.muon_lr and is_hidden_matrix(name, p)}
        rest = {name: p for name, p in named.items() if name not in hidden}
        self._groups: list[tuple[torch.optim.Optimizer, dict[str, nn.Parameter], float]] = []
        if rest:
            adam = torch.optim.AdamW(
                list(rest.values()),
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                fused=True,
            )
            self._groups.append((adam, rest, config.lr))
        if hidden:
            muon = torch.optim.Muon(
                list(hidden.values()),
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
            )
            self._groups.append((muon, hidden, config.muon_lr))
        self._parameters = list(named.values())

    def scale(self, step: int) -> float:
        """The schedule's factor at a step (from 0)."""
        cfg = self.config
        warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
        progress = step / self.steps
        if cfg.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * progress))
        if cfg.schedule == "trapezoid" and cfg.cooldown:
            return warm * min(1.0, (1 - progress) / cfg.cooldown)
        return warm

    def step(self, step: int) -> Tensor:
        """Clip, update, clear the gradients; returns the gradient's norm before clipping."""
        limit = self.config.clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self._parameters, limit))
        factor = self.scale(step)
        for optimizer, _, rate in self._groups:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, as tensors named "<parameter>/<quantity>"."""
        out = {}
        for optimizer, named, _ in self._groups:
            for name, parameter in named.items():
                for quantity, value in optimizer.state[parameter].items():
                    out[f"{name}/{quantity}"] = torch.as_tensor(value)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: the state is of other parameters.
        """
        owners = {name: (optimizer, p) for optimizer, named, _ in self._groups for name, p in named.items()}
        foreign = sorted({key.rsplit("/", 1)[0] for key in state} - owners.keys())
        if foreign:
            raise ValueError(
                f"the optimizer state is of another model: unknown parameters {', '.join(foreign)}"
            )
        for key, value in state.items():
            name, quantity = key.rsplit("/", 1)
            optimizer, parameter = owners[name]
            # AdamW's step count stays a CPU-or-device scalar as torch made it; moments live with their parameter.
            value = value.clone().to(parameter.device)
            optimizer.state[parameter][quantity] = like(value, parameter) if value.dim() else value


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is one of the matrices inside the blocks, which Muon may take."""
    return parameter.ndim == 2 and ".blocks." in f".{name}" and "modulation" not in name
