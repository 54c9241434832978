"""Sampling: one loop for flows and flow maps, with re-noising, and a callback that sees every posterior.

    y ← X_{t,t̃}(y) + (σ̃-σ) d + γσ y_0',   d = δ_{t,t̃}(y) embedded,   t̃ = 1-(1-t')√(1-γ²), σ = 1-t', σ̃ = 1-t̃

γ = 0 is the plain flow map (or Euler's method, for a one-time denoiser), γ = 1 multistep consistency
sampling. The last of N network calls gives the tokens. (arXiv 2602.16813, the samplers of FLM and FMLM.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowlm import rng
from flowlm.clock import Clock
from flowlm.denoiser import Denoiser
from flowlm.device import wide
from flowlm.path import renoise, renoise_times, step
from flowlm.posterior import Posterior

#: Options of the flows' sampler.
DEFAULTS: Mapping[str, Any] = {"gamma": 0.0, "prior_scale": 1.0, "temperature": 1.0, "last": "argmax"}


@dataclass(frozen=True)
class Sample:
    """What a sampler returns."""

    tokens: Tensor
    """(num, L) token ids."""
    nfe: int
    """Network calls (per sample)."""


@dataclass(frozen=True)
class Step:
    """What a callback sees, once for each network call."""

    index: int
    """0 … steps-1."""
    t: float
    """Flow time at which the network was called."""
    y: Tensor
    """The state it read, (num, L, d)."""
    posterior: Posterior
    """What it answered."""


def check_temperature(temperature: float) -> None:
    """ValueError: it is not a positive number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}: 1 leaves the posterior as it is")


def check_sampler_options(
    steps: int, gamma: float, prior_scale: float, temperature: float, last: str, num: int
) -> None:
    """Refuse options that mean nothing, with the reason."""
    if steps < 1:
        raise ValueError(
            f"steps must be at least 1, got {steps}: every sample takes at least one network call"
        )
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}: 0 re-noises nothing, 1 everything")
    if not 0 < prior_scale < math.inf:
        raise ValueError(f"prior_scale must be positive, got {prior_scale}: 1 is the law trained on")
    check_temperature(temperature)
    if last not in ("argmax", "categorical"):
        raise ValueError(f"last = {last!r}: the last step's rule is 'argmax' or 'categorical'")


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    num: int,
    length: int,
    steps: int,
    *,
    seed: int,
    first: int = 0,
    gamma: float = 0.0,
    prior_scale: float = 1.0,
    temperature: float = 1.0,
    last: str = "argmax",
    clock: Clock | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Sample:
    """Samples num passages of length tokens in steps network calls.

    Args:
        denoiser: one-time (FLM, Euler steps) or two-time (FMLM, flow-map steps).
        seed, first: sample i of this call has the noise of index first + i under seed, in any batch.
        gamma: share of re-noising between steps; has no effect on one step.
        prior_scale: κ in y_0 = κ ξCᵀ; below 1 trades entropy for likelihood.
        temperature: of every posterior, and of the categorical rule.
        last: "argmax" or "categorical" (float64).
        clock: in whose τ the grid is uniform; the denoiser's conditioning clock when None.
        callback: called with a Step after each network call.

    Raises:
        ValueError: steps < 1, num < 1, gamma outside [0, 1], an unknown rule.
    """
    check_sampler_options(steps, gamma, prior_scale, temperature, last, num)
    device = denoiser.embedding.device
    two_times = denoiser.config.two_times
    law = denoiser.noise_law()

    def noise(stream: str, index: int) -> Tensor:
        rows = [(seed, stream, index, first + i) for i in range(num)]
        return law(rng.normal_rows(rows, (length, law.width), device))

    y = prior_scale * noise("prior", 0)
    tau = torch.linspace(0, 1, steps + 1, dtype=wide(device))
    clock = denoiser.clock if clock is None else clock
    grid = [float(t) for t in clock.time(tau.to(device)).cpu()]
    for i in range(steps):
        s, end = grid[i], grid[i + 1]
        final = i == steps - 1
        mid = 1.0 if final else float(renoise_times(end, gamma))
        posterior = denoiser(y, s, mid) if two_times else denoiser(y, s)
        if callback is not None:
            callback(Step(i, s, y, posterior))
        if not final:
            d = posterior.embed(temperature)
            y = step(y, d, s, mid)
            if gamma:
                y = renoise(y, d, noise("renoise", i), end, mid, gamma)
    uniform = None
    if last == "categorical":
        rows = [(seed, "last", 0, first + i) for i in range(num)]
        uniform = rng.uniform_rows(rows, (length,), device)
    return Sample(posterior.tokens(last, uniform, temperature), steps)
