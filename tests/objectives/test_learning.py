"""Training on the exact toy: tiny networks come close to the exact posterior, flow map and law.

A frozen budget of seconds on one core; the thresholds are distances to the exact answer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toy
from flowlm.clock import DecodingErrorClock
from flowlm.denoiser import Denoiser
from flowlm.objectives import FlowMapObjective, FlowObjective
from flowlm.objectives.flow_map import FlowMapConfig
from flowlm.samplers import sample
from flowlm.training.flops import counter
from toy import LANGUAGE, LENGTH

pytestmark = pytest.mark.slow
CLOCK = DecodingErrorClock(toy.VOCAB)
SAMPLES = 40_000


def distance(model: Denoiser, steps: int = 1) -> float:
    """Total variation between the exact law and 40,000 samples (0.009 of it their own noise)."""
    return LANGUAGE.total_variation(sample(model, SAMPLES, LENGTH, steps, seed=5).tokens)


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    model = toy.tiny_denoiser()
    toy.train(FlowObjective(CLOCK), model, 1200, lr=5e-3)
    return model.requires_grad_(False).eval()


def test_flow_learns_the_posterior(teacher: Denoiser) -> None:
    untrained = toy.kl_to_exact(toy.tiny_denoiser(), pairs=False)
    assert untrained > 0.2
    assert toy.kl_to_exact(teacher, pairs=False) < 0.02
    assert distance(teacher, steps=8) < 0.05
    assert distance(teacher, steps=1) > 0.2, (
        "one step of the flow must not do, or the flow map proves nothing"
    )


PUBLISHED: dict[str, Any] = {
    "diagonal": 0.5,
    "diagonal_target": "teacher",
    "freeze_embedding": True,
    "boundary": 1 / 32,
    "boundary_target": "self",
    "target": "student",
}


@pytest.mark.parametrize(
    ("options", "steps"),
    [(PUBLISHED | {"boundary": 0.25, "boundary_target": "teacher", "target": "averaged"}, 800)],
    ids=["rollout at the boundary, averaged target"],
)
def test_flow_map_learns_from_the_teacher(options: dict[str, Any], steps: int, teacher: Denoiser) -> None:
    student = toy.two_time_from(teacher)
    before = toy.kl_to_exact(student, pairs=True)
    averaged = toy.frozen_copy(student)
    objective = FlowMapObjective(FlowMapConfig(**options), CLOCK, teacher, averaged)
    toy.train(objective, student, steps, averaged=averaged)
    assert before > 0.05
    assert toy.kl_to_exact(student, pairs=True) < 0.02
    assert toy.kl_to_exact(student, pairs=False) < 0.02
    assert distance(student) < 0.05


def flops(objective: FlowMapObjective, teacher: Denoiser) -> int:
    """Of one step."""
    student, gen = toy.two_time_from(teacher), torch.Generator().manual_seed(0)
    objective.prepare(student)
    tokens = LANGUAGE.sample(256, gen)
    xi = torch.randn(256, LENGTH, objective.noise_width, generator=gen)
    with counter() as counted:
        objective.losses(student, tokens, xi, objective.draw(256, gen)).mean().backward()
    return counted.get_total_flops()


#: What each reaches: KL to the exact δ_{s,t}, one-step total variation; twice the semigroup's bounds. The endpoint's
#: loss is not least at the flow map of a law that leaves a choice, and stays away from it.
IDENTITIES: dict[str, tuple[float, float]] = {
    "psd": (0.02, 0.05),
    "lsd": (0.04, 0.1),
    "lsd-logit": (0.04, 0.1),
    "esd": (0.04, 0.1),
    "esd-logit": (0.04, 0.1),
    "cfm": (0.4, 0.2),
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_every_identity_learns_at_equal_compute(identity: str, teacher: Denoiser) -> None:
    """As much as 1,200 steps of the published setting take, counted in operations. `pytest -rP` shows the table."""
    kl, tv = IDENTITIES[identity]
    options = PUBLISHED | {"identity": identity}
    published = flops(FlowMapObjective(FlowMapConfig(**PUBLISHED), CLOCK, teacher), teacher)
    steps = 1200 * published // flops(FlowMapObjective(FlowMapConfig(**options), CLOCK, teacher), teacher)
    objective = FlowMapObjective(FlowMapConfig(**options), CLOCK, teacher, steps=steps)
    student = toy.two_time_from(teacher)
    toy.train(objective, student, steps)
    found = toy.kl_to_exact(student, pairs=True), distance(student)
    print(f"{identity}: {steps} steps, KL {found[0]:.4f}, one-step total variation {found[1]:.3f}")
    assert 500 < steps <= 1200
    assert found[0] < kl
    assert found[1] < tv


@pytest.mark.parametrize("identity", ["psd", "lsd", "esd"])
def test_flow_map_learns_without_a_teacher(identity: str) -> None:
    """The flow first, then its map, from the text alone."""
    student = toy.tiny_denoiser(two_times=True)
    alone = PUBLISHED | {"diagonal_target": "data", "flow_first": 0.5, "identity": identity}
    objective = FlowMapObjective(FlowMapConfig(**alone), CLOCK, steps=1500)
    toy.train(objective, student, 1500, lr=5e-3)
    kl, tv = toy.kl_to_exact(student, pairs=True), distance(student)
    print(f"{identity} without a teacher: 1500 steps, KL {kl:.4f}, one-step total variation {tv:.3f}")
    assert kl < 0.02
    assert tv < 0.1
