"""Rates of the denoiser along times and flow: forward-mode differentiation against finite differences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowlm.denoiser import Denoiser
from flowlm.device import can_compile
from flowlm.objectives import identities
from flowlm.objectives.derivative import METHODS, rate_at_the_end, rate_at_the_start
from flowlm.objectives.identities import (
    cfm_drift,
    esd_logit_target,
    esd_target,
    lsd_logit_target,
    lsd_target,
)
from flowlm.path import corrupt, velocity
from flowlm.posterior import Posterior
from test_denoiser import BACKBONE, L, make

N = 40
NETWORKS: dict[str, dict[str, Any]] = {
    "low-rank": {},
    "dense": {"vocab_size": 20},
    "tied and soft-capped head": {"tied_head": True, "logit_softcap": 3.0},
    "rms": {
        "backbone": dataclasses.replace(
            BACKBONE, norm="rms", qk_norm=True, activation="relu2", time_scale=10.0
        )
    },
    "soft-capped attention": {"backbone": dataclasses.replace(BACKBONE, attention_softcap=5.0)},
    "uniform clock": {"clock": "uniform", "input_scaling": True},
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def case(name: str, **options: Any) -> tuple[Denoiser, Tensor, Tensor, Tensor]:
    """A flow map that reads all that the package's own do, states on the path, and pairs s < t."""
    net = make(True, **{"head_start": 1 / 16, **NETWORKS[name], **options}).eval()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        net.mean.normal_(generator=gen)
    tau = torch.rand(N, 2, generator=gen, dtype=torch.float64).mul(0.95).sort(1).values
    # Where there is room on one side alone, and where there is hardly any; last, pairs from noise.
    tau[:4, 0], tau[:4, 1] = torch.tensor([0.0, 0.5, 0.0, 0.3]), torch.tensor([0.5, 1.0, 1e-3, 0.3001])
    s, t = net.clock.time(tau).unbind(1)
    tokens = torch.randint(0, net.config.vocab_size, (N, L), generator=gen)
    law = net.noise_law()
    y = corrupt(tokens, s.float(), net.embedding, law(torch.randn(N, L, law.width, generator=gen)))
    return net, y.detach(), s, t


@each_network
def test_rates_are_those_of_log_probs(name: str) -> None:
    """Against central differences of log p itself, in flow time, well inside the pairs."""
    net, y, s, t = case(name)
    inside = ((t - s) > 0.05) & (s > 0.02) & (s < 0.8) & (t < 0.9)
    y, s, t = y[inside], s[inside], t[inside]
    flow = velocity(y, net(y, s, s).embed(), s).detach()
    h = 1e-3
    for moving, along in (
        (rate_at_the_end(net, y, s, t, "jvp"), (0 * y, 0 * s, torch.ones_like(t))),
        (rate_at_the_start(net, y, flow, s, t, "jvp"), (flow, torch.ones_like(s), 0 * t)),
    ):
        log_p, a = moving.log_probs_at(slice(None))
        with torch.no_grad():
            low, here, high = (
                net(*(x + e * d.to(x.dtype) for x, d in zip((y, s, t), along))).log_probs().flatten(0, 1)
                for e in (-h, 0, h)
            )
        torch.testing.assert_close(log_p, here, atol=1e-5, rtol=1e-4)
        difference = (high - low) / (2 * h)
        assert (a - difference).abs().max() < 0.02 * (1 + difference.abs().max())
        assert difference.abs().max() > 0.05


@each_network
@pytest.mark.parametrize("target", [lsd_target, lsd_logit_target, esd_target, esd_logit_target])
def test_both_derivatives_give_one_target(target: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, y, s, t = case(name)
    if target is esd_logit_target:
        y, s, t = (x[t < 1] for x in (y, s, t))

    def probs(method: str) -> Tensor:
        # A random network is no flow map: near a low floor the logarithm would multiply any error.
        last = 0.1 if "logit" in target.__name__ else False
        return target(net, lambda y, t: net(y, t, t), y, s, t, method, last).probs_at(slice(None))

    by_jvp, by_difference = (probs(method) for method in METHODS)
    torch.testing.assert_close(by_jvp, by_difference, atol=1e-3, rtol=0)
    assert not by_jvp.requires_grad
    # Against what the rate adds at all.
    for weight in ("lagrangian_weight", "eulerian_weight"):
        monkeypatch.setattr(identities, weight, lambda s, t: 0 * s)
    added = (probs("jvp") - by_jvp).abs().mean()
    assert (by_jvp - by_difference).abs().mean() < min(1e-4, 0.05 * added)


@each_network
def test_the_gradient_through_a_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one loss that has such a gradient, to every parameter: against differences of the loss itself."""
    # Without what takes no gradient on purpose, though differences see it: evidence, and the scale of the input.
    net, y, s, t = case(name, local_posterior=False, input_scaling=False)
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # logits and times too
    net, y = net.double(), y.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}

    def loss() -> Tensor:
        return cfm_drift(net, y, s, t).mean(dtype=torch.float64)

    found = torch.autograd.grad(loss(), [*params.values()], allow_unused=True, materialize_grads=True)
    grads = dict(zip(params, found, strict=True))
    norm = torch.stack([g.square().sum() for g in found]).sum().sqrt()
    assert norm > 1e-4
    # Of each parameter by itself, in a direction of its own: what is lost of one is seen there.
    h, gen = 1e-5, torch.Generator().manual_seed(2)
    moved = 0
    for name, p in params.items():
        along = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                p.add_(sign * h * along / along.norm())
                values.append(loss())
            p.add_(h * along / along.norm())
        slope = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(
            (grads[name] * along).sum() / along.norm(),
            slope,
            atol=1e-6 * float(norm),
            rtol=1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )
        moved += bool(slope.abs() > 1e-4 * norm)
    assert moved > 0.5 * len(params)


@pytest.mark.parametrize("method", METHODS)
def test_precision_is_not_that_of_autocast(method: str) -> None:
    net, y, s, t = case("low-rank")
    want = rate_at_the_end(net, y, s, t, method)
    with torch.autocast("cpu", torch.bfloat16):
        got = rate_at_the_end(net, y, s, t, method)
    torch.testing.assert_close(got.rate, want.rate, atol=0, rtol=0)


def test_networks_keep_nothing_of_the_derivative() -> None:
    """What follows from the embedding alone is kept between calls: plain tensors, whatever asked for them."""
    net, y, s, t = case("low-rank")
    with torch.no_grad():
        rate_at_the_end(net, y, s, t, "jvp")
        kept = [x for made in net._kept.values() for x in made if isinstance(x, Tensor)]
    assert kept
    assert all(x.data_ptr() for x in kept)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in kept)  # type: ignore[attr-defined]


def test_attention_without_a_forward_derivative() -> None:
    """Attention that insists on a fused kernel: an error that names the other way, which works."""
    net, y, s, t = case("low-rank")

    def fused(y: Tensor, s: Tensor, t: Tensor) -> Posterior:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return net(y, s, t)

    with pytest.raises(
        ValueError, match=r"has no forward-mode derivative.*flow_map\.derivative = 'difference'"
    ):
        rate_at_the_end(fused, y, s, t, "jvp")
    rate = rate_at_the_end(fused, y, s, t, "difference").rate
    torch.testing.assert_close(rate, rate_at_the_end(net, y, s, t, "difference").rate, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_rates_of_compiled_networks() -> None:
    """Forward mode leaves compiled code aside, differences take it: both give what the network gives without it."""
    net, y, s, t = case("low-rank")
    wanted = {method: rate_at_the_end(net, y, s, t, method).rate for method in METHODS}
    net.backbone.compile()
    found = {method: rate_at_the_end(net, y, s, t, method).rate for method in METHODS}
    assert torch.equal(found["jvp"], wanted["jvp"])
    # Compiled code rounds otherwise, and a difference divides that.
    torch.testing.assert_close(found["difference"], wanted["difference"], atol=1e-2, rtol=1e-2)
    assert not torch.equal(found["difference"], wanted["difference"])
