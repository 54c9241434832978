"""The low-rank state against the dense one: law, samples, gradients; and the path's own algebra."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dense import dense_corrupt, dense_step
from flowlm import path
from flowlm.path import (
    CoupledDenseNoise,
    CoupledLowRankNoise,
    DenseNoise,
    LowRankNoise,
    coupled_noise_law,
    evidence_gains,
    evidence_weights,
    noise_law,
)

V, D, L = 6, 2, 2


def embeddings(vocab: int = V, width: int = D, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, width, generator=gen).to(dtype)


def rows_of(law: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """The law's matrix F with y = ξ F, read off the unit vectors."""
    return law(torch.eye(width)[None])[0].detach()


# --- the law of y_0 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "width"), [(5, 2), (64, 8), (2000, 32), (513, 256)])
def test_low_rank_covariance(vocab: int, width: int) -> None:
    """Cov(zE) = EᵀE, exactly and in draws."""
    e = embeddings(vocab, width)
    law = noise_law(e)
    assert isinstance(law, LowRankNoise)
    assert law.width == width
    factor, gram = rows_of(law, width), e.T @ e
    torch.testing.assert_close(factor.T @ factor, gram, atol=2e-6 * float(gram.diagonal().mean()), rtol=1e-5)


def test_low_rank_draws() -> None:
    e = embeddings()
    n = 200_000
    gen = torch.Generator().manual_seed(1)
    y = noise_law(e)(torch.randn(n, 1, D, generator=gen))[:, 0].double()
    gram = (e.T @ e).double()
    # Var of an entry of a Wishart mean: (g_ii g_jj + g_ij²)/n.
    se = ((gram.diagonal()[:, None] * gram.diagonal() + gram.square()) / n).sqrt()
    assert ((y.T @ y / n - gram).abs() < 5 * se).all()
    assert (y.mean(0).abs() < 5 * (gram.diagonal() / n).sqrt()).all()


@pytest.mark.parametrize(("vocab", "kind"), [(3, DenseNoise), (16, DenseNoise), (17, LowRankNoise)])
def test_small_vocabularies_draw_z_itself(vocab: int, kind: type) -> None:
    e = embeddings(vocab, 8)
    law = noise_law(e)
    assert type(law) is kind
    assert law.width == (vocab if kind is DenseNoise else 8)
    coupled = coupled_noise_law(e, embeddings(vocab, 8, seed=1))
    assert type(coupled) is (CoupledDenseNoise if kind is DenseNoise else CoupledLowRankNoise)


def test_dense_noise_is_the_product() -> None:
    e = embeddings(4, 8)
    z = torch.randn(3, L, 4)
    torch.testing.assert_close(noise_law(e)(z), z @ e)
    first, second = coupled_noise_law(e, 2 * e)(z)
    torch.testing.assert_close(first, z @ e)
    torch.testing.assert_close(second, z @ (2 * e))


def test_a_degenerate_embedding_gives_nan_not_a_wrong_law() -> None:
    e = torch.full((10, 3), float("inf"))
    assert noise_law(e)(torch.ones(1, 1, 3)).isnan().all()


def second_embedding(kind: str) -> Tensor:
    e = embeddings()
    if kind == "equal":
        return e.clone()
    if kind == "rank-one apart":
        return e + torch.outer(embeddings(V, 1, seed=2)[:, 0], torch.tensor([1.0, -0.5]))
    if kind == "near":
        return e + 0.01 * embeddings(seed=3)
    return embeddings(seed=4)


COUPLED_KINDS = ["equal", "rank-one apart", "near", "unrelated"]


@pytest.mark.parametrize("kind", COUPLED_KINDS)
def test_coupled_covariance(kind: str) -> None:
    """Cov(zE₁, zE₂) = [E₁ E₂]ᵀ[E₁ E₂]."""
    first, second = embeddings(), second_embedding(kind)
    law = coupled_noise_law(first, second)
    assert isinstance(law, CoupledLowRankNoise)
    joint = torch.cat(law(torch.eye(law.width)[None]), -1)[0]
    both = torch.cat([first, second], 1)
    torch.testing.assert_close(joint.T @ joint, both.T @ both, atol=1e-4, rtol=1e-5)


def test_coupled_noise_of_equal_embeddings_is_equal() -> None:
    law = coupled_noise_law(embeddings(40, 8), embeddings(40, 8))
    first, second = law(torch.randn(16, L, law.width))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert isinstance(law, CoupledLowRankNoise)
    assert not law.residual_factor.any()


def test_coupled_noise_of_the_next_step() -> None:
    """What follows from the frozen embedding is kept, and nothing of the former trained one."""
    first, second, third = (embeddings(40, 8, seed=seed) for seed in range(3))
    third.requires_grad_()
    before, anew = coupled_noise_law(first, second), coupled_noise_law(first, third)
    assert isinstance(before, CoupledLowRankNoise)
    xi = torch.randn(2, 3, before.width, generator=torch.Generator().manual_seed(0))
    was = before(xi)[1]
    after = before.again(third)
    assert all(torch.equal(a, b) for a, b in zip(after(xi), anew(xi), strict=True))
    grads = [torch.autograd.grad(law(xi)[1].square().sum(), third)[0] for law in (after, anew)]
    assert torch.equal(*grads)
    assert torch.equal(before(xi)[1], was)


def test_coupled_needs_one_vocabulary() -> None:
    with pytest.raises(ValueError, match="one vocabulary, got V=6 and V=7"):
        coupled_noise_law(embeddings(6), embeddings(7))


# --- the gradient in E ---------------------------------------------------------------------------
#
# Each low-rank gradient is the mean of the dense one over the z that give the same y_0. So both are taken
# at the same y_0, batch by batch: the differences have mean zero and little variance.

BATCHES, ROWS = 400, 1500


def network(y: Tensor, t: Tensor, seed: int) -> Tensor:
    """A fixed smooth network: logits (B, L, V)."""
    gen = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(D, 12, generator=gen).double(), torch.randn(12, V, generator=gen).double()
    return torch.tanh(y @ w1 + t[:, None, None]) @ w2


def flow_loss(tokens: Tensor, t: Tensor, e: Tensor, y0: Tensor) -> Tensor:
    y = path.corrupt(tokens, t, e, y0)
    return torch.nn.functional.cross_entropy(network(y, t, 0).flatten(0, 1), tokens.flatten())


def distillation_loss(tokens: Tensor, t: Tensor, e: Tensor, y0: Tensor) -> Tensor:
    """Cross-entropy to a target that reads the same noise and stops the gradient."""
    y = path.corrupt(tokens, t, e, y0)
    target = (3 * network(y.detach(), t, 1)).softmax(-1)
    return -(target * network(y, t, 0).log_softmax(-1)).sum(-1).mean()


LOSSES = {"flow": flow_loss, "distillation": distillation_loss}
Noise = Callable[[Tensor, Tensor], Tensor]


def dense_noise(e: Tensor, z: Tensor) -> Tensor:
    return z @ e


def low_rank_noise(e: Tensor, z: Tensor) -> Tensor:
    """y_0 through the package's law, at the ξ that gives y_0 = zE."""
    law = noise_law(e.float())
    assert isinstance(law, LowRankNoise)
    factor = law.factor.double()
    return (z @ e @ torch.linalg.inv(factor)).detach() @ factor


def detached_noise(e: Tensor, z: Tensor) -> Tensor:
    """A wrong law: no gradient through the noise."""
    return (z @ e).detach()


def cholesky_noise(e: Tensor, z: Tensor) -> Tensor:
    """A law wrong for distillation: the gradient of the Cholesky factor itself."""
    factor = torch.linalg.cholesky(e.T @ e).T
    return (z @ e @ torch.linalg.inv(factor)).detach() @ factor


def gradient_gap(name: str, noise: Noise) -> tuple[float, float]:
    """Largest |mean of dense less `noise` gradients in E|, in standard errors, and relative to the dense."""
    gen = torch.Generator().manual_seed(5)
    gaps, dense = [], []
    for _ in range(BATCHES):
        tokens = torch.randint(0, V, (ROWS, L), generator=gen)
        t = torch.rand(ROWS, generator=gen, dtype=torch.float64)
        z = torch.randn(ROWS, L, V, generator=gen, dtype=torch.float64)
        grads = []
        for law in (dense_noise, noise):
            e = embeddings(dtype=torch.float64).requires_grad_()
            grads.append(torch.autograd.grad(LOSSES[name](tokens, t, e, law(e, z)), e)[0])
        gaps.append(grads[0] - grads[1])
        dense.append(grads[0])
    gap = torch.stack(gaps)
    error = gap.std(0) / math.sqrt(BATCHES)
    mean = gap.mean(0)
    return float((mean / error).abs().max()), float(mean.abs().max() / torch.stack(dense).mean(0).abs().max())


@pytest.mark.parametrize("loss", LOSSES)
def test_low_rank_gradient_is_the_dense_one(loss: str) -> None:
    deviations, relative = gradient_gap(loss, low_rank_noise)
    assert deviations < 4.5
    assert relative < 0.01


@pytest.mark.parametrize(
    ("loss", "noise"),
    [
        ("flow", detached_noise),
        ("distillation", detached_noise),
        ("distillation", cholesky_noise),
    ],
)
def test_wrong_gradients_are_caught(loss: str, noise: Noise) -> None:
    deviations, relative = gradient_gap(loss, noise)
    assert deviations > 20
    assert relative > 0.05


@pytest.mark.parametrize("kind", COUPLED_KINDS)
def test_coupled_gradient_is_the_dense_one(kind: str) -> None:
    """A student's gradient in E₂ against a teacher that reads the same x through E₁."""
    first, start = embeddings(), second_embedding(kind)
    gen = torch.Generator().manual_seed(6)
    gaps: dict[str, list[Tensor]] = {"coupled": [], "detached": []}
    dense = []
    for _ in range(BATCHES):
        tokens = torch.randint(0, V, (ROWS, L), generator=gen)
        t = torch.rand(ROWS, generator=gen, dtype=torch.float64)
        z = torch.randn(ROWS, L, V, generator=gen, dtype=torch.float64)

        def gradient(noise: Callable[[Tensor], tuple[Tensor, Tensor]], tokens=tokens, t=t) -> Tensor:  # type: ignore[no-untyped-def]
            second = start.double().requires_grad_()
            y1, y2 = noise(second)
            target = network(path.corrupt(tokens, t, first.double(), y1), t, 1).softmax(-1)
            log_probs = network(path.corrupt(tokens, t, second, y2), t, 0).log_softmax(-1)
            return torch.autograd.grad(-(target * log_probs).sum(-1).mean(), second)[0]

        def coupled(second: Tensor, z=z) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
            law = coupled_noise_law(first, second.float())
            assert isinstance(law, CoupledLowRankNoise)
            factor = law.first_factor.double()
            onto, rest = law.second_factor.double(), law.residual_factor.double()
            a = z @ first.double() @ torch.linalg.inv(factor)
            b = ((z @ second - a @ onto) @ torch.linalg.pinv(rest, rtol=1e-5)).detach()
            return a @ factor, a @ onto + b @ rest

        expected = gradient(lambda second, z=z: (z @ first.double(), z @ second))
        gaps["coupled"].append(expected - gradient(coupled))
        gaps["detached"].append(
            expected - gradient(lambda second, z=z: (z @ first.double(), (z @ second).detach()))
        )
        dense.append(expected)
    scale = torch.stack(dense).mean(0).abs().max()
    mean = {name: torch.stack(gap).mean(0) for name, gap in gaps.items()}
    error = torch.stack(gaps["coupled"]).std(0) / math.sqrt(BATCHES)
    assert ((mean["coupled"].abs() - 1e-4 * scale) < 4.5 * error).all()
    assert mean["coupled"].abs().max() < 0.01 * scale
    assert mean["detached"].abs().max() > 0.05 * scale


# --- the path's algebra --------------------------------------------------------------------------

TIMES: dict[str, tuple[Tensor | float, Tensor | float]] = {
    "floats": (0.3, 0.8),
    "scalars": (torch.tensor(0.3), torch.tensor(0.8)),
    "rows": (torch.tensor([0.3, 0.0, 0.5]), torch.tensor([0.8, 1.0, 0.5])),
    "tokens": (torch.tensor([[0.3, 0.1]] * 3), torch.tensor([[0.8, 1.0]] * 3)),
}


@pytest.mark.parametrize("kind", ["floats", "scalars", "rows"])
def test_dense_and_low_rank_functions_agree(kind: str) -> None:
    """x ↦ xE carries the dense interpolant and step to the package's."""
    s, t = TIMES[kind]
    e = embeddings(dtype=torch.float64)
    z = torch.randn(3, L, V, dtype=torch.float64)
    tokens = torch.randint(0, V, (3, L))
    x = dense_corrupt(tokens, s, z)
    y = path.corrupt(tokens, s, e, z @ e)
    torch.testing.assert_close(y, x @ e, atol=1e-7, rtol=0)
    probs = torch.randn(3, L, V, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(
        path.step(y, probs @ e, s, t), dense_step(x, probs, s, t) @ e, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("kind", TIMES)
def test_shapes_of_times(kind: str) -> None:
    """Scalar, (B,) and (B, L) times mean the same thing token by token."""
    s, t = TIMES[kind]
    e, noise = embeddings(), torch.randn(3, L, D)
    tokens = torch.randint(0, V, (3, L))
    y, d = path.corrupt(tokens, s, e, noise), torch.randn(3, L, D)
    out = path.step(y, d, s, t)
    grid_s, grid_t = (
        torch.as_tensor(v).reshape(-1, 1).expand(3, L) if torch.as_tensor(v).dim() < 2 else v for v in (s, t)
    )
    for b in range(3):
        for i in range(L):
            a, c = float(grid_s[b, i]), float(grid_t[b, i])
            state = (1 - a) * noise[b, i] + a * e[tokens[b, i]]
            torch.testing.assert_close(y[b, i], state)
            torch.testing.assert_close(out[b, i], ((1 - c) * state + (c - a) * d[b, i]) / (1 - a))


def test_ends_of_the_path() -> None:
    e, noise = embeddings(), torch.randn(2, L, D)
    tokens = torch.randint(0, V, (2, L))
    assert torch.equal(path.corrupt(tokens, 0.0, e, noise), noise)
    assert torch.equal(path.corrupt(tokens, 1, e, noise), e[tokens])
    y, d = torch.randn(2, L, D), torch.randn(2, L, D)
    assert torch.equal(path.step(y, d, 0.4, 0.4), y)
    assert torch.equal(path.step(y, d, 0.4, 1.0), d)


def test_step_from_one_is_exactly_y() -> None:
    """Clean tokens stand still, in value and in gradient, also beside tokens that move."""
    y, d = torch.randn(2, L, D, requires_grad=True), torch.randn(2, L, D, requires_grad=True)
    s, t = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[1.0, 0.9], [1.0, 1.0]])
    out = path.step(y, d, s, t)
    assert torch.equal(out[0, 0], y[0, 0])
    assert torch.equal(out[1, 1], y[1, 1])
    out.sum().backward()
    assert d.grad is not None
    assert torch.isfinite(d.grad).all()
    assert not d.grad[0, 0].any()


def test_steps_compose_under_a_constant_denoiser() -> None:
    y, d = torch.randn(2, L, D), torch.randn(2, L, D)
    two = path.step(path.step(y, d, 0.1, 0.5), d, 0.5, 0.9)
    torch.testing.assert_close(two, path.step(y, d, 0.1, 0.9))


def test_velocity_is_the_derivative_of_the_step() -> None:
    y, d = torch.randn(2, L, D, dtype=torch.float64), torch.randn(2, L, D, dtype=torch.float64)
    t, h = torch.tensor([0.2, 0.7], dtype=torch.float64), 1e-6
    torch.testing.assert_close(path.velocity(y, d, t), (path.step(y, d, t, t + h) - y) / h, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dtype_is_kept(dtype: torch.dtype) -> None:
    y = torch.randn(2, L, D, dtype=dtype)
    t64 = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert path.step(y, y, t64, t64 + 0.1).dtype == dtype
    assert path.velocity(y, y, t64).dtype == dtype
    assert path.renoise(y, y, y, 0.5, 0.6, 0.3).dtype == dtype
    assert path.corrupt(torch.zeros(2, L, dtype=torch.long), t64, embeddings(dtype=dtype), y).dtype == dtype


@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.8, 1.0])
def test_renoising_keeps_the_law_of_the_path(gamma: float) -> None:
    """From (1-t̃) z + t̃ d to (1-t') z' + t' d: the coefficient of d is t', the noise's variance (1-t')²."""
    end = 0.7
    mid = float(path.renoise_times(end, gamma))
    assert mid == pytest.approx(1 - 0.3 * math.sqrt(1 - gamma**2))
    assert end <= mid + 1e-7
    z, d, fresh = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), torch.tensor([0, 0, 1.0])
    out = path.renoise((1 - mid) * z + mid * d, d, fresh, end, mid, gamma)
    assert float(out[1]) == pytest.approx(end, abs=1e-6)
    assert float(out[0] ** 2 + out[2] ** 2) == pytest.approx((1 - end) ** 2, abs=1e-6)
    if gamma == 0:
        assert mid == pytest.approx(end)
        assert not out[2]
    if gamma == 1:
        assert not out[0]


@pytest.mark.parametrize("vocab", [4, 40])
def test_noise_stays_float32_under_autocast(vocab: int) -> None:
    e, other = embeddings(vocab, 8), embeddings(vocab, 8, seed=1)
    law, coupled = noise_law(e), coupled_noise_law(e, other)
    xi, xi2 = torch.randn(2, L, law.width), torch.randn(2, L, coupled.width)
    expected = [law(xi), *coupled(xi2)]
    with torch.autocast("cpu", torch.bfloat16):
        got = [noise_law(e)(xi), *coupled_noise_law(e, other)(xi2)]
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def evidence(y: Tensor, t: Tensor | float, embedding: Tensor) -> Tensor:
    """log p(y | k) (B, L, V), as `evidence_weights` says it is put together."""
    weight, offset = evidence_weights(embedding)
    gain, offset_gain = evidence_gains(t, y)
    return gain * (y @ weight.T) + offset_gain * offset


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_evidence_is_the_likelihood_of_the_state(t: float) -> None:
    """The evidence for k is log N(y; t e_k, (1-t)² G) up to a constant in k."""
    torch.manual_seed(0)
    vocab, width = 23, 6
    embedding, y = torch.randn(vocab, width), torch.randn(2, 3, width)
    got = evidence(y, t, embedding)
    e = embedding.double()
    law = torch.distributions.MultivariateNormal(t * e, (1 - t) ** 2 * (e.T @ e))
    want = law.log_prob(y.double()[..., None, :])
    difference = got.double() - want
    assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-3 * want.abs().max()


def test_evidence_of_a_state_kept_whole() -> None:
    """With V ≤ d the state x is in y: the evidence for k is t/(1-t)² x_k."""
    torch.manual_seed(0)
    vocab, width, t = 5, 8, 0.6
    embedding, x = torch.randn(vocab, width), torch.randn(2, 3, vocab)
    got = evidence(x @ embedding, t, embedding)
    want = t / (1 - t) ** 2 * x
    torch.testing.assert_close(got.log_softmax(-1), want.log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_evidence_stays_finite_at_the_data() -> None:
    embedding = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(9)[None]
    got = evidence(embedding[tokens], torch.tensor([1.0]), embedding)
    assert torch.isfinite(got).all()
    assert torch.equal(got.argmax(-1), tokens)
