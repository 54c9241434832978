"""Di4C: a mixture of factorised denoisers, distilled from a masked or a uniform diffusion (arXiv 2410.08709).

Any discrete diffusion draws the tokens of a step independently, and in few steps it cannot write what hangs together.
Here the network reads a latent λ, uniform on [0, 1) and one for the whole passage, and its law is the mixture

    p(x_0 | x_t) = E_λ Π_l p^l(x_0^l | x_t, λ)  ≈  1/M Σ_m Π_l p^l(x_0^l | x_t, λ_m)

Sampling draws one λ a passage in each step, so in one step one λ decides all tokens together. Training takes M latents
of each noisy passage. With p̄^l = 1/M Σ_m p^l(· | x_t, λ_m), the marginals, a passage x_0 drawn from any law r is
worth

    C(x_0) = -log 1/M Σ_m Π_l p^l(x_0^l | λ_m) + Σ_l log p̄^l(x_0^l),        E_r[C(x_0)] + Σ_l KL(r^l ‖ p̄^l)

which in the mean is KL(r ‖ mixture) less the multi-information of r: the marginals, the part without correlations, are
compared exactly (a control variate), and only the rest, C, by the passages drawn. It is taken to two laws:

    consistency, t ≥ t_near    r: the teacher's step from t to u, then the student's own whole way from u, as it stands
    data                       r: the passage itself; its marginals are the teacher's p(x_0^l | x_t). C is weighted by
                               `data`·sigmoid(20 (t - ½))

and below t_near, where steps are short and independence is right, every latent learns from the teacher:
1/M Σ_m Σ_l KL(teacher^l ‖ p^l(· | λ_m)).

Losses, their weights, M, the teacher's step and the share of small times are those of the paper's code for language.
Other than there, the M latents of a passage are evenly spaced, from a random offset: they are as uniform, and the
mixture of so few is nearer to that of all. And λ enters as a time does, not as one more token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowlm.denoiser import DenoiserConfig
from flowlm.device import wide, widened
from flowlm.discrete import duo, mdlm
from flowlm.discrete.base import SCHEDULE, Discrete, DiscreteObjective
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from flowlm.families import Ask, Objective, family
from flowlm.posterior import CHUNK_ELEMENTS, Posterior, Target, in_chunks

if TYPE_CHECKING:
    from flowlm.clock import Clock
    from flowlm.config import RunConfig

#: Noisy tokens (B, L) and times (B,) to what the network says of clean ones.
Teacher = Callable[[Tensor, Tensor], Posterior]
#: The same, of latents (B,) too.
Student = Callable[[Tensor, Tensor, Tensor], Posterior]

#: Added to a logit it leaves no other token a chance; finite, as infinities less each other are no number.
CERTAIN = 1e4


@dataclass(frozen=True)
class Di4CConfig:
    """A mixture of denoisers, distilled (objectives "di4c" and "duo-di4c")."""

    latents: int = 16
    """M, latents that the mixture of one noisy passage is taken over in training."""
    steps: int = 1024
    """Steps from noise to data that the teacher's is one of; it goes at most half the way that is left."""
    near: float = 0.02
    """Times below it are learnt from the teacher alone."""
    near_share: float = 0.3
    """Share of the training times that lie below it."""
    data: float = 0.1
    """Weight of the correlations of the data."""

    def __post_init__(self) -> None:
        if self.latents < 2:
            raise ValueError(
                f"di4c.latents = {self.latents}: a mixture of fewer than two is a product, which has no correlations "
                "to learn; the published models take 16"
            )
        if self.steps < 2:
            raise ValueError(
                f"di4c.steps = {self.steps} is too few: the teacher would take the whole way in one step, and nothing "
                "would be left to compose it with; the published models take 1024"
            )
        for name in ("near", "near_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"di4c.{name} must lie in (0, 1), got {getattr(self, name)}")
        if not 0 <= self.data <= 1:
            raise ValueError(
                f"di4c.data must lie in [0, 1], got {self.data}: above 1 the loss is no longer least at the law"
            )


class Process(Protocol):
    """What Di4C asks of a diffusion: masked or uniform."""

    def corrupt(self, tokens: Tensor, t: Tensor, uniform: Tensor) -> Tensor:
        """x_t (B, L) at times (B,), by draws (2, B, L)."""

    def gain(self, x: Tensor, t: Tensor) -> Tensor:
        """log q(x_t | x_0 = x_t)/q(x_t | x_0 = another), (B, L): what a noisy token says of its own clean one."""

    def back(self, x: Tensor, clean: Tensor, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """x_s (B, L) given x_t = x and x_0 = clean, for 0 < s < t, by draws (B, L)."""


@dataclass(frozen=True)
class Masked:
    """MDLM's process.

    Args:
        mask: its number, V.
    """

    mask: int
    schedule: LogLinear = SCHEDULE

    def corrupt(self, tokens: Tensor, t: Tensor, uniform: Tensor) -> Tensor:
        return mdlm.corrupt(tokens, t, uniform[0], self.mask, self.schedule)

    def gain(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x == self.mask, 0.0, CERTAIN)

    def back(self, x: Tensor, clean: Tensor, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        opens = uniform < self.schedule.opening(t, s)[:, None]
        return torch.where((x == self.mask) & opens, clean, x)


@dataclass(frozen=True)
class Uniform:
    """Duo's process.

    Args:
        vocab_size: V.
    """

    vocab_size: int
    schedule: LogLinear = SCHEDULE

    def corrupt(self, tokens: Tensor, t: Tensor, uniform: Tensor) -> Tensor:
        return duo.corrupt(tokens, t, uniform, self.vocab_size, self.schedule)

    def gain(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, rest = self.schedule.alpha(t), self.schedule.noise(t)
        return (self.vocab_size * alpha / rest).log1p()[:, None].expand(x.shape)

    def back(self, x: Tensor, clean: Tensor, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """q(j) ∝ (α_ts 1[j=x] + (1-α_ts)/V) (α_s 1[j=clean] + (1-α_s)/V), multiplied out: x, clean, or any token."""
        v = self.vocab_size
        alpha_s, rest_s = self.schedule.alpha(s)[:, None], self.schedule.noise(s)[:, None]
        ratio = self.schedule.alpha(t)[:, None] / alpha_s
        stay = ratio * (torch.where(x == clean, v * alpha_s, 0.0) + rest_s)
        jump = (1 - ratio) * alpha_s
        anew = (1 - ratio) * rest_s
        at = uniform * (stay + jump + anew)
        # Within its share the draw is uniform again: it says which token.
        other = ((at - stay - jump) / anew * v).long().clamp(0, v - 1)
        return torch.where(at < stay, x, torch.where(at < stay + jump, clean, other))


def informed(posterior: Posterior, x: Tensor, gain: Tensor) -> Posterior:
    """The posterior of clean tokens when the network's, of the other positions' tokens, meets that of its own.

    Args:
        posterior: (B, L).
        x: noisy tokens (B, L); gain: (B, L), log-odds for x itself.
    """
    hidden, vocab_size = posterior.hidden, len(posterior.embedding)
    kind = torch.promote_types(hidden.dtype, torch.float32)  # bfloat16 cannot tell large ids apart
    # A head sees hidden states alone: the token and its gain travel with them. A mask's gain is 0 wherever it goes.
    own = torch.stack([x.clamp_max(vocab_size - 1).to(kind), gain.to(kind)], -1)

    def head(states: Tensor) -> Tensor:
        logits = posterior.head(states[..., :-2].to(hidden.dtype))
        return logits.scatter_add(-1, states[..., -2:-1].long(), states[..., -1:].to(logits.dtype))

    return Posterior(torch.cat([hidden.to(kind), own], -1), head, posterior.embedding)


def by_position(posterior: Posterior, latents: int) -> Posterior:
    """A posterior (B·M, L), the M latents of a passage after each other, as one of (B·L, M)."""
    hidden = posterior.hidden.unflatten(0, (-1, latents)).transpose(1, 2).flatten(0, 1)
    return Posterior(hidden, posterior.head, posterior.embedding)


class Averaged:
    """The mean over latents of posteriors, as a target.

    Args:
        posterior: (B·M, L); latents: M.
    """

    def __init__(self, posterior: Posterior, latents: int):
        self.posterior = by_position(posterior, latents)

    def probs_at(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return self.posterior[rows].log_probs().exp().mean(1)


def compare(
    mixture: Posterior, latents: int, tokens: Tensor, targets: Sequence[Target]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the mixture says of passages together, and of targets position by position; nothing of size B×M×L×V is kept.

    Args:
        mixture: (B·M, L); latents: M.
        tokens: (B, K, L), K passages for each.
        targets: distributions over (B, L).

    Returns:
        C (B, K) of the passages; KL(target^l ‖ p̄^l) of each target (targets, B, L);
        1/M Σ_m KL(target^l ‖ p^l(· | λ_m)) of the first one (B, L).
    """
    positions = by_position(mixture, latents)
    batch, count, length = tokens.shape
    ids = tokens.transpose(1, 2).flatten(0, 1)[:, None].expand(-1, latents, -1)

    def part(rows: slice) -> Tensor:
        log_p = positions[rows].log_probs()  # (n, M, V)
        log_mean = log_p.logsumexp(1) - math.log(latents)
        probs = [target.probs_at(rows) for target in targets]
        sums = [(torch.xlogy(p, p) - p * log_mean).sum(-1) for p in probs]
        sums.append((torch.xlogy(probs[0], probs[0]) - probs[0] * log_p.mean(1)).sum(-1))
        return torch.cat([log_p.gather(-1, ids[rows]).flatten(1), torch.stack(sums, -1).to(log_p.dtype)], -1)

    size = max(1, CHUNK_ELEMENTS // (latents * len(mixture.embedding)))
    out = torch.cat(in_chunks(part, ((slice(i, i + size),) for i in range(0, batch * length, size))))
    out = out.view(batch, length, -1)
    # The sum over a passage may be of thousands of nats, of which the differences between latents count.
    own = out[..., : latents * count].unflatten(-1, (latents, count)).to(wide(out.device))
    together = own.sum(1).logsumexp(1) - math.log(latents)
    apart = (own.logsumexp(2) - math.log(latents)).sum(1)
    sums = out[..., latents * count :].movedim(-1, 0)
    return apart - together, sums[:-1], sums[-1]


def compose(
    target: Student,
    known: Posterior,
    process: Process,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    latents: Tensor,
    uniform: Tensor,
) -> tuple[Posterior, Tensor]:
    """The teacher's step from t to s, then the target's whole way from s, M times each.

    Args:
        known: the teacher's p(x_0^l | x_t = x), (B, L).
        x: (B, L); t, s: times (B,).
        latents: of the target (B, M).
        uniform: draws (3, B, M, L), float64: the teacher's tokens, which of them are in the step, and the target's.

    Returns:
        The target's posterior (B·M, L), and passages (B, M, L) drawn from it.
    """
    batch, m = latents.shape
    steps, opens, drawn = uniform.flatten(1, 2)
    many, now, then = (part.repeat_interleave(m, 0) for part in (x, t, s))
    each = Posterior(known.hidden.repeat_interleave(m, 0), known.head, known.embedding)
    z = process.back(many, each.tokens("categorical", steps), now, then, opens)
    composed = informed(target(z, then, latents.flatten()), z, process.gain(z, then))
    return composed, composed.tokens("categorical", drawn).unflatten(0, (batch, m))


def planes(config: Di4CConfig) -> int:
    """Uniform draws that `losses` takes for each position."""
    return 4 + 3 * config.latents


def losses(
    student: Student,
    target: Student,
    teacher: Teacher,
    process: Process,
    config: Di4CConfig,
    tokens: Tensor,
    t: Tensor,
    uniform: Tensor,
) -> Tensor:
    """The loss of each position (B, L); what belongs to a passage as a whole is spread evenly over it.

    It may be negative: the correlations that the student has learnt count below zero.

    Args:
        target: the student as it stands, which goes on from the teacher's step; no gradient passes to it.
        t: times (B,), float64.
        uniform: draws (`planes`, B, L), float64.
    """
    m = config.latents
    spaced = torch.arange(m, device=t.device) / m
    mine, others = (spaced + uniform[i, :, :1] / m for i in (2, 3))
    s = t - (t / 2).clamp_max(1 / config.steps)
    x = process.corrupt(tokens, t, uniform[:2])
    with torch.no_grad():
        known = informed(teacher(x, t), x, process.gain(x, t))
        draws = uniform[4:].unflatten(0, (3, m)).transpose(1, 2)
        composed, passages = compose(target, known, process, x, t, s, others, draws)
    many, now = (part.repeat_interleave(m, 0) for part in (x, t))
    mixture = informed(student(many, now, mine.flatten()), many, process.gain(many, now))

    shown = torch.cat([tokens[:, None], passages], 1)
    correlations, marginals, apart = compare(mixture, m, shown, [known, Averaged(composed, m)])
    near = t < config.near
    weight = config.data * torch.sigmoid(20 * (t - 0.5))
    together = weight * correlations[:, 0] + torch.where(near, 0.0, correlations[:, 1:].mean(1))
    local = marginals[0] + torch.where(near[:, None], apart, marginals[1])
    return local + (together / tokens.shape[1])[:, None].to(local.dtype)


class Di4CObjective(DiscreteObjective):
    """Losses of a student, at more small times than others."""

    def __init__(self, config: Di4CConfig, teacher: TokenNetwork, process: Process):
        super().__init__(self._of, planes(config), timed=True)
        self.config, self.teacher, self.process = config, teacher, process

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        t, share, near = super().draw(num, generator)["t"], self.config.near_share, self.config.near
        small = SCHEDULE.first + (near - SCHEDULE.first) * t / share
        return {"t": torch.where(t < share, small, near + (1 - near) * (t - share) / (1 - share))}

    def _of(self, net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
        def settled(x: Tensor, t: Tensor, latent: Tensor) -> Posterior:
            training = net.training
            net.eval()  # a target without dropout
            posterior = net(x, t, latent=latent)
            net.train(training)
            return posterior

        return losses(
            lambda x, t, latent: net(x, t, latent=latent),
            settled,
            self.teacher,
            self.process,
            self.config,
            tokens,
            widened(draws["t"]),
            noise,
        )


class Mixed(Discrete):
    """What a mixture changes of the family of its teacher."""

    taught, held_out_ranks, likelihood = True, False, ""
    teachers: ClassVar[str]
    """The network of those it can learn from."""

    def process(self, config: DenoiserConfig) -> Process:
        """Of passages of this model."""
        raise NotImplementedError

    def network(self, config: DenoiserConfig) -> TokenNetwork:
        return TokenNetwork(config, causal=self.causal, timed=self.timed, extra=self.extra, latent=True)

    def check_source(self, run: RunConfig, source: DenoiserConfig, name: str) -> None:
        if family(source.family).network_name != self.teachers:
            raise ValueError(
                f"{name} is of the family {source.family!r}, and {self.name!r} needs a teacher with the network of "
                f"{self.teachers!r}, without latents: its steps are the product of their positions"
            )

    def missing(self, source: DenoiserConfig) -> tuple[str, ...]:
        return () if source.family == self.name else ("latent_embedding.",)

    def reader(self, network: TokenNetwork, ask: Ask) -> mdlm.Network:
        """A new λ for each passage at each call."""
        latents = self._uniforms(ask, f"{self.name} latent", (1, 1), network.embedding.device)
        call = itertools.count()
        return lambda x, t: network(x, t, latent=latents(next(call))[0, :, 0])

    def objective(
        self, run: RunConfig, network: Any, clock: Clock | None, teacher: Any, averaged: Any
    ) -> Objective:
        return Di4CObjective(run.di4c, self.needed(teacher), self.process(network.config))


class Di4C(Mixed, mdlm.MDLM):
    """The family of masked mixtures."""

    name = network_name = "di4c"
    label, about = "Di4C", "masked diffusion, distilled into a mixture"
    teachers = "mdlm"
    repeatable = False

    def process(self, config: DenoiserConfig) -> Process:
        return Masked(config.vocab_size)


class DuoDi4C(Mixed, duo.Duo):
    """The family of uniform mixtures."""

    name = network_name = "duo-di4c"
    label, about = "Duo-Di4C", "diffusion with uniform states, distilled into a mixture"
    teachers = "duo"

    def process(self, config: DenoiserConfig) -> Process:
        return Uniform(config.vocab_size)
