"""The local posterior: Bayes with a prior of the position's own, and a statistic of the state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowlm.local import LocalPosterior
from flowlm.path import evidence_weights

B, L, D, V, C = 3, 5, 16, 40, 8
S = torch.tensor([0.0, 0.4, 0.8])


def state(seed: int = 0) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))


def make(rank: int, told_apart: int = 0) -> tuple[LocalPosterior, Tensor]:
    torch.manual_seed(0)
    embedding = torch.randn(V, D)
    return LocalPosterior(embedding, L, C, rank, told_apart), embedding


def bayes(y: Tensor, embedding: Tensor, prior: Tensor) -> Tensor:
    """p(k | y_l) for log-priors (L, V), by the density of a Gaussian."""
    e = embedding.double()
    out = []
    for row, s in zip(y.double(), S.double()):
        law = torch.distributions.MultivariateNormal(s * e, (1 - s) ** 2 * (e.T @ e))
        out.append((law.log_prob(row[:, None, :]) + prior.double()).softmax(-1))
    return torch.stack(out)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_new_one_is_bayes_with_a_flat_prior(rank: int) -> None:
    """With nothing learned yet: softmax over tokens of log N(y; s e_k, (1-s)² G), embedded."""
    assert V > D
    local, e = make(rank)
    want = bayes(state(), e, torch.zeros(L, V)) @ e.double()
    got = local(state(), S, torch.randn(B, 1, C), evidence_weights(e))
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)


def test_every_position_has_a_prior_of_its_own() -> None:
    local, e = make(rank=4)
    torch.nn.init.normal_(local.prior_tokens)
    torch.nn.init.normal_(local.bias)
    prior = (local.prior_positions @ local.prior_tokens.T + local.bias).detach()
    assert (prior[0] - prior[1]).abs().max() > 1
    want = bayes(state(), e, prior) @ e.double()
    got = local(state(), S, torch.randn(B, 1, C), evidence_weights(e))
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)


def test_it_gives_the_state_no_gradient() -> None:
    """It is a statistic of the state; its own embedding, priors and gain learn."""
    local, e = make(rank=4)
    torch.nn.init.normal_(local.prior_tokens)
    e.requires_grad_()
    y = state().requires_grad_()
    local(y, S, torch.randn(B, 1, C), evidence_weights(e)).square().sum().backward()
    assert y.grad is None
    assert e.grad is None
    for learned in (
        local.embedding,
        local.bias,
        local.gain.weight,
        local.prior_tokens,
        local.prior_positions,
    ):
        assert learned.grad is not None
        assert learned.grad.any()


def test_the_rest_of_a_vocabulary_is_one() -> None:
    """Bayes over the tokens that are told apart and a state with none in it, with E' as it starts."""
    local, e = make(rank=4, told_apart=10)
    torch.nn.init.normal_(local.prior_tokens)
    often = torch.tensor([3, 5, 8, 13, 21, 22, 30, 31, 38, 39])
    passages = torch.cat([often.repeat(5), torch.arange(V)])[None]
    local.tell_apart(passages, e)
    assert torch.equal(local.tokens, often)
    rest = torch.ones(V, dtype=torch.bool)
    rest[often] = False
    torch.testing.assert_close(local.embedding.detach(), torch.cat([e[often], e[rest].mean(0, keepdim=True)]))
    prior = (local.prior_positions @ local.prior_tokens.T).detach().double()
    y, double = state().double(), e.double()
    means = torch.cat([double[often], torch.zeros(1, D, dtype=torch.float64)])
    rows = []
    for row, s in zip(y, S.double()):
        law = torch.distributions.MultivariateNormal(s * means, (1 - s) ** 2 * (double.T @ double))
        rows.append((law.log_prob(row[:, None, :]) + prior).softmax(-1) @ local.embedding.detach().double())
    got = local(state(), S, torch.randn(B, 1, C), local.weights_of(evidence_weights(e)))
    torch.testing.assert_close(got.double(), torch.stack(rows), atol=1e-4, rtol=1e-3)


def test_as_many_as_there_are_is_all_of_them() -> None:
    whole, e = make(rank=4)
    for told_apart in (V, V + 1):
        other, _ = make(rank=4, told_apart=told_apart)
        assert other.state_dict().keys() == whole.state_dict().keys()
        weights = evidence_weights(e)
        assert other.weights_of(weights) is weights
