"""Attention: every back end gives the written formula, its gradient and its forward derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowlm.attention import BACKENDS, attention

SHAPE = (2, 3, 7, 8)


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(SHAPE, generator=gen, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(3)
    ]


def reference(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
    """Query by query, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = []
    for i in range(q.shape[2]):
        scores = (q[:, :, i, None] * k).sum(-1) / q.shape[-1] ** 0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out.append((scores.softmax(-1)[..., None] * v).sum(2))
    return torch.stack(out, 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("softcap", [0.0, 1.5, 50.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient(backend: str, softcap: float, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = inputs(dtype)
    out = attention(q, k, v, softcap=softcap, backend=backend)
    assert out.dtype == dtype
    expected = reference(q, k, v, softcap)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(expected)
    got = torch.autograd.grad((out.double() * weight).sum(), (q, k, v))
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("new", [1, 3, 7], ids="{} new positions".format)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal(backend: str, softcap: float, new: int) -> None:
    """The last positions as queries: each sees what came before it, and itself."""
    q, k, v = inputs(torch.float64)
    out = attention(q[:, :, -new:], k, v, softcap=softcap, backend=backend, causal=True)
    length = k.shape[2]
    for i in range(new):
        end = length - new + i + 1
        one = slice(end - 1, end)
        want = reference(q[:, :, one], k[:, :, :end], v[:, :, :end], softcap)
        torch.testing.assert_close(out[:, :, i : i + 1], want, atol=1e-12, rtol=1e-10)


def test_softcap_matters_and_vanishes() -> None:
    q, k, v = inputs(torch.float64, scale=3.0)
    plain = attention(q, k, v)
    assert (attention(q, k, v, softcap=1.0) - plain).abs().max() > 0.1
    torch.testing.assert_close(attention(q, k, v, softcap=1e6), plain)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_forward_derivative_of_math(softcap: float) -> None:
    primals = tuple(x.detach() for x in inputs(torch.float64))
    gen = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(SHAPE, generator=gen, dtype=torch.float64) for _ in primals)

    def fn(*x: Tensor) -> Tensor:
        return attention(*x, softcap=softcap, backend="math")

    _, derivative = torch.func.jvp(fn, primals, tangents)
    h = 1e-6
    plus, minus = (fn(*(x + sign * h * dx for x, dx in zip(primals, tangents))) for sign in (1, -1))
    torch.testing.assert_close(derivative, (plus - minus) / (2 * h), atol=1e-8, rtol=1e-6)


def test_autocast_agrees() -> None:
    q, k, v = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [attention(q, k, v, backend=backend) for backend in BACKENDS]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=4e-2, rtol=4e-2)


def test_unknown_backend() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="unknown attention back end 'flash': use one of auto, sdpa, math"):
        attention(q, k, v, backend="flash")
