"""The transformer: every choice runs, reads its inputs, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowlm.backbone import Backbone, BackboneConfig, KVCache, Norm, TimeEmbedding, rotary_tables, rotate

B, L, D, C = 3, 6, 16, 8
PLAIN = BackboneConfig(
    width=D,
    depth=2,
    heads=2,
    conditioning=C,
    activation="gelu",
    attention_backend="sdpa",
    norm="layer",
    position="both",
    qk_norm=False,
)
CHOICES: list[dict[str, Any]] = [
    {},
    {"norm": "rms"},
    {"position": "rotary"},
    {"position": "learned", "position_scale": 1.0},
    {"activation": "relu2"},
    {"qk_norm": True},
    {"attention_softcap": 5.0},
    {"attention_backend": "math"},
    {"attention_backend": "auto"},
    {"heads": 1, "mlp_ratio": 1.5, "depth": 1},
]


def label(choice: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in choice.items()) or "default"


def unzero(module: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter that starts at zero: such modulations hide the rest of the net."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=gen))


def backbone(**choice: Any) -> Backbone:
    torch.manual_seed(0)
    net = Backbone(dataclasses.replace(PLAIN, **choice), L)
    unzero(net)
    return net


def inputs(per_token: bool = False) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(B, L, D, generator=gen), torch.randn(B, L if per_token else 1, C, generator=gen)


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_finite_and_every_parameter_learns(choice: dict[str, Any]) -> None:
    net = backbone(**choice)
    h, cond = inputs()
    out = net(h, cond)
    assert out.shape == (B, L, D)
    assert torch.isfinite(out).all()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_rows_are_independent_and_tokens_are_not(choice: dict[str, Any]) -> None:
    net = backbone(**choice)
    h, cond = inputs()
    out = net(h, cond)
    torch.testing.assert_close(net(h[1:2], cond[1:2]), out[1:2], atol=1e-5, rtol=1e-5)
    changed = h.clone()
    changed[1, 0, 0] += 1
    moved = (net(changed, cond) - out).abs().amax(-1)
    assert not moved[[0, 2]].any()
    assert (moved[1] > 1e-4).all(), "attention runs both ways: every token sees every other"


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_conditioning_per_row_and_per_token(choice: dict[str, Any]) -> None:
    net = backbone(**choice)
    h, cond = inputs()
    out = net(h, cond)
    torch.testing.assert_close(net(h, cond.expand(B, L, C)), out, atol=1e-5, rtol=1e-5)
    assert (net(h, cond + 1) - out).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["rotary", "learned", "both"])
def test_positions_matter(position: str) -> None:
    net = backbone(position=position)
    h, cond = inputs()
    assert (net(h.flip(1), cond).flip(1) - net(h, cond)).abs().max() > 1e-3


def test_starts_as_the_norm_alone() -> None:
    """adaLN-zero: a new network passes its input on."""
    torch.manual_seed(0)
    net = Backbone(dataclasses.replace(PLAIN, position="rotary"), L)
    h, cond = inputs()
    torch.testing.assert_close(net(h, cond), nn.functional.layer_norm(h, (D,)))


def test_learned_positions_start_at_their_scale() -> None:
    for scale in (0.1, 2.0):
        net = Backbone(dataclasses.replace(PLAIN, position_scale=scale), 500)
        assert float(net.positions.detach().std()) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_back_ends_agree(qk_norm: bool, softcap: float) -> None:
    choice = {"qk_norm": qk_norm, "attention_softcap": softcap}
    h, cond = inputs()
    fused, plain = (backbone(**choice, attention_backend=name) for name in ("sdpa", "math"))
    torch.testing.assert_close(fused(h, cond), plain(h, cond), atol=1e-5, rtol=1e-4)


def test_dropout_only_in_training() -> None:
    net = backbone(dropout=0.5)
    h, cond = inputs()
    assert not torch.equal(net(h, cond), net(h, cond))
    net.eval()
    assert torch.equal(net(h, cond), net(h, cond))
    torch.testing.assert_close(net(h, cond), backbone()(h, cond))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(kind: str) -> None:
    x = 3 + 2 * torch.randn(4, 5, D)
    norm = Norm(D, kind)
    nn.init.constant_(norm.weight, 1.5)
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = 1.5 * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_rotary_scores_depend_on_distance_alone() -> None:
    cos, sin = rotary_tables(9, 8, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(9, 8), cos, sin) @ rotate(k.expand(9, 8), cos, sin).T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[0, 0], q @ k)
    assert scores[0].std() > 0.01


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_time_embedding_is_the_published_sinusoid(scale: float) -> None:
    net = TimeEmbedding(C, scale)
    tau = torch.tensor([0.0, 0.3, 1.0])
    angle = [[scale * float(x) * math.exp(-math.log(1e4) * i / 128) for i in range(128)] for x in tau]
    sinusoid = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angle])
    torch.testing.assert_close(net(tau), net.mlp(sinusoid)[:, None], atol=1e-5, rtol=1e-5)
    assert net(tau.expand(2, 3)).shape == (2, 3, C)
    assert not TimeEmbedding(C, scale, zero=True)(tau).any()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"heads": 3}, "width 16 over 3 heads"),
        ({"heads": 16}, "even head width"),
        ({"norm": "batch"}, "norm = 'batch' is not one of layer, rms"),
        ({"position": "none"}, "position = 'none' is not one of rotary, learned, both"),
        ({"activation": "tanh"}, "activation = 'tanh' is not one of gelu, relu2"),
        ({"attention_backend": "flash"}, "attention_backend = 'flash' is not one of auto, sdpa, math"),
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"conditioning": 0}, "conditioning must be positive, got 0"),
    ],
)
def test_config_errors(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **choice)


@pytest.mark.parametrize("position", ["learned", "both"])
def test_too_long_for_learned_positions(position: str) -> None:
    with pytest.raises(ValueError, match="a sequence of 7 tokens is longer than the 6 learned positions"):
        backbone(position=position)(torch.randn(1, L + 1, D), torch.randn(1, 1, C))
    assert backbone(position="rotary")(torch.randn(1, L + 1, D), torch.randn(1, 1, C)).shape == (1, L + 1, D)


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_a_causal_one_sees_only_what_came_before(choice: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Backbone(dataclasses.replace(PLAIN, **choice), L, causal=True)
    unzero(net)
    h, cond = inputs()
    other = h.clone()
    other[:, 4:] = other[:, 4:].flip(-1)
    before, after = net(h, cond), net(other, cond)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("parts", [(1,) * L, (2, 1, 3), (L,)], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_with_a_cache_it_goes_on_where_it_was(choice: dict[str, Any], parts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = Backbone(dataclasses.replace(PLAIN, **choice), L, causal=True).double()
    unzero(net)
    h, cond = (x.double() for x in inputs())
    cache = KVCache(net, B, h.device, h.dtype)
    out = torch.cat([net(part, cond, cache) for part in h.split(list(parts), 1)], 1)
    torch.testing.assert_close(out, net(h, cond), atol=1e-6, rtol=1e-6)  # rotary tables are float32
    assert cache.length == L
    with pytest.raises(ValueError, match="longer than the 6"):
        net(h[:, :1], cond, cache)


def test_a_cache_is_for_a_causal_one() -> None:
    net = backbone()
    with pytest.raises(ValueError, match="a cache is for a causal backbone"):
        net(*inputs(), KVCache(net, B, torch.device("cpu"), torch.float32))
