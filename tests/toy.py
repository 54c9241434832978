"""The exact toy: a language of 27 passages whose posterior, flow and flow map are known.

With a = x/(1-t) and r = t/(1-t) the flow of x_t = (1-t) z + t·onehot is da/dr = D, where

    p(w | x_t = x) ∝ p(w) exp(r Σ_l a[l, w_l]),   D_t(x)[l, k] = p(w_l = k | x_t = x)

is a sum over all passages w. Beyond r = 12 the posterior of all but a vanishing share of states is one-hot
to rounding, so the flow is integrated up to there and continued by its closed form.

States are dense, (B, L, V) in float64: the toy's embedding is the identity, so y = x. With another one, E (V, d), the
state is y = xE, of which also less may be known than of x: with a = y/(1-t), G = EᵀE,

    p(w | y_t = y) ∝ p(w) exp(Σ_l r a[l]·G⁻¹e(w_l) - ½ r² e(w_l)·G⁻¹e(w_l)),   da/dr = D E
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flowlm.backbone import BackboneConfig
from flowlm.clock import Clock, DecodingErrorClock
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.objectives import FlowMapObjective, FlowObjective
from flowlm.posterior import Posterior

VOCAB, LENGTH = 3, 3
R_END = 12.0
#: First token, and next token given the last.
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEXT = torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.1, 0.6], [0.7, 0.2, 0.1]], dtype=torch.float64)


def times(t: Tensor | float) -> Tensor:
    """Times as a float64 factor of a state."""
    return torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1)


class Language:
    """The 27 passages and their probabilities.

    Args:
        embedding: E (V, d) of the states, whose columns are independent; the identity when None.
    """

    def __init__(self, embedding: Tensor | None = None) -> None:
        self.embedding = torch.eye(VOCAB, dtype=torch.float64) if embedding is None else embedding
        self.dual = self.embedding @ torch.linalg.inv(self.embedding.T @ self.embedding)
        passages = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
        probs = FIRST[passages[:, 0]] * NEXT[passages[:, :-1], passages[:, 1:]].prod(1)
        self.passages, self.probs = passages, probs
        self.onehot = torch.nn.functional.one_hot(self.passages, VOCAB).double()

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Passages (num, L) drawn from the law."""
        return self.passages[torch.multinomial(self.probs, num, True, generator=generator)]

    def total_variation(self, tokens: Tensor) -> float:
        """Distance between the frequencies of the passages in tokens (num, L) and the law."""
        index = (tokens * VOCAB ** torch.arange(LENGTH).flip(0)).sum(1)
        counts = torch.bincount(index, minlength=len(self.probs)).double() / len(tokens)
        return float((counts - self.probs).abs().sum() / 2)

    def _posterior(self, a: Tensor, r: Tensor) -> Tensor:
        own = r * (a @ self.dual.T) - r.square() / 2 * (self.dual * self.embedding).sum(-1)
        scores = own.flatten(1) @ self.onehot.flatten(1).T + self.probs.log()
        return (scores.softmax(-1) @ self.onehot.flatten(1)).view_as(own)

    def denoise(self, y: Tensor, t: Tensor | float) -> Tensor:
        """D_t(y) by enumeration; at t = 1 the nearest passage, as at t = .999."""
        left = (1 - times(t)).clamp_min(1e-3)
        return self._posterior(y / left, (1 - left) / left)

    def flow_map(self, y: Tensor, s: Tensor | float, t: Tensor | float, steps: int = 256) -> Tensor:
        """X_{s,t}(y) = ((1-t) y + (t-s) δ_{s,t} E)/(1-s), s < 1."""
        delta = self.flow_map_denoiser(y, s, t, steps)
        s, t = times(s), times(t)
        return ((1 - t) * y + (t - s) * (delta @ self.embedding)) / (1 - s)

    def flow_map_denoiser(self, y: Tensor, s: Tensor | float, t: Tensor | float, steps: int = 256) -> Tensor:
        """δ_{s,t}(y), the mean of D over r = t/(1-t) along the flow, by Runge–Kutta 4; D_s where t = s."""
        s, t = times(s), times(t)
        start = s / (1 - s)
        end = torch.maximum((t / (1 - t)).clamp_max(R_END), start)
        a, h, mean = y / (1 - s), (end - start) / steps, torch.zeros(())
        for i in range(steps):
            r = start + i * h
            k1 = self._posterior(a, r)
            k2 = self._posterior(a + h / 2 * k1 @ self.embedding, r + h / 2)
            k3 = self._posterior(a + h / 2 * k2 @ self.embedding, r + h / 2)
            k4 = self._posterior(a + h * k3 @ self.embedding, r + h)
            k = (k1 + 2 * k2 + 2 * k3 + k4) / 6
            a, mean = a + h * k @ self.embedding, mean + k / steps
        # Beyond `end` D stands still.
        share = (end - start) * (1 - s) * (1 - t) / (t - s)
        delta = share * mean + (1 - share) * self._posterior(a, end)
        return torch.where(t == s, self.denoise(y, s), delta)


LANGUAGE = Language()


class ExactPosterior(Posterior):
    """Probabilities (B, L, V) in float64 behind the interface of a posterior."""

    def __init__(self, probs: Tensor, embedding: Tensor):
        super().__init__(probs.clamp_min(1e-300).log(), lambda hidden: hidden, embedding)

    def embed(self, temperature: float = 1.0) -> Tensor:
        return (self.hidden / temperature).softmax(-1) @ self.embedding


@dataclass
class ExactNoise:
    """zE with z drawn itself, in float64."""

    embedding: Tensor
    width: int = VOCAB

    def __call__(self, xi: Tensor) -> Tensor:
        return xi.double() @ self.embedding


class ExactDenoiser:
    """The toy's D_t and δ_{s,t} where a network would be.

    Args:
        language: whose; of dense states when None.
    """

    def __init__(
        self,
        two_times: bool,
        clock: Clock | None = None,
        rk_steps: int = 256,
        language: Language | None = None,
    ):
        self.config = DenoiserConfig(vocab_size=VOCAB, length=LENGTH, two_times=two_times)
        self.language = language or LANGUAGE
        self.embedding = self.language.embedding
        self.clock = clock or DecodingErrorClock(VOCAB)
        self.rk_steps = rk_steps

    def noise_law(self) -> ExactNoise:
        return ExactNoise(self.embedding)

    def __call__(self, y: Tensor, s: Tensor | float, t: Tensor | float | None = None) -> ExactPosterior:
        law = self.language
        probs = law.denoise(y, s) if t is None else law.flow_map_denoiser(y, s, t, self.rk_steps)
        return ExactPosterior(probs, self.embedding)


def tiny_denoiser(two_times: bool = False, seed: int = 0, head_start: float = 0.0) -> Denoiser:
    """A network that learns the toy in seconds."""
    # The choices with the fewest operations: at this size they, not the arithmetic, cost the time.
    backbone = BackboneConfig(
        width=32,
        depth=2,
        heads=2,
        conditioning=32,
        mlp_ratio=2,
        activation="relu2",
        position="learned",
        position_scale=0.1,
        qk_norm=False,
        time_scale=10,
    )
    config = DenoiserConfig(
        vocab_size=VOCAB, length=LENGTH, two_times=two_times, head_start=head_start, backbone=backbone
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(config)


def train(
    objective: FlowObjective | FlowMapObjective,
    model: Denoiser,
    steps: int,
    *,
    batch: int = 256,
    lr: float = 3e-3,
    averaged: Denoiser | None = None,
    seed: int = 0,
) -> None:
    """Adam with a warm-up and a linear decay to zero; `averaged` follows as an exponential average."""
    gen = torch.Generator().manual_seed(seed)
    pool = 32  # inverting the clock for many steps at once saves half the time
    pooled: dict[str, tuple[Tensor, ...]] = {}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr, betas=(0.9, 0.99), fused=True)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((i + 1) / 50, 1 - i / steps)
        objective.prepare(model, i)
        tokens = LANGUAGE.sample(batch, gen)
        xi = torch.randn(batch, LENGTH, objective.noise_width, generator=gen)
        if i % pool == 0:
            pooled = {name: value.split(batch) for name, value in objective.draw(pool * batch, gen).items()}
        draws = {name: value[i % pool] for name, value in pooled.items()}
        objective.losses(model, tokens, xi, draws).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            with torch.no_grad():
                for mean, new in zip(averaged.parameters(), model.parameters()):
                    mean.lerp_(new, 1 / min(i + 2, 50))


def two_time_from(teacher: Denoiser) -> Denoiser:
    """A two-time denoiser that starts as its teacher and keeps its embedding fixed."""
    model = tiny_denoiser(two_times=True, head_start=1 / 16)
    missing = model.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"end_embedding", "mean"}
    model.set_mean(LANGUAGE.sample(4096, torch.Generator().manual_seed(3)))
    model.embedding.requires_grad_(False)
    model.mean.requires_grad_(False)
    return model


def frozen_copy(model: Denoiser) -> Denoiser:
    return copy.deepcopy(model).requires_grad_(False).eval()


def kl_to_exact(model: Denoiser, num: int = 2048, *, pairs: bool, seed: int = 1) -> float:
    """Mean KL per token from the exact D_t (or δ_{s,t} at random pairs) to the network's, on noised data."""
    gen = torch.Generator().manual_seed(seed)
    clock = DecodingErrorClock(VOCAB)
    tokens = LANGUAGE.sample(num, gen)
    z = torch.randn(num, LENGTH, VOCAB, generator=gen)
    tau = torch.rand(num, 2, generator=gen, dtype=torch.float64).mul(0.999).sort(1).values
    s, t = clock.time(tau).unbind(1)
    x = (1 - times(s)) * z + times(s) * torch.nn.functional.one_hot(tokens, VOCAB)
    exact = LANGUAGE.flow_map_denoiser(x, s, t) if pairs else LANGUAGE.denoise(x, s)
    with torch.no_grad():
        y = x.float() @ model.embedding
        log_probs = (model(y, s.float(), t.float()) if pairs else model(y, s.float())).log_probs()
    return float((torch.xlogy(exact, exact) - exact * log_probs).sum(-1).mean())
