"""The discrete families' network, and AR with its cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flowlm.denoiser import DenoiserConfig
from flowlm.discrete import ar, mdlm
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from test_backbone import PLAIN, unzero
from toy import LANGUAGE, LENGTH, VOCAB

B, L, V = 4, 6, 11


def make(*, causal: bool = False, timed: bool = False, seed: int = 0) -> TokenNetwork:
    torch.manual_seed(seed)
    config = DenoiserConfig(vocab_size=V, length=L, backbone=dataclasses.replace(PLAIN, qk_norm=True))
    net = TokenNetwork(config, causal=causal, timed=timed)
    unzero(net)
    return net


def ids(extra: int = 1) -> Tensor:
    return torch.randint(V + extra, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("timed", [False, True], ids=["untimed", "timed"])
def test_every_parameter_learns(timed: bool) -> None:
    net = make(timed=timed)
    tokens = ids()
    tokens[0, 0] = V
    loss = net(tokens, torch.linspace(0, 1, B)).cross_entropy(ids(0)).mean()
    loss.backward()
    for name, parameter in net.named_parameters():
        if name != "backbone.modulation.weight" and "modulation.weight" in name and not timed:
            continue  # it multiplies nothing but zeros
        if name == "backbone.modulation.weight" and not timed:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_time_is_read() -> None:
    net = make(timed=True)
    a, b = (net(ids(), torch.full((B,), t)).log_probs() for t in (0.2, 0.7))
    assert (a - b).abs().max() > 1e-3


def test_an_embedded_mixture_is_read_as_tokens_are() -> None:
    net = make()
    tokens = ids(0)
    torch.testing.assert_close(net(net.embedding[tokens]).log_probs(), net(tokens).log_probs())


def test_the_chain_rule() -> None:
    """Each position is predicted from those before it alone, and the losses add up to the passage's."""
    net, tokens = make(causal=True), ids(0)
    whole = ar.losses(net, tokens)
    assert whole.shape == (B, L)
    for length in range(1, L + 1):
        part = ar.losses(net, tokens[:, :length])
        torch.testing.assert_close(part, whole[:, :length])


@torch.no_grad()
def test_with_the_cache_it_writes_what_it_would_without() -> None:
    net = make(causal=True).double()
    uniform = torch.rand(B, L, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[Tensor] = []
    tokens = ar.sample(net, uniform, callback=lambda i, p: seen.append(p.log_probs()))
    whole = net(ar.shifted(tokens, V)).log_probs()
    torch.testing.assert_close(torch.cat(seen, 1), whole, atol=1e-5, rtol=1e-5)
    cdf = whole.double().exp().cumsum(-1)
    below = torch.where(tokens > 0, cdf.gather(-1, (tokens - 1).clamp_min(0)[..., None])[..., 0], 0.0)
    above = cdf.gather(-1, tokens[..., None])[..., 0]
    assert ((below - 1e-5 <= uniform) & (uniform <= above + 1e-5)).all()
    greedy = ar.sample(net, uniform, last="argmax")
    assert torch.equal(greedy, net(ar.shifted(greedy, V)).tokens())
    torch.testing.assert_close(ar.sample(net, uniform, top_k=1), greedy)


def test_it_learns_the_law_of_the_toy() -> None:
    """AR's exact likelihood comes down to the entropy of the law, and MDLM's bound to a little above it."""
    torch.manual_seed(0)
    config = dataclasses.replace(PLAIN, width=32, depth=2, qk_norm=True)
    entropy = float(-(LANGUAGE.probs * LANGUAGE.probs.log()).sum())
    for kind in ("ar", "mdlm"):
        shape = DenoiserConfig(vocab_size=VOCAB, length=LENGTH, backbone=config)
        net = TokenNetwork(shape, causal=kind == "ar")
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.0)
        gen = torch.Generator().manual_seed(0)
        found = []
        for _ in range(300):
            tokens = LANGUAGE.sample(512, gen)
            if kind == "ar":
                loss = ar.losses(net, tokens)
            else:
                t = LogLinear().times((torch.arange(512) + torch.rand(512, generator=gen)) / 512)
                uniform = torch.rand(512, LENGTH, generator=gen, dtype=torch.float64)
                loss = mdlm.losses(lambda x, t, net=net: net(x), tokens, t, uniform, VOCAB, LogLinear())
            loss.sum(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach().sum(-1).mean()))
        late = sum(found[-100:]) / 100
        assert entropy - 0.05 < late < entropy + 0.08, kind
        if kind == "ar":
            tokens = ar.sample(net, torch.rand(20_000, LENGTH, generator=gen, dtype=torch.float64))
            assert LANGUAGE.total_variation(tokens) < 0.05
