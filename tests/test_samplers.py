"""Samplers: randomness per sample, the γ-formula, grids, options, and the dense reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import toy
from dense import dense_sample
from flowlm import path, rng
from flowlm.backbone import BackboneConfig
from flowlm.clock import Clock, DecodingErrorClock, UniformClock
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.path import DenseNoise
from flowlm.posterior import Posterior
from flowlm.samplers import Step, sample
from test_backbone import unzero

B, L, D, V = 6, 5, 16, 50
SEED = 11


def make(two_times: bool = True, vocab_size: int = V) -> Denoiser:
    torch.manual_seed(0)
    backbone = BackboneConfig(width=D, depth=2, heads=2, conditioning=8)
    net = Denoiser(DenoiserConfig(vocab_size=vocab_size, length=L, two_times=two_times, backbone=backbone))
    unzero(net)
    with torch.no_grad():
        net.head.weight.mul_(5)  # decided posteriors, so that samples differ and depend on their states
    return net


def steps_of(net: Denoiser, num: int = B, steps: int = 4, **options: Any) -> tuple[Tensor, list[Step]]:
    seen: list[Step] = []
    out = sample(net, num, L, steps, seed=options.pop("seed", SEED), callback=seen.append, **options)
    return out.tokens, seen


each_arity = pytest.mark.parametrize("two_times", [False, True], ids=["flow", "flow map"])


# --- randomness ----------------------------------------------------------------------------------


@each_arity
@pytest.mark.parametrize("last", ["argmax", "categorical"])
@pytest.mark.parametrize("vocab_size", [V, 20], ids=["low-rank", "dense"])
def test_a_sample_is_the_same_in_any_batch(vocab_size: int, last: str, two_times: bool) -> None:
    net = make(two_times, vocab_size)
    options: dict[str, Any] = {"seed": SEED, "gamma": 0.6, "last": last}
    whole = sample(net, 7, L, 3, **options).tokens
    for first, num in ((0, 1), (3, 2), (6, 1), (2, 5)):
        part = sample(net, num, L, 3, first=first, **options).tokens
        assert torch.equal(part, whole[first : first + num])
    assert len(whole.unique(dim=0)) >= 3


@each_arity
def test_seeds(two_times: bool) -> None:
    net = make(two_times)
    one, again, other = (sample(net, B, L, 3, seed=s, gamma=0.5).tokens for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_sampling_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    sample(make(), B, L, 2, seed=0, gamma=1.0, last="categorical")
    assert torch.equal(torch.get_rng_state(), state)


def test_streams_of_noise_are_distinct() -> None:
    """The prior and every re-noising read fresh noise, each standard normal."""
    net = make()
    law = net.noise_law()
    names = [("prior", 0), ("renoise", 0), ("renoise", 1)]
    rows = [(SEED, stream, i, n) for stream, i in names for n in range(400)]
    xi = rng.normal_rows(rows, (L, law.width), torch.device("cpu")).view(3, -1)
    correlation = torch.corrcoef(xi)
    assert (correlation - torch.eye(3)).abs().max() < 0.02
    assert xi.mean().abs() < 0.02
    assert (xi.std() - 1).abs() < 0.02


# --- the formula ---------------------------------------------------------------------------------


@each_arity
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_dense_and_low_rank_samplers_give_the_same_tokens(
    gamma: float, two_times: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler on y = xE and the dense sampler on x, from the same z, ε."""
    net = make(two_times)
    monkeypatch.setattr(net, "noise_law", lambda: DenseNoise(net.embedding))
    steps = 5
    tokens, seen = steps_of(net, steps=steps, gamma=gamma)

    def noise(stream: str, i: int) -> Tensor:
        rows = [(SEED, stream, i, n) for n in range(B)]
        return rng.normal_rows(rows, (L, V), torch.device("cpu"))

    def network(y: Tensor, s: float, t: float) -> Tensor:
        return (net(y, s, t) if two_times else net(y, s)).log_probs().exp()

    grid = net.clock.time(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()
    fresh = [noise("renoise", i) for i in range(steps - 1)]
    with torch.no_grad():
        expected, states = dense_sample(network, net.embedding, noise("prior", 0), fresh, grid, gamma)
        for step, x in zip(seen, states, strict=True):
            torch.testing.assert_close(step.y, x @ net.embedding, atol=2e-5, rtol=1e-4)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gamma_zero_and_one(gamma: float) -> None:
    """γ = 0: y ← X_{t,t'}(y). γ = 1: y ← (1-t') y_0' + t' δ_{t,1}(y)."""
    net = make()
    _, seen = steps_of(net, gamma=gamma)
    law = net.noise_law()
    with torch.no_grad():
        for now, after in itertools.pairwise(seen):
            rows = [(SEED, "renoise", now.index, n) for n in range(B)]
            fresh = law(rng.normal_rows(rows, (L, law.width), torch.device("cpu")))
            s, t = now.t, after.t
            if gamma:
                expected = (1 - t) * fresh + t * net(now.y, s, 1.0).embed()
            else:
                expected = ((1 - t) * now.y + (t - s) * net(now.y, s, t).embed()) / (1 - s)
            torch.testing.assert_close(after.y, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_two_time_network_is_asked_for_the_times_of_the_step(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make()
    asked: list[tuple[float, float]] = []
    forward = net.forward

    def spy(y: Tensor, s: float, t: float) -> Posterior:
        asked.append((s, t))
        return forward(y, s, t)

    monkeypatch.setattr(net, "forward", spy)
    sample(net, B, L, steps, seed=0, gamma=0.6)
    grid = net.clock.time(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).tolist()
    ends = [1 - (1 - t) * 0.8 for t in grid[1:-1]] + [1.0]
    assert [s for s, _ in asked] == pytest.approx(grid[:-1])
    assert [t for _, t in asked] == pytest.approx(ends)


# --- what comes back -----------------------------------------------------------------------------


@each_arity
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls_counted_and_shown(steps: int, two_times: bool) -> None:
    net = make(two_times)
    calls: list[Tensor] = []
    net.register_forward_hook(lambda *args: calls.append(args[1][0]))
    seen: list[Step] = []
    out = sample(net, B, L, steps, seed=SEED, gamma=0.3, callback=seen.append)
    assert out.nfe == len(calls) == len(seen) == steps
    assert [step.index for step in seen] == list(range(steps))
    assert all(torch.equal(step.y, y) for step, y in zip(seen, calls))
    assert torch.equal(seen[-1].posterior.tokens(), out.tokens)
    assert out.tokens.shape == (B, L)
    assert out.tokens.dtype == torch.int64


@each_arity
@pytest.mark.parametrize(
    "clock", [None, UniformClock(), DecodingErrorClock(5)], ids=["own", "uniform", "V=5"]
)
def test_grid_is_uniform_in_clock_time(clock: Any, two_times: bool) -> None:
    net = make(two_times)
    _, seen = steps_of(net, steps=8, clock=clock)
    tau = (clock or net.clock).tau(torch.tensor([step.t for step in seen], dtype=torch.float64))
    torch.testing.assert_close(tau, torch.arange(8, dtype=torch.float64) / 8, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_prior_scale(scale: float) -> None:
    net = make()
    (_, plain), (_, scaled) = steps_of(net, steps=1), steps_of(net, steps=1, prior_scale=scale)
    torch.testing.assert_close(scaled[0].y, scale * plain[0].y)
    law = net.noise_law()
    rows = [(SEED, "prior", 0, n) for n in range(B)]
    with torch.no_grad():
        y0 = law(rng.normal_rows(rows, (L, law.width), torch.device("cpu")))
    torch.testing.assert_close(plain[0].y, y0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_of_every_step(temperature: float) -> None:
    net = make()
    _, seen = steps_of(net, steps=3, temperature=temperature)
    with torch.no_grad():
        for now, after in itertools.pairwise(seen):
            probs = (now.posterior.log_probs() / temperature).softmax(-1)
            expected = path.step(now.y, probs @ net.embedding, now.t, after.t)
            torch.testing.assert_close(after.y, expected, atol=1e-5, rtol=1e-4)


def test_one_step_ignores_gamma() -> None:
    net = make()
    tokens, seen = steps_of(net, steps=1)
    for gamma in (0.3, 1.0):
        other, shown = steps_of(net, steps=1, gamma=gamma)
        assert torch.equal(other, tokens)
        assert torch.equal(shown[0].y, seen[0].y)
    assert not torch.equal(steps_of(net, steps=2)[0], steps_of(net, steps=2, gamma=1.0)[0])


# --- the exact toy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clock", [DecodingErrorClock(toy.VOCAB), UniformClock()], ids=["decoding", "uniform"]
)
def test_euler_has_order_one(clock: Clock) -> None:
    """The sampler's state three quarters of the way, against the exact flow: error ∝ 1/steps."""
    exact: Any = toy.ExactDenoiser(two_times=False)
    counts, errors = [32, 64, 128, 256], []
    for n in counts:
        seen: list[Step] = []
        sample(exact, 200, toy.LENGTH, n, seed=SEED, clock=clock, callback=seen.append)
        late = seen[3 * n // 4]
        truth = toy.LANGUAGE.flow_map(seen[0].y, 0.0, late.t)
        errors.append(float((late.y - truth).square().mean().sqrt()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.15 < slope < -0.85
    assert errors[-1] < 0.02


def test_exact_flow_map_steps_compose() -> None:
    """With δ_{s,t} in place of D_s the same loop lands on the flow at every grid time: order infinity."""
    seen: list[Step] = []
    exact: Any = toy.ExactDenoiser(two_times=True)
    sample(exact, 200, toy.LENGTH, 5, seed=SEED, callback=seen.append)
    for later in seen[1:]:
        truth = toy.LANGUAGE.flow_map(seen[0].y, 0.0, later.t)
        torch.testing.assert_close(later.y, truth, atol=1e-6, rtol=0)


def test_exact_flow_map_is_one_step() -> None:
    """One call of δ_{0,1} writes the flow's own passages, and their frequencies are the language's."""
    num = 4000
    seen: list[Step] = []
    exact: Any = toy.ExactDenoiser(two_times=True, rk_steps=96)
    one = sample(exact, num, toy.LENGTH, 1, seed=SEED, callback=seen.append)
    assert one.nfe == 1
    flow = toy.LANGUAGE.flow_map(seen[0].y, 0.0, 1.0, steps=160)
    torch.testing.assert_close(flow.amax(-1), torch.ones(num, toy.LENGTH, dtype=torch.float64))
    assert torch.equal(one.tokens, flow.argmax(-1))
    assert toy.LANGUAGE.total_variation(one.tokens) < 0.045  # 0.029 is expected of this many exact draws
    euler: Any = toy.ExactDenoiser(two_times=False)
    for steps, low, high in ((256, 0.0, 0.01), (1, 0.3, 1.0)):
        tokens = sample(euler, 1000, toy.LENGTH, steps, seed=SEED).tokens
        assert low <= (tokens != one.tokens[:1000]).any(-1).double().mean() <= high


def test_full_renoising_keeps_the_exact_law() -> None:
    """γ = 1 noises the passages of one step and maps them again: other passages of the same law."""
    exact: Any = toy.ExactDenoiser(two_times=True, rk_steps=64)
    plain, noisy = (sample(exact, 3000, toy.LENGTH, 2, seed=SEED, gamma=g).tokens for g in (0.0, 1.0))
    assert (plain != noisy).any(-1).double().mean() > 0.1
    assert toy.LANGUAGE.total_variation(noisy) < 0.05  # 0.033 is expected of this many exact draws


# --- the last step's rule ------------------------------------------------------------------------


class Constant:
    """A denoiser that answers the same probabilities everywhere."""

    def __init__(self, probs: Tensor):
        self.config = DenoiserConfig(vocab_size=len(probs))
        self.embedding = torch.eye(len(probs))
        self.clock = UniformClock()
        self.logits = probs.log()

    def noise_law(self) -> DenseNoise:
        return DenseNoise(self.embedding)

    def __call__(self, y: Tensor, s: float) -> Posterior:
        return Posterior(self.logits.expand(*y.shape), lambda hidden: hidden, self.embedding)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_categorical_frequencies(temperature: float) -> None:
    """χ² of 40,000 tokens against softmax(logits/temperature); argmax gives the mode alone."""
    probs = torch.tensor([0.45, 0.3, 0.2, 0.04, 0.01])
    net: Any = Constant(probs)
    out = sample(net, 10_000, 4, 1, seed=3, last="categorical", temperature=temperature).tokens
    expected = (probs.double().log() / temperature).softmax(-1) * out.numel()
    counts = torch.bincount(out.flatten(), minlength=5)
    chi2 = ((counts - expected).square() / expected).sum()
    assert chi2 < 18.5  # the 99.9 % point with 4 degrees of freedom
    pairs = torch.bincount(out[:, 0] * 5 + out[:, 1], minlength=25).view(5, 5)
    independent = torch.outer(counts, counts) / out.numel() ** 2 * len(out)
    assert ((pairs - independent).square() / independent).sum() < 52.6  # with 24
    assert not sample(net, 100, 4, 1, seed=3).tokens.any()


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\], got -0.1"),
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        ({"gamma": float("nan")}, r"gamma must lie in \[0, 1\]"),
        ({"prior_scale": 0.0}, "prior_scale must be positive, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"last": "nucleus"}, "last = 'nucleus': the last step's rule is"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    call: Callable[..., Any] = sample
    with pytest.raises(ValueError, match=message):
        call(make(), **{"num": 1, "length": L, "steps": 2, "seed": 0, **options})
