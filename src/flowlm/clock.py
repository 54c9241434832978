"""The clocks: maps between flow time t and clock time τ.

Flow time t runs from 0 (noise) to 1 (data) and is what everything outside this module speaks. Clock
time τ in [0, 1] says how far the tokens are resolved; times are drawn, and sampling grids laid, uniformly
in τ. Three clocks share one interface:

    tau(t)    flow time -> clock time, differentiable in t
    time(tau) clock time -> flow time, the inverse
    rate(t)   dτ/dt

All three are torch functions: they run on the tensor's own device, keep its dtype and never synchronise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowlm.device import wide, widened


def correct_decoding_probability(
    t: Tensor, vocab_size: int, *, with_rate: bool = False
) -> tuple[Tensor, Tensor]:
    """P_c(t) = E_{Z~N(0,1)}[Φ(Z + t/(1-t))^(V-1)], and its derivative in t, in float64 by quadrature.

    P_c is the probability that the largest coordinate of (1-t) z + t·onehot is the token's own
    (Flow Map Language Models, arXiv 2602.16813, the time reparameterization).

    Args:
        t: flow times, shape (N,), in [0, 1].
        vocab_size: V, at least 2.
        with_rate: also compute dP_c/dt (else zeros are returned in its place).

    Returns:
        Two float64 tensors (N,): P_c and dP_c/dt.
    """
    t = t.double()
    n = vocab_size - 1
    # The trapezoid rule converges exponentially on a Gaussian-weighted smooth integrand; [-12, 12] leaves
    # a tail of 1e-33. With step 1/64 it is exact to rounding for every V up to 256k.
    z = torch.linspace(-12.0, 12.0, 24 * 64 + 1, dtype=torch.float64)
    log_weight = -0.5 * z.square() - 0.5 * math.log(2 * math.pi) + math.log(1 / 64)
    prob = torch.ones_like(t)
    rate = torch.zeros_like(t)
    inside = t < 1
    # Chunked so that a fine table costs a few megabytes, not hundreds.
    for idx in inside.nonzero().flatten().split(256):
        s = (t[idx] / (1 - t[idx]))[:, None]
        log_phi = torch.special.log_ndtr(z + s)
        prob[idx] = torch.exp(log_weight + n * log_phi).sum(-1)
        if with_rate:
            log_density = -0.5 * (z + s).square() - 0.5 * math.log(2 * math.pi)
            ds_dt = 1 / (1 - t[idx]).square()
            integral = torch.exp(log_weight + (n - 1) * log_phi + log_density).sum(-1)
            rate[idx] = n * integral * ds_dt
    return prob, rate


class Clock(nn.Module):
    """Interface of every clock; times may have any shape."""

    def tau(self, t: Tensor) -> Tensor:
        """Clock time of flow time t in [0, 1]."""
        raise NotImplementedError

    def time(self, tau: Tensor) -> Tensor:
        """Flow time of clock time τ in [0, 1]; the inverse of `tau`."""
        raise NotImplementedError

    def rate(self, t: Tensor) -> Tensor:
        """dτ/dt at flow time t."""
        raise NotImplementedError


class UniformClock(Clock):
    """The identity: τ = t."""

    def tau(self, t: Tensor) -> Tensor:
        return t

    def time(self, tau: Tensor) -> Tensor:
        return tau

    def rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


def _taken(module: nn.Module, fn: Any) -> nn.Module:
    """For `nn.Module._apply`: tables keep their precision when a model is cast to a lower one; their device changes."""
    for name, table in module.named_buffers(recurse=False):
        device = fn(torch.empty(0, device=table.device)).device
        setattr(module, name, table.to(device, wide(device)))
    return module


class _MonotoneCurve(nn.Module):
    """A monotone C¹ cubic through (x_i, y_i) with slopes m_i on [0, 1] -> [0, 1], and its exact inverse.

    The inverse solves the same cubic by bisection inside the bracketing interval, so that
    inverse(value(x)) = x to rounding wherever the slope is not vanishing.
    """

    x: Tensor
    y: Tensor
    m: Tensor

    def __init__(self, x: Tensor, y: Tensor, m: Tensor):
        super().__init__()
        # Fritsch–Carlson: slopes of at most three times the neighbouring secants keep the cubic monotone.
        secant = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        pad = secant.new_full((1,), float("inf"))
        m = torch.minimum(
            m.clamp_min(0), 3 * torch.minimum(torch.cat([pad, secant]), torch.cat([secant, pad]))
        )
        for name, value in (("x", x), ("y", y), ("m", m)):
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        return _taken(self, fn)

    def _cubic(self, i: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at the fraction u of interval i."""
        h = self.x[i + 1] - self.x[i]
        y0, m0, m1 = self.y[i], self.m[i] * h, self.m[i + 1] * h
        rise = self.y[i + 1] - y0
        a, b = m0 + m1 - 2 * rise, 3 * rise - 2 * m0 - m1
        return y0 + u * (m0 + u * (b + u * a)), (m0 + u * (2 * b + u * 3 * a)) / h

    def _locate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.x.dtype).clamp(0, 1)
        i = torch.searchsorted(self.x, x.detach().contiguous(), right=True).sub(1).clamp(0, len(self.x) - 2)
        return i, (x - self.x[i]) / (self.x[i + 1] - self.x[i])

    def value(self, x: Tensor) -> Tensor:
        i, u = self._locate(x)
        return self._cubic(i, u)[0].clamp(0, 1).to(x.dtype)

    def slope(self, x: Tensor) -> Tensor:
        i, u = self._locate(x)
        return self._cubic(i, u)[1].to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        target = y.to(self.y.dtype).clamp(0, 1)
        i = (
            torch.searchsorted(self.y, target.detach().contiguous(), right=True)
            .sub(1)
            .clamp(0, len(self.x) - 2)
        )
        low, high = torch.zeros_like(target), torch.ones_like(target)
        width = self.x[i + 1] - self.x[i]
        u = 0.5 * (low + high)
        # Newton's method, kept inside a bracket that every step narrows: where the curve is flat and Newton's
        # step leaves the bracket, the bracket is halved.
        for _ in range(16):
            value, slope = self._cubic(i, u)
            below = value < target
            low, high = torch.where(below, u, low), torch.where(below, high, u)
            newton = u + (target - value) / (slope * width)
            u = torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
        x = self.x[i] + u * width
        # Where the curve saturates its inverse is a whole interval: the ends go to the ends.
        return x.masked_fill(target >= 1, 1.0).masked_fill(target <= 0, 0.0).to(y.dtype)


@lru_cache(maxsize=8)
def _decoding_error_table(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes t, values τ(t) and slopes dτ/dt of the decoding-error clock; kept, as each model makes one."""
    t = torch.linspace(0, 1, 2049, dtype=torch.float64)
    prob, rate = correct_decoding_probability(t, vocab_size, with_rate=True)
    tau = ((vocab_size * prob - 1) / (vocab_size - 1)).clamp(0, 1)
    tau[0], tau[-1] = 0.0, 1.0
    return t, torch.cummax(tau, 0).values, vocab_size / (vocab_size - 1) * rate


class DecodingErrorClock(Clock):
    """The paper's clock: equal steps of τ resolve equal shares of the tokens of a noisy one-hot.

        τ(t) = (V·P_c(t) - 1)/(V - 1),   P_c(t) = E_Z[Φ(Z + t/(1-t))^(V-1)]

    (arXiv 2602.16813, time reparameterization by the decoding error rate.) Tabulated once in float64 by
    quadrature with exact slopes, evaluated as a C¹ cubic: within 1e-6 of quadrature.

    Args:
        vocab_size: V, from 2 up.

    Raises:
        ValueError: vocab_size < 2.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        if vocab_size < 2:
            raise ValueError(
                f"vocab_size must be at least 2, got {vocab_size}: with one token there is nothing to resolve"
            )
        self.vocab_size = vocab_size
        self.curve = _MonotoneCurve(*_decoding_error_table(vocab_size))

    def tau(self, t: Tensor) -> Tensor:
        return self.curve.value(t)

    def time(self, tau: Tensor) -> Tensor:
        return self.curve.inverse(tau)

    def rate(self, t: Tensor) -> Tensor:
        return self.curve.slope(t)


class AdaptiveClock(Clock):
    """A sampling clock that spends time where the loss falls.

    It keeps (τ, loss) pairs in the base clock's τ, and on `refit` draws times with density
    ∝ max(-dloss/dτ, 0) + floor; its own clock time is the cumulative of that density over the base clock.
    The network goes on reading the base (conditioning) clock.

    Args:
        base: the clock in whose τ the loss curve is kept.
        bins: resolution of the loss curve.
        floor: share of the density that stays uniform in base τ, in (0, 1].
        memory: how much of the old curve survives a refit, in [0, 1).
    """

    cdf: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, base: Clock, bins: int = 32, floor: float = 0.2, memory: float = 0.5):
        super().__init__()
        if not 0 < floor <= 1:
            raise ValueError(
                f"floor must lie in (0, 1], got {floor}: without it some times would never be drawn"
            )
        self.base, self.bins, self.floor, self.memory = base, bins, floor, memory
        self.register_buffer("cdf", torch.linspace(0, 1, bins + 1, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.float64))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        if recurse:
            self.base._apply(fn)
        return _taken(self, fn)

    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Record losses (B,) seen at flow times t (B,)."""
        index = (self.base.tau(widened(t)) * self.bins).long().clamp(0, self.bins - 1).flatten()
        self.total.index_add_(0, index, loss.to(self.total.dtype).flatten())
        self.count.index_add_(0, index, torch.ones_like(index, dtype=self.count.dtype))

    @torch.no_grad()
    def refit(self) -> None:
        """Refit the density to the losses observed; the old ones are kept with weight `memory`."""
        seen = self.count > 0
        if int(seen.sum()) < 3:
            return
        centres = (np.arange(self.bins) + 0.5) / self.bins
        mask = seen.cpu().numpy()
        mean = np.interp(centres, centres[mask], (self.total[seen] / self.count[seen]).cpu().numpy())
        smooth = np.convolve(np.pad(mean, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
        fall = np.maximum(-np.gradient(smooth), 0)
        share = fall / fall.sum() if fall.sum() > 0 else np.full(self.bins, 1 / self.bins)
        density = (1 - self.floor) * share + self.floor / self.bins
        cdf = np.concatenate([[0.0], np.cumsum(density)])
        self.cdf.copy_(torch.from_numpy(cdf / cdf[-1]))
        self.total.mul_(self.memory)
        self.count.mul_(self.memory)

    def _from_base(self, tau: Tensor) -> Tensor:
        x = tau.to(self.cdf.dtype) * self.bins
        i = x.detach().long().clamp(0, self.bins - 1)
        return (self.cdf[i] + (x - i) * (self.cdf[i + 1] - self.cdf[i])).to(tau.dtype)

    def _to_base(self, tau: Tensor) -> Tensor:
        y = tau.to(self.cdf.dtype)
        i = torch.searchsorted(self.cdf, y.contiguous(), right=True).sub(1).clamp(0, self.bins - 1)
        return ((i + (y - self.cdf[i]) / (self.cdf[i + 1] - self.cdf[i])) / self.bins).to(tau.dtype)

    def tau(self, t: Tensor) -> Tensor:
        return self._from_base(self.base.tau(t))

    def time(self, tau: Tensor) -> Tensor:
        return self.base.time(self._to_base(tau))

    def rate(self, t: Tensor) -> Tensor:
        i = (self.base.tau(t) * self.bins).long().clamp(0, self.bins - 1)
        return ((self.cdf[i + 1] - self.cdf[i]) * self.bins).to(t.dtype) * self.base.rate(t)


def make_clock(kind: str, vocab_size: int) -> Clock:
    """The clock named in a config: `decoding-error` or `uniform`."""
    if kind == "decoding-error":
        return DecodingErrorClock(vocab_size)
    if kind == "uniform":
        return UniformClock()
    raise ValueError(f"unknown clock {kind!r}: use 'decoding-error' or 'uniform'")
