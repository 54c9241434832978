"""Training compute is what a step multiplies: known for a network whose products are counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flowlm.config import RunConfig, from_dict, merge, nested
from flowlm.training.flops import counter, flops_of_step
from flowlm.training.loop import Trainer
from helpers import flm, map_values, silent, values


def test_attention_on_a_cpu_is_counted() -> None:
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    with counter() as counted:
        F.scaled_dot_product_attention(q, q, q)
    forward = counted.get_total_flops()
    assert forward == 2 * 2 * (2 * 3 * 8 * 8 * 4)  # scores and their mean of the values, two operations each
    with counter() as counted:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    # the backward pass makes the scores again: five products instead of two
    assert counted.get_total_flops() == forward + 5 * forward // 2


def of(objective: str, over: dict[str, object] | None = None) -> float:
    config = from_dict(RunConfig, merge(values(), nested({"objective": objective, **(over or {})})))
    return flops_of_step(config)


def test_a_step_of_ar_by_hand() -> None:
    """A weight takes two operations forward and four backward for each token it meets."""
    b, length, d, conditioning, hidden = 8, 12, 32, 32, 64
    vocab = Trainer(from_dict(RunConfig, values()), "never made", say=silent).config.model.vocab_size
    block = 4 * d * d + 2 * d * hidden
    by_hand = 6 * b * length * (block + d * vocab)
    by_hand += 6 * b * 2 * length * length * d  # scores, and their mean of the values
    by_hand += 4 * b * conditioning * 8 * d  # modulation, of each row; to a constant no gradient passes
    assert of("ar", {"optim.muon_lr": 0.0, "model.backbone.attention_backend": "math"}) == by_hand


def test_muon_multiplies_too() -> None:
    assert of("ar") > of("ar", {"optim.muon_lr": 0.0})


def test_targets_and_teachers_are_counted() -> None:
    plain = {"optim.muon_lr": 0.0}
    alone = of("flow", plain)

    def student(over: dict[str, object] | None = None) -> float:
        return flops_of_step(from_dict(RunConfig, map_values(flm(), plain | (over or {}))))

    assert student() > 1.2 * alone  # its own targets
    assert student({"flow_map.diagonal": 1.0}) < student()
    asked = student({"flow_map.diagonal_target": "teacher"})
    # a teacher's forward pass, a third of a step, for the half of the rows that lie on the diagonal
    assert asked - student() == pytest.approx(alone / 6, rel=0.2)
    rollout = {"flow_map.boundary": 0.5, "flow_map.diagonal_target": "teacher"}
    calls = [
        student(rollout | {"flow_map.boundary_target": "teacher", "flow_map.rollout_steps": n})
        for n in (2, 6)
    ]
    # four calls more, for a half of the half that is not on the diagonal
    assert calls[1] - calls[0] == pytest.approx(4 * alone / 12, rel=0.2)
