"""Averaged weights: the ramp's values, matching by name, and no gradient."""

from __future__ import annotations

import pytest
import torch

from flowlm.backbone import BackboneConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.training.ema import Ema


def _model(**fields: bool) -> Denoiser:
    backbone = BackboneConfig(width=8, depth=1, heads=2, conditioning=8)
    return Denoiser(DenoiserConfig(vocab_size=5, length=4, backbone=backbone, **fields))


def _fill(model: Denoiser, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("n", [1, 2, 90, 10**6])
def test_ramp(n: int) -> None:
    model = _model()
    _fill(model, 0.0)
    ema = Ema(model, 0.9)
    _fill(model, 1.0)
    ema.update(model, n)
    decay = min(0.9, (1 + n) / (10 + n))
    for parameter in ema.model.parameters():
        assert torch.allclose(parameter, torch.full_like(parameter, 1 - decay))


def test_zero_decay_follows_the_model() -> None:
    model = _model()
    ema = Ema(model, 0.0)
    _fill(model, 3.0)
    ema.update(model, 50)
    for name, value in ema.model.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name])


def test_the_average_is_separate_and_frozen() -> None:
    model = _model()
    model.train()
    ema = Ema(model, 0.9)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    mine = {p.data_ptr() for p in ema.model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in model.parameters())


def test_parameters_are_matched_by_name_whatever_their_order() -> None:
    model, reordered = _model(), _model()
    # The same parameters, registered in another order: matching by position would mix them up.
    reordered.backbone = reordered._modules.pop("backbone")
    reordered.embedding = reordered._parameters.pop("embedding")
    assert [n for n, _ in reordered.named_parameters()] != [n for n, _ in model.named_parameters()]
    for i, (_, parameter) in enumerate(sorted(reordered.named_parameters())):
        torch.nn.init.constant_(parameter, float(i))
    ema = Ema(model, 0.0)
    ema.update(reordered, 1)
    for i, (name, parameter) in enumerate(sorted(ema.model.named_parameters())):
        assert torch.equal(parameter, torch.full_like(parameter, float(i))), name


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in \['end_embedding\.mlp\.0\.bias'"):
        Ema(_model(), 0.9).update(_model(two_times=True), 1)


def test_a_tied_head_stays_tied() -> None:
    model = _model(tied_head=True)
    ema = Ema(model, 0.0)
    _fill(model, 2.0)
    ema.update(model, 1)
    hidden = torch.ones(1, 8)
    assert torch.equal(ema.model.head(hidden), model.head(hidden))
    assert float(ema.model.head(hidden)[0, 0]) == 8 * 2.0 + 2.0
