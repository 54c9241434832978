"""Clocks: the published table, independent quadrature, inverses, rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlm.clock import AdaptiveClock, Clock, DecodingErrorClock, UniformClock, make_clock

TABLE_TAU = [0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99]
TABLE = {
    27: [0.106, 0.313, 0.426, 0.568, 0.669, 0.734, 0.775, 0.794, 0.823],
    512: [0.396, 0.569, 0.629, 0.699, 0.753, 0.790, 0.815, 0.828, 0.847],
    8192: [0.581, 0.676, 0.711, 0.756, 0.792, 0.818, 0.837, 0.847, 0.862],
    30522: [0.631, 0.707, 0.736, 0.774, 0.805, 0.828, 0.845, 0.854, 0.868],
    50258: [0.646, 0.717, 0.744, 0.779, 0.809, 0.831, 0.848, 0.856, 0.870],
}
VOCABS = [2, 3, 27, 77, 131, 512, 8192, 50258, 250_000, 262_144]


def fitted_clock() -> AdaptiveClock:
    """An adaptive clock whose loss falls in the middle of the base clock's τ."""
    clock = AdaptiveClock(DecodingErrorClock(27))
    t = clock.base.time(torch.linspace(0, 1, 4001, dtype=torch.float64))
    clock.observe(t, torch.sigmoid(20 * (0.5 - clock.base.tau(t))))
    clock.refit()
    return clock


CLOCKS: dict[str, Callable[[], Clock]] = {
    "uniform": UniformClock,
    **{f"V={v}": lambda v=v: DecodingErrorClock(v) for v in VOCABS},  # type: ignore[misc]
    "adaptive": fitted_clock,
}


@pytest.fixture(scope="module", params=CLOCKS)
def clock(request: pytest.FixtureRequest) -> Clock:
    return CLOCKS[request.param]()


def quadrature_tau(t: NDArray[np.float64], vocab_size: int) -> NDArray[np.float64]:
    """τ(t) by panelled Gauss–Legendre on the shifted integrand φ(m - t/(1-t)) Φ(m)^(V-1), 0 ≤ t < 1.

    Neither the rule, nor the integration variable, nor the normal law's routine is the clock's own.
    """
    node, weight = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(-11, 11, 45)
    half = (edges[1:] - edges[:-1]) / 2
    z = ((edges[1:] + edges[:-1]) / 2)[:, None] + half[:, None] * node
    w = (half[:, None] * weight * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)).ravel()
    m = z.ravel() + (t / (1 - t))[:, None]
    tail = np.vectorize(math.erfc)(np.abs(m) / math.sqrt(2)) / 2
    with np.errstate(divide="ignore"):
        log_cdf = np.where(m > 0, np.log1p(-tail), np.log(tail))
    correct = (w * np.exp((vocab_size - 1) * log_cdf)).sum(1)
    return (vocab_size * correct - 1) / (vocab_size - 1)


@pytest.mark.parametrize("vocab_size", TABLE)
def test_published_table(vocab_size: int) -> None:
    t = DecodingErrorClock(vocab_size).time(torch.tensor(TABLE_TAU, dtype=torch.float64))
    torch.testing.assert_close(t, torch.tensor(TABLE[vocab_size], dtype=torch.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("vocab_size", VOCABS)
def test_against_independent_quadrature(vocab_size: int) -> None:
    t = np.sort(np.random.default_rng(0).uniform(0, 0.999, 200))
    clock = DecodingErrorClock(vocab_size)
    tau = clock.tau(torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(tau, quadrature_tau(t, vocab_size), atol=1e-6, rtol=0)
    assert tau.max() > 0.9
    slope = (quadrature_tau(t + 1e-5, vocab_size) - quadrature_tau(t - 1e-5, vocab_size)) / 2e-5
    np.testing.assert_allclose(
        clock.rate(torch.from_numpy(t)).numpy(), slope, atol=2e-4 * slope.max(), rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_inverts_tau(clock: Clock, dtype: torch.dtype) -> None:
    tau = torch.linspace(0, 1, 5001, dtype=dtype)
    t = clock.time(tau)
    tight = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(clock.tau(t), tau, atol=tight, rtol=0)
    # At float32, 3 rounding units of τ are a distance 2e-7/rate in t.
    t = torch.linspace(0, 1, 5001, dtype=dtype)
    tau = clock.tau(t)
    inside = (tau > 1e-6) & (tau < 1 - 1e-6)
    rounding = 2e-7 / clock.rate(t[inside]) if dtype == torch.float32 else 0.0
    assert inside.sum() > 500
    assert ((clock.time(tau[inside]) - t[inside]).abs() <= 1e-6 + rounding).all()


def test_monotone(clock: Clock) -> None:
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    tau = clock.tau(t)
    assert (tau.diff() >= 0).all()
    resolved = (tau[1:] > 1e-6) & (tau[1:] < 1 - 1e-6)
    assert (tau.diff()[resolved] > 0).all()
    assert (clock.time(t).diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_exact(clock: Clock, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert clock.tau(ends).tolist() == [0.0, 1.0]
    assert clock.time(ends).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_dtype_and_shape_are_kept(clock: Clock, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.full(shape, 0.7, dtype=dtype)
    for fn in (clock.tau, clock.time, clock.rate):
        assert fn(x).shape == x.shape
        assert fn(x).dtype == dtype


def test_rate_is_the_derivative(clock: Clock) -> None:
    # Away from the table's nodes, where the second derivative jumps.
    t = torch.linspace(0.011, 0.989, 701, dtype=torch.float64)
    rate = clock.rate(t)
    _, tangent = torch.func.jvp(clock.tau, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, rate, atol=1e-9, rtol=1e-9)
    h = 1e-7
    torch.testing.assert_close((clock.tau(t + h) - clock.tau(t - h)) / (2 * h), rate, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "V=512", "adaptive"])
def test_traces_whole(kind: str) -> None:
    """One graph: a read of a value on the host, which would synchronise, breaks the trace."""
    clock = CLOCKS[kind]()
    x = torch.linspace(0, 1, 7)

    def all_three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return clock.tau(x), clock.time(x), clock.rate(x)

    torch.compiler.reset()
    for out, expected in zip(torch.compile(all_three, fullgraph=True, backend="eager")(x), all_three(x)):
        torch.testing.assert_close(out, expected)


def test_tables_stay_float64_in_a_cast_model() -> None:
    clock, reference = DecodingErrorClock(512).bfloat16(), DecodingErrorClock(512)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(clock.tau(t), reference.tau(t), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodingErrorClock(1), "vocab_size must be at least 2, got 1"),
        (lambda: AdaptiveClock(UniformClock(), floor=0.0), r"floor must lie in \(0, 1\]"),
        (lambda: AdaptiveClock(UniformClock(), floor=1.5), r"floor must lie in \(0, 1\]"),
        (lambda: make_clock("cosine", 27), "unknown clock 'cosine'"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_make_clock() -> None:
    assert isinstance(make_clock("uniform", 27), UniformClock)
    made = make_clock("decoding-error", 27)
    assert isinstance(made, DecodingErrorClock)
    assert made.vocab_size == 27


class TestAdaptive:
    def test_density_follows_the_fall_of_the_loss(self) -> None:
        """Times drawn uniformly in its τ fall where the loss does, and everywhere a little."""
        clock = fitted_clock()
        drawn = clock.base.tau(clock.time(torch.linspace(0, 1, 100_001, dtype=torch.float64)))
        density = torch.histc(drawn, 20, 0, 1) / len(drawn) * 20
        edges = torch.linspace(0, 1, 21, dtype=torch.float64)
        fall = -torch.sigmoid(20 * (0.5 - edges)).diff() * 20
        torch.testing.assert_close(density, 0.2 + 0.8 * fall, atol=0.35, rtol=0)
        assert density.argmax() in (9, 10)
        assert density.min() >= 0.2 - 1e-3

    def test_floor_keeps_times_where_the_loss_rises(self) -> None:
        clock = AdaptiveClock(UniformClock(), floor=0.1)
        t = torch.linspace(0, 1, 2001, dtype=torch.float64)
        clock.observe(t, (t - 0.3).abs())  # falls to 0.3, then rises
        clock.refit()
        rate = clock.rate(t)
        torch.testing.assert_close(rate[t > 0.4], torch.full_like(rate[t > 0.4], 0.1))
        assert (rate[t < 0.2] > 2).all()

    def test_a_flat_loss_gives_the_base_clock(self) -> None:
        clock = AdaptiveClock(UniformClock())
        t = torch.linspace(0, 1, 501, dtype=torch.float64)
        clock.observe(t, torch.ones_like(t))
        clock.refit()
        torch.testing.assert_close(clock.tau(t), t)

    def test_few_observations_change_nothing(self) -> None:
        clock = AdaptiveClock(UniformClock())
        before = clock.cdf.clone()
        clock.observe(torch.tensor([0.1, 0.11, 0.9]), torch.tensor([5.0, 5.0, 1.0]))  # two bins
        clock.refit()
        assert torch.equal(clock.cdf, before)
        assert clock.count.sum() == 3

    def test_old_losses_fade(self) -> None:
        """After the loss moves its fall from early to late, refits follow."""
        clock = AdaptiveClock(UniformClock(), memory=0.5)
        t = torch.linspace(0, 1, 2001, dtype=torch.float64)
        clock.observe(t, torch.sigmoid(40 * (0.2 - t)))
        clock.refit()
        early = clock.rate(torch.tensor(0.2))
        for _ in range(6):
            clock.observe(t, torch.sigmoid(40 * (0.8 - t)))
            clock.refit()
        assert clock.rate(torch.tensor(0.8)) > 3
        assert clock.rate(torch.tensor(0.2)) < early / 4

    def test_state_dict_round_trip(self) -> None:
        clock = fitted_clock()
        clock.observe(torch.tensor([0.3, 0.6]), torch.tensor([2.0, 1.0]))
        other = AdaptiveClock(DecodingErrorClock(27))
        other.load_state_dict(clock.state_dict())
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        assert torch.equal(clock.tau(t), other.tau(t))
        clock.refit()  # the losses not yet used travel too
        other.refit()
        assert torch.equal(clock.tau(t), other.tau(t))
