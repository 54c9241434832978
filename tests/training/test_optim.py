"""The optimizer: which parameters go where, the schedule's values, clipping, and a state that comes back."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowlm.backbone import BackboneConfig
from flowlm.config import OptimConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.training.optim import Optimizer

BLOCK_MATRICES = {
    f"backbone.blocks.{i}.{name}.weight" for i in range(2) for name in ("qkv", "out", "up", "down")
}


def _model() -> Denoiser:
    torch.manual_seed(0)
    backbone = BackboneConfig(width=32, depth=2, heads=2, conditioning=16)
    return Denoiser(DenoiserConfig(vocab_size=11, length=8, two_times=True, backbone=backbone))


def _gradients(model: Denoiser, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def _by(state: dict[str, Tensor], quantity: str) -> set[str]:
    return {key.rsplit("/", 1)[0] for key in state if key.endswith(f"/{quantity}")}


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_all_else() -> None:
    model = _model()
    optimizer = Optimizer(model, OptimConfig(), 10)
    _gradients(model, 0)
    optimizer.step(0)
    state = optimizer.state()
    assert _by(state, "momentum_buffer") == BLOCK_MATRICES
    everything = {name for name, _ in model.named_parameters()}
    assert (
        _by(state, "exp_avg") == _by(state, "exp_avg_sq") == _by(state, "step") == everything - BLOCK_MATRICES
    )


def test_muon_lr_zero_gives_everything_to_adamw() -> None:
    model = _model()
    optimizer = Optimizer(model, OptimConfig(muon_lr=0), 10)
    _gradients(model, 0)
    optimizer.step(0)
    assert _by(optimizer.state(), "momentum_buffer") == set()
    assert _by(optimizer.state(), "exp_avg") == {name for name, _ in model.named_parameters()}


def test_frozen_parameters_are_left_alone() -> None:
    model = _model()
    model.embedding.requires_grad_(False)
    before = model.embedding.clone()
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.5), 10)
    _gradients(model, 0)
    optimizer.step(5)
    assert torch.equal(model.embedding, before)
    assert not any(key.startswith("embedding/") for key in optimizer.state())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # linear warm-up over four steps, then constant
        ({"schedule": "constant", "warmup": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "constant", "warmup": 0}, {0: 1.0, 99: 1.0}),
        # half a cosine over the whole run
        (
            {"schedule": "cosine", "warmup": 0},
            {0: 1.0, 25: 0.5 * (1 + math.cos(math.pi / 4)), 50: 0.5, 75: 0.5 * (1 - math.cos(math.pi / 4))},
        ),
        ({"schedule": "cosine", "warmup": 20}, {9: 0.5 * 0.5 * (1 + math.cos(0.09 * math.pi))}),
        # flat until the cool-down's share is left, then linear to 0
        (
            {"schedule": "trapezoid", "warmup": 0, "cooldown": 0.4},
            {0: 1.0, 60: 1.0, 70: 0.75, 80: 0.5, 99: 0.025},
        ),
        ({"schedule": "trapezoid", "warmup": 10, "cooldown": 0.0}, {4: 0.5, 99: 1.0}),
    ],
)
def test_schedules(fields: dict[str, Any], expected: dict[int, float]) -> None:
    optimizer = Optimizer(_model(), OptimConfig(**fields), 100)
    assert {step: optimizer.scale(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_the_schedule_scales_both_rates(muon_lr: float) -> None:
    moved = []
    for step in (0, 3):  # a quarter of the rate, and all of it
        model = _model()
        before = copy.deepcopy(model.state_dict())
        config = OptimConfig(muon_lr=muon_lr, warmup=4, schedule="constant")
        optimizer = Optimizer(model, config, 10)
        _gradients(model, 0)
        optimizer.step(step)
        moved.append({name: value - before[name] for name, value in model.state_dict().items()})
    for name, change in moved[1].items():
        assert change.abs().max() > 0
        assert torch.allclose(4 * moved[0][name], change, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(("clip", "seen"), [(1.0, 1.0), (0.0, None)])
def test_clipping_bounds_the_norm_of_the_whole_gradient(clip: float, seen: float | None) -> None:
    model = _model()
    optimizer = Optimizer(model, OptimConfig(muon_lr=0, clip=clip, beta1=0.9), 10)
    _gradients(model, 0, scale=100.0)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert float(optimizer.step(0)) == pytest.approx(norm, rel=1e-5)  # told before clipping
    # AdamW's first moment is a tenth of the gradient that it saw
    moments = [v for k, v in optimizer.state().items() if k.endswith("/exp_avg")]
    used = 10 * math.sqrt(sum(float(m.double().square().sum()) for m in moments))
    assert used == pytest.approx(norm if seen is None else seen, rel=1e-4)


def test_gradients_are_cleared() -> None:
    model = _model()
    optimizer = Optimizer(model, OptimConfig(), 10)
    _gradients(model, 0)
    optimizer.step(0)
    assert all(p.grad is None for p in model.parameters())


def test_state_comes_back_bit_for_bit() -> None:
    model, config = _model(), OptimConfig(warmup=2, weight_decay=0.1)
    optimizer = Optimizer(model, config, 10)
    for step in range(3):
        _gradients(model, step)
        optimizer.step(step)
    other = copy.deepcopy(model)
    restored = Optimizer(other, config, 10)
    restored.load({key: value.clone() for key, value in optimizer.state().items()})
    for step in range(3, 6):
        for one, its in ((model, optimizer), (other, restored)):
            _gradients(one, step)
            its.step(step)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_state_of_another_model_is_refused() -> None:
    model = _model()
    optimizer = Optimizer(model, OptimConfig(), 10)
    _gradients(model, 0)
    optimizer.step(0)
    config = dataclasses.replace(model.config, two_times=False)
    with pytest.raises(ValueError, match=r"optimizer state is of another model.*end_embedding\.mlp\.0\.bias"):
        Optimizer(Denoiser(config), OptimConfig(), 10).load(optimizer.state())
