"""Each discrete family on the exact language of 27 passages: its minimum, its bound, its samplers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowlm.categorical import categorical
from flowlm.clock import DecodingErrorClock
from flowlm.denoiser import DenoiserConfig
from flowlm.discrete import ar, consistency, duo, gaussian, mdlm, sdtt, sedd
from flowlm.discrete.distil import divergence
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from flowlm.posterior import Posterior
from test_backbone import PLAIN, unzero
from toy import LANGUAGE, LENGTH, VOCAB, ExactPosterior

MASK = VOCAB
EXACT = LogLinear(eps=0.0, first=0.0)
ENTROPY = float(-(LANGUAGE.probs * LANGUAGE.probs.log()).sum())
EYE = torch.eye(VOCAB, dtype=torch.float64)


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked_posterior(x: Tensor, t: Tensor | None = None) -> Tensor:
    """p(w_l = k | x) by enumeration, x with masks (B, L)."""
    fits = ((x[:, None] == LANGUAGE.passages) | (x[:, None] == MASK)).all(-1)
    weights = fits * LANGUAGE.probs
    return torch.einsum(
        "bp,plk->blk", weights / weights.sum(-1, keepdim=True).clamp_min(1e-300), LANGUAGE.onehot
    )


def uniform_posterior(x: Tensor, t: Tensor, schedule: LogLinear = EXACT) -> Tensor:
    """p(w_l = k | the other positions of x_t = x) by enumeration, tokens drawn anew with probability 1-α_t."""
    alpha = schedule.alpha(t.double())[:, None, None]
    chance = alpha * (x[:, None] == LANGUAGE.passages) + (1 - alpha) / VOCAB
    out = []
    for at in range(LENGTH):
        others = [m for m in range(LENGTH) if m != at]
        weights = chance[..., others].prod(-1) * LANGUAGE.probs
        out.append(weights / weights.sum(-1, keepdim=True) @ LANGUAGE.onehot[:, at])
    return torch.stack(out, 1)


def posterior_weights(p: Tensor, x: Tensor, s: float, t: float, schedule: LogLinear) -> Tensor:
    """q_j (B, L, V) of Duo's x_s given x_t = x and the predicted tokens p (B, L, V), token by token, not normalised."""
    alpha_s, alpha_t = (float(schedule.alpha(torch.tensor(v, dtype=torch.float64))) for v in (s, t))
    alpha_s = alpha_s if s > 0 else 1.0  # the data itself
    ratio = alpha_t / alpha_s
    own = torch.nn.functional.one_hot(x, VOCAB)
    among = alpha_t * VOCAB * p + ratio - alpha_t
    return own * among + (alpha_s - alpha_t) * p + (1 - ratio) * (1 - alpha_s) / VOCAB


def network(posterior: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Posterior]:
    return lambda x, t: ExactPosterior(posterior(x, t), EYE)


def frequencies(tokens: Tensor) -> Tensor:
    index = (tokens * VOCAB ** torch.arange(LENGTH).flip(0)).sum(1)
    return torch.bincount(index, minlength=len(LANGUAGE.probs)).double()


def chi_squared(tokens: Tensor, law: Tensor) -> float:
    """Deviations from the law in standard deviations of chi-squared."""
    counts = frequencies(tokens)
    want = law * len(tokens)
    degrees = len(law) - 1
    return float(((counts - want) ** 2 / want).sum() - degrees) / math.sqrt(2 * degrees)


FACTORISED = torch.stack(
    [
        math.prod([(LANGUAGE.probs[:, None] * LANGUAGE.onehot[:, at]).sum(0)[w[at]] for at in range(LENGTH)])
        for w in LANGUAGE.passages
    ]
)


# -- categorical draws -------------------------------------------------------------------------------------------


def test_categorical_draws_are_exact_to_float64() -> None:
    weights = torch.tensor([1e-12, 0.5, 0.0, 0.25], dtype=torch.float64)
    edges = torch.tensor([0.0, 1e-13, 2e-12, 0.6, 0.7, 1 - 1e-16], dtype=torch.float64)
    assert categorical(weights.expand(6, -1), edges).tolist() == [0, 0, 1, 1, 3, 3]
    drawn = categorical(weights.expand(100_000, -1), uniforms(100_000))
    assert abs((drawn == 1).double().mean() - 2 / 3) < 0.005


# -- MDLM, SEDD ----------------------------------------------------------------------------------------------------


def mean_over_times(loss: Callable[[float], float], points: int) -> float:
    """∫ loss(t) dt on (0, 1), by Gauss and Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return float(sum(w / 2 * loss((x + 1) / 2) for x, w in zip(nodes, weights)))


def every_mask(t: float) -> tuple[Tensor, Tensor, Tensor]:
    """All passages with all sets of masks: tokens, the draws that mask them, and their probabilities at t."""
    tokens = LANGUAGE.passages.repeat(8, 1)
    masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH))).repeat_interleave(27, 0)
    alpha = float(EXACT.alpha(torch.tensor(t, dtype=torch.float64)))
    chance = torch.where(masks, 1 - alpha, alpha).prod(-1) * LANGUAGE.probs.repeat(8)
    return tokens, torch.where(masks, 0.0, 1.0).double(), chance


@pytest.mark.parametrize("family", [mdlm, sedd], ids=["MDLM", "SEDD"])
def test_the_masked_bound_is_tight_at_the_exact_posterior(family: Any) -> None:
    """Over all masks and times the chain rule is averaged over orders: the bound is the entropy of the law."""
    exact = network(lambda x, t: masked_posterior(x))
    if family is sedd:
        exact = scores(exact)

    def loss(t: float) -> float:
        tokens, uniform, chance = every_mask(t)
        times = torch.full((len(tokens),), t, dtype=torch.float64)
        per_token = family.losses(exact, tokens, times, uniform, MASK, EXACT).double()
        return float((chance[:, None] * per_token).sum())

    assert mean_over_times(loss, 12) == pytest.approx(ENTROPY, abs=1e-5)


def scores(posterior: Callable[[Tensor, Tensor], Posterior]) -> Callable[[Tensor, Tensor], Posterior]:
    """SEDD's network of which s_k = r p_k: net = log(V p), as log s = net - log(e^σ-1) - log V."""

    def net(x: Tensor, t: Tensor) -> Posterior:
        exact = posterior(x, t)
        return Posterior(exact.hidden + math.log(VOCAB), lambda hidden: hidden, EYE)

    return net


def assert_least(loss: Callable[[Tensor], Tensor], start: Tensor, flat: float = 1e-5) -> None:
    """A loss of a network's outputs has no gradient at `start`, none above `flat`, and is higher beside it."""
    net = start.clone().requires_grad_()
    value = loss(net)
    (gradient,) = torch.autograd.grad(value, net)
    assert gradient.abs().max() < flat
    for seed in range(3):
        noise = torch.randn(net.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss(start + 0.3 * noise) > value + 1e-3


@pytest.mark.parametrize("family", [mdlm, sedd], ids=["MDLM", "SEDD"])
def test_the_masked_loss_is_least_at_the_exact_posterior(family: Any) -> None:
    """The gradient of the mean loss in the network's outputs vanishes there, and the loss is higher beside it."""
    tokens, uniform, weight = every_mask(0.4)
    t = torch.full((len(tokens),), 0.4, dtype=torch.float64)
    x = mdlm.corrupt(tokens, t, uniform, MASK, EXACT)
    states, index = torch.unique(x, dim=0, return_inverse=True)
    start = masked_posterior(states).clamp_min(1e-12).log()
    if family is sedd:
        start = start + math.log(VOCAB)

    def loss(logits: Tensor) -> Tensor:
        def lookup(x: Tensor, t: Tensor) -> Posterior:
            return Posterior(logits[index], lambda hidden: hidden, EYE)

        per_token = family.losses(lookup, tokens, t, uniform, MASK, EXACT)
        return (weight[:, None] * per_token).sum()

    assert_least(loss, start)


@pytest.mark.parametrize(("steps", "n"), [(1, 60_000), (1_000, 20_000)])
@pytest.mark.parametrize("name", ["MDLM", "SEDD"])
def test_masked_samplers(name: str, steps: int, n: int) -> None:
    """One step writes the product of the marginals, exactly; many steps the law, but for positions opened together."""
    schedule = LogLinear()
    exact = network(lambda x, t: masked_posterior(x))
    if name == "MDLM":
        tokens, calls = mdlm.sample(
            exact, (n, LENGTH), steps, lambda i: uniforms(2, n, LENGTH, seed=i), MASK, schedule
        )
        assert calls <= steps
    else:
        tokens = sedd.sample(
            scores(exact), (n, LENGTH), steps, lambda i: uniforms(n, LENGTH, seed=i), MASK, schedule
        )
    assert int(tokens.max()) < VOCAB
    if steps == 1:
        assert abs(chi_squared(tokens, FACTORISED)) < 4
        assert chi_squared(tokens, LANGUAGE.probs) > 50
    else:
        assert abs(chi_squared(tokens, LANGUAGE.probs)) < 4


def test_temperature_of_the_masked_samplers() -> None:
    """In one step it writes the product of the marginals to the power 1/T; and as T goes to 0, their modes."""
    n, schedule = 60_000, LogLinear()
    exact = network(lambda x, t: masked_posterior(x))
    marginals = masked_posterior(torch.full((1, LENGTH), MASK))[0]
    sharper = (marginals.log() / 0.5).softmax(-1)
    want = torch.stack([sharper[torch.arange(LENGTH), p].prod() for p in LANGUAGE.passages])
    for sampled in (
        mdlm.sample(exact, (n, LENGTH), 1, lambda i: uniforms(2, n, LENGTH), MASK, schedule, temperature=0.5)[
            0
        ],
        sedd.sample(
            scores(exact), (n, LENGTH), 1, lambda i: uniforms(n, LENGTH), MASK, schedule, temperature=0.5
        ),
    ):
        assert abs(chi_squared(sampled, want)) < 4
    modes = marginals.argmax(-1).expand(5, -1)
    few = lambda i: uniforms(5, LENGTH)  # noqa: E731
    assert torch.equal(sedd.sample(scores(exact), (5, LENGTH), 1, few, MASK, schedule, last="argmax"), modes)
    cold = sedd.sample(scores(exact), (5, LENGTH), 1, few, MASK, schedule, temperature=1e-3)
    assert torch.equal(cold, modes)


def test_a_step_that_opened_nothing_is_not_asked_again() -> None:
    asked = []

    def net(x: Tensor, t: Tensor) -> Posterior:
        asked.append(x.clone())
        return ExactPosterior(masked_posterior(x), EYE)

    tokens, calls = mdlm.sample(
        net, (2, LENGTH), 200, lambda i: uniforms(2, 2, LENGTH, seed=i), MASK, LogLinear()
    )
    assert calls == len(asked) <= 2 * LENGTH
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(asked))
    assert int(tokens.max()) < VOCAB


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_scores_say_how_many_masks_are_opened(factor: float) -> None:
    """With scores that are a multiple of the exact ones, as many times the masks open, at most all; the tokens are as
    ever. Draws that cover [0, 1) evenly give the shares to the last digit."""
    n, s, t, schedule = 20_000, 0.4, 0.7, LogLinear()
    even = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(n, LENGTH)
    x = torch.full((n, LENGTH), MASK)
    p = masked_posterior(x)
    net = Posterior((p * VOCAB * factor).clamp_min(1e-300).log(), lambda hidden: hidden, EYE)
    drawn = sedd.step(x, net, s, t, even, MASK, schedule)
    share = torch.nn.functional.one_hot(drawn, VOCAB + 1).double().mean(0)
    chance = min(1.0, factor * (t - s) / t)
    torch.testing.assert_close(share[:, :VOCAB], chance * p[0], atol=3 / n, rtol=0)
    assert int(sedd.step(x, net, 0.0, t, even, MASK, schedule).max()) < VOCAB


@pytest.mark.parametrize("last", ["categorical", "argmax"])
def test_logits_are_made_where_a_mask_opens_and_nowhere_else(last: str) -> None:
    """MDLM's sampler makes them once for each token it writes, in however many steps; SEDD's also where masks stay."""
    n, made = 40, [0]

    def head(hidden: Tensor) -> Tensor:
        made[0] += len(hidden)
        return hidden

    def net(x: Tensor, t: Tensor) -> Posterior:
        return Posterior(masked_posterior(x).clamp_min(1e-300).log(), head, EYE)

    mdlm.sample(net, (n, LENGTH), 5, lambda i: uniforms(2, n, LENGTH, seed=i), MASK, LogLinear(), last=last)
    assert made[0] == n * LENGTH
    made[0] = 0
    masks = []
    sedd.sample(
        net,
        (n, LENGTH),
        5,
        lambda i: uniforms(n, LENGTH, seed=i),
        MASK,
        LogLinear(),
        last=last,
        callback=lambda step: masks.append(int((step.y == MASK).sum())),
    )
    assert made[0] == sum(masks) + n * LENGTH


# -- Duo -----------------------------------------------------------------------------------------------------------


def test_the_uniform_bound_is_tight_at_the_exact_posterior() -> None:
    tokens, x = LANGUAGE.passages.repeat_interleave(27, 0), LANGUAGE.passages.repeat(27, 1)

    def loss(u: float) -> float:
        # t = u²: the integrand goes like log t at 0.
        t = torch.full((len(x),), u * u, dtype=torch.float64)
        alpha = float(EXACT.alpha(t[0]))
        chance = (alpha * (x == tokens) + (1 - alpha) / VOCAB).prod(-1) * LANGUAGE.probs.repeat_interleave(27)
        per_token = duo.bound(ExactPosterior(uniform_posterior(x, t), EYE), x, tokens, t, VOCAB, EXACT)
        return float((chance[:, None] * per_token).sum()) * 2 * u

    assert mean_over_times(loss, 100) == pytest.approx(ENTROPY, abs=2e-4)


def test_the_uniform_loss_is_least_at_the_exact_posterior() -> None:
    passages = LANGUAGE.passages
    tokens = passages.repeat_interleave(27, 0)
    x = passages.repeat(27, 1)
    t = torch.full((len(x),), 0.4, dtype=torch.float64)
    alpha = float(EXACT.alpha(t[0]))
    weight = LANGUAGE.probs.repeat_interleave(27) * (alpha * (x == tokens) + (1 - alpha) / VOCAB).prod(-1)
    start = uniform_posterior(passages, t[:27]).log()

    def loss(logits: Tensor) -> Tensor:
        posterior = Posterior(logits.repeat(27, 1, 1), lambda hidden: hidden, EYE)
        return (weight[:, None] * duo.bound(posterior, x, tokens, t, VOCAB, EXACT)).sum()

    assert_least(loss, start, flat=1e-6)


def test_the_uniform_posterior_is_bayes() -> None:
    """q(x_s | x_t, x_0), at a one-hot p, is p(x_t | x_s) p(x_s | x_0) normalised."""
    s, t, schedule = 0.3, 0.7, LogLinear()
    a_s, a_t = (float(schedule.alpha(torch.tensor(v, dtype=torch.float64))) for v in (s, t))
    for clean, noisy in itertools.product(range(VOCAB), repeat=2):
        p = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        p[..., clean] = 1
        q = posterior_weights(p, torch.tensor([[noisy]]), s, t, schedule)[0, 0]
        middle = a_s * p[0, 0] + (1 - a_s) / VOCAB
        ratio = a_t / a_s
        last = torch.full((VOCAB,), (1 - ratio) / VOCAB, dtype=torch.float64)
        last[noisy] += ratio
        want = middle * last
        torch.testing.assert_close(q / q.sum(), want / want.sum())


@pytest.mark.parametrize(("s", "t"), [(0.3, 0.7), (0.0, 0.4), (0.9, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_uniform_step_draws_from_its_posterior(s: float, t: float, temperature: float) -> None:
    """Draws that cover [0, 1) evenly give each token as often as q says, and the greedy rule the likeliest."""
    n, schedule = 20_000, LogLinear()
    even = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(n, LENGTH)
    for start in LANGUAGE.passages[::5]:
        x = start.expand(n, LENGTH)
        p = uniform_posterior(x, torch.full((n,), t, dtype=torch.float64), schedule)
        net = ExactPosterior(p, EYE)
        tempered = (p.log() / temperature).softmax(-1)[:1]
        q = posterior_weights(tempered, x[:1], s, t, schedule)[0]
        drawn = duo.step(x, net, s, t, even, schedule, temperature=temperature)
        share = torch.nn.functional.one_hot(drawn, VOCAB).double().mean(0)
        torch.testing.assert_close(share, q / q.sum(-1, keepdim=True), atol=3 / n, rtol=0)
        greedy = duo.step(x[:1], net[:1], s, t, even[:1], schedule, temperature=temperature, rule="argmax")
        assert torch.equal(greedy[0], q.argmax(-1))


@pytest.mark.parametrize(("steps", "n"), [(1, 60_000), (1_000, 20_000)])
def test_uniform_sampler(steps: int, n: int) -> None:
    schedule = LogLinear()
    exact = network(lambda x, t: uniform_posterior(x, t, schedule))
    tokens = duo.sample(
        exact,
        (n, LENGTH),
        steps,
        uniforms(n, LENGTH, seed=99),
        lambda i: uniforms(n, LENGTH, seed=i),
        VOCAB,
        schedule,
    )
    if steps > 1:
        assert abs(chi_squared(tokens, LANGUAGE.probs)) < 4
        return
    # From t = 1 all that is known is a thousandth of the first tokens.
    law = one_step_law(schedule)
    assert abs(chi_squared(tokens, law)) < 4


def one_step_law(schedule: LogLinear) -> Tensor:
    """Of one ancestral step from uniform tokens: each position drawn by the exact posterior of the first ones."""
    starts = LANGUAGE.passages
    p = uniform_posterior(starts, torch.ones(27, dtype=torch.float64), schedule)
    weights = posterior_weights(p, starts, 0.0, 1.0, schedule)
    q = weights / weights.sum(-1, keepdim=True)
    return torch.stack([q[:, torch.arange(LENGTH), w].prod(-1).mean() for w in LANGUAGE.passages])


def test_greedy_tail() -> None:
    """The last step takes the likeliest token of what it would draw from."""
    n, schedule = 50, LogLinear()
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Posterior:
        seen.append(x)
        return ExactPosterior(uniform_posterior(x, t, schedule), EYE)

    common = (uniforms(n, LENGTH, seed=1), lambda i: uniforms(n, LENGTH, seed=i), VOCAB, schedule)
    greedy = duo.sample(net, (n, LENGTH), 3, *common, last="argmax")
    p = uniform_posterior(seen[-1], torch.full((n,), 1 / 3, dtype=torch.float64), schedule)
    assert torch.equal(greedy, posterior_weights(p, seen[-1], 0.0, 1 / 3, schedule).argmax(-1))
    drawn = duo.sample(net, (n, LENGTH), 3, *common)
    assert torch.equal(seen[2], seen[5])
    assert not torch.equal(drawn, greedy)


# -- AR ------------------------------------------------------------------------------------------------------------


def test_narrowed_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    p = logits.double().exp()
    torch.testing.assert_close(ar.narrowed(logits), p)
    torch.testing.assert_close(ar.narrowed(logits, temperature=0.5), (2 * logits.double()).softmax(-1))
    assert (ar.narrowed(logits, top_k=2) > 0).tolist() == [[True, True, False, False]]
    assert (ar.narrowed(logits, top_p=0.5) > 0).tolist() == [[True, False, False, False]]  # p = .64
    assert (ar.narrowed(logits, top_p=0.7) > 0).tolist() == [[True, True, False, False]]
    assert (ar.narrowed(logits, top_p=1e-9) > 0).sum() == 1


# -- students --------------------------------------------------------------------------------------------------------


def test_divergence() -> None:
    p, q = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(i)).softmax(-1) for i in (0, 1))
    student = Posterior(p.log().requires_grad_(), lambda hidden: hidden, torch.eye(5))
    target = Posterior(q.log(), lambda hidden: hidden, torch.eye(5))
    torch.testing.assert_close(divergence(student, target), (p * (p / q).log()).sum(-1))
    assert divergence(target, target).abs().max() < 1e-6


def test_two_steps_in_one() -> None:
    """SDTT's target, token by token: the call that opened it, or the last one."""
    n, dt = 40, 0.25
    tokens = LANGUAGE.sample(n, torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, n, dtype=torch.float64)
    uniform = uniforms(3, n, LENGTH)
    exact = network(lambda x, t: masked_posterior(x).clamp_min(1e-12))
    student = torch.randn(n, LENGTH, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = sdtt.losses(
        lambda x, t: Posterior(student, lambda h: h, EYE), exact, tokens, t, uniform, dt, MASK, EXACT
    )
    kinds = set()
    for i in range(n):
        x = torch.where(uniform[0, i] < t[i], MASK, tokens[i])
        p1 = masked_posterior(x[None])[0]
        s = max(float(t[i]) - dt, 0.0)
        after = x.clone()
        for at in range(LENGTH):
            if x[at] == MASK and uniform[1, i, at] < (t[i] - s) / t[i]:
                after[at] = int((p1[at].cumsum(0) <= uniform[2, i, at]).sum())
        p2 = masked_posterior(after[None])[0]
        for at in range(LENGTH):
            if x[at] != MASK:
                assert found[i, at] == 0
                kinds.add("carried over")
                continue
            target = p1[at] if after[at] != MASK else p2[at]
            kinds.add("opened" if after[at] != MASK else "still masked")
            p = student[i, at].softmax(-1)
            want = (p * (p / target.clamp_min(1e-9)).log()).sum()
            torch.testing.assert_close(found[i, at].double(), want, atol=1e-4, rtol=1e-4)
    assert kinds == {"carried over", "opened", "still masked"}


STATES = torch.tensor(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)))
"""Every passage with every set of masks, in the order of their digits."""


def number_of(x: Tensor) -> Tensor:
    """The places of states x (B, L) among them."""
    return (x * (VOCAB + 1) ** torch.arange(LENGTH).flip(0)).sum(-1)


OUTCOMES = STATES
"""What a teacher's step may do to a passage: at each position open it to a token, or leave the mask (digit MASK)."""
POSTERIORS = masked_posterior(STATES)


def two_steps(t: float, dt: float) -> tuple[Tensor, Tensor]:
    """Of every state x of masks alone or some, and every outcome of the exact teacher's first step from it: its chance
    (S, O), 0 where it is none of x, and the targets (S, O, L, V)."""
    s = max(t - dt, 0.0)
    opening = float(EXACT.opening(t, s))
    masked = (STATES == MASK)[:, None]
    opened = (OUTCOMES != MASK)[None]
    drawn = torch.nn.functional.one_hot(OUTCOMES.clamp_max(VOCAB - 1), VOCAB).double()
    each = torch.einsum("slk,olk->sol", POSTERIORS, drawn)
    chance = torch.where(masked, torch.where(opened, opening * each, 1 - opening), (~opened).double()).prod(
        -1
    )
    after = torch.where(masked & opened, OUTCOMES, STATES[:, None])
    later = POSTERIORS[number_of(after)]
    return chance, torch.where((masked & opened)[..., None], POSTERIORS[:, None], later)


def sdtt_minimum(t: float, dt: float) -> Tensor:
    """What SDTT's student tends to, of every state (S, L, V): KL(p ‖ T) over random targets T is least at p ∝
    exp E log T, their normalised geometric mean."""
    chance, targets = two_steps(t, dt)
    return torch.einsum("so,solk->slk", chance, targets.clamp_min(1e-9).log()).softmax(-1)


@pytest.mark.parametrize(("t", "dt"), [(1.0, 0.5), (0.8, 0.3), (0.6, 1e-3)])
def test_sdtt_is_least_at_the_geometric_mean_of_two_steps(t: float, dt: float) -> None:
    """By its own loss, over all that the exact teacher may do: no gradient there, and more beside it. For short steps
    that is the exact posterior, for long ones another."""
    chance, _ = two_steps(t, dt)
    state, outcome = (chance > 0).nonzero().unbind(1)
    x, o = STATES[state], OUTCOMES[outcome]
    masked = x == MASK
    cumulative = POSTERIORS[state].cumsum(-1)
    token = o.clamp_max(VOCAB - 1)[..., None]
    middle = (cumulative - POSTERIORS[state] / 2).gather(-1, token)[..., 0]
    uniform = torch.stack([torch.where(masked, 0.0, 1.0).double(), (o == MASK).double(), middle])
    weight = chance[state, outcome]
    times = torch.full((len(x),), t, dtype=torch.float64)
    teacher = network(lambda x, t: masked_posterior(x).clamp_min(1e-12))
    start = sdtt_minimum(t, dt).log()

    def loss(logits: Tensor) -> Tensor:
        def student(_: Tensor, t: Tensor) -> Posterior:
            return Posterior(logits[state], lambda hidden: hidden, EYE)

        tokens = torch.where(masked, 0, x)
        per_token = sdtt.losses(student, teacher, tokens, times, uniform, dt, MASK, EXACT)
        return (weight[:, None] * per_token).sum()

    assert_least(loss, start)
    apart = 0.5 * (start.exp() - POSTERIORS).abs().sum(-1)[STATES == MASK].max()
    assert apart < 1e-3 if dt < 0.01 else apart > 0.01


@pytest.mark.parametrize(("steps", "n"), [(1, 60_000), (1_000, 20_000)])
def test_what_sdtt_tends_to_writes(steps: int, n: int) -> None:
    """Each of its steps stands for two of the exact teacher: in one the product of its marginals at t = 1, which is not
    the teacher's product, in many the law."""

    def student(x: Tensor, t: Tensor) -> Tensor:
        return sdtt_minimum(float(t[0]), 0.5 / steps)[number_of(x)]

    tokens, _ = mdlm.sample(
        network(student), (n, LENGTH), steps, lambda i: uniforms(2, n, LENGTH, seed=i), MASK, EXACT
    )
    marginals = sdtt_minimum(1.0, 0.5)[-1]
    product = torch.einsum("plk,lk->pl", LANGUAGE.onehot, marginals).prod(-1)
    law = product if steps == 1 else LANGUAGE.probs
    assert abs(chi_squared(tokens, law)) < 4
    if steps == 1:
        assert chi_squared(tokens, FACTORISED) > 10
        assert chi_squared(tokens, LANGUAGE.probs) > 50


def test_duos_student_is_least_at_the_exact_posterior_for_short_steps() -> None:
    """Both ends of a pair are then one state; the teacher of a longer one sees a state nearer to the data."""
    clock, low, high = DecodingErrorClock(VOCAB), -3.0, 1.5
    n = 4000
    tokens = LANGUAGE.sample(n, torch.Generator().manual_seed(0))

    def exact(x: Tensor, t: Tensor) -> Posterior:
        return ExactPosterior(uniform_posterior(x, t, LogLinear()), EYE)

    exact.embedding = EYE  # type: ignore[attr-defined]

    def loss(width: float, beside: float) -> Tensor:
        rounds: Any = SimpleNamespace(teacher=exact, width=width)
        objective = consistency.DCDObjective(rounds, clock, (low, high))
        draws = objective.draw(n, torch.Generator().manual_seed(3))
        noise = objective.noise([(0, "noise", 0, i) for i in range(n)], LENGTH, torch.device("cpu"))

        def student(x: Tensor, t: Tensor) -> Posterior:
            logits = uniform_posterior(x, t, LogLinear()).log()
            shift = torch.randn(
                LENGTH, VOCAB, generator=torch.Generator().manual_seed(4), dtype=torch.float64
            )
            return Posterior(logits + beside * shift, lambda hidden: hidden, EYE)

        student.config = SimpleNamespace(vocab_size=VOCAB)  # type: ignore[attr-defined]
        return objective.losses(student, tokens, noise, draws)

    assert loss(1e-9, 0.0).abs().max() < 1e-4
    assert loss(1e-9, 0.3).mean() > 1e-2
    assert loss(0.25, 0.0).mean() > 1e-2


def test_the_argmax_of_a_gaussian_state_is_a_uniform_state() -> None:
    """With the chance α of the clock, and every other token alike."""
    vocab, n = 7, 200_000
    clock = DecodingErrorClock(vocab)
    for g in (-3.0, -1.0, 1.0):
        tokens = torch.randint(vocab, (n, 1), generator=torch.Generator().manual_seed(0))
        noise = torch.randn(n, 1, vocab, generator=torch.Generator().manual_seed(1))
        level = torch.full((n,), g)
        x = gaussian.argmax_tokens(tokens, level, noise)
        alpha = float(gaussian.kept(torch.tensor([g]), clock))
        right = float((x == tokens).double().mean())
        assert right == pytest.approx(alpha + (1 - alpha) / vocab, abs=0.005)
        wrong = torch.bincount(((x - tokens) % vocab).flatten(), minlength=vocab)[1:].double() / n
        assert (wrong - (1 - alpha) / vocab).abs().max() < 0.005
        soft = gaussian.soft_tokens(tokens[:100], level[:100], noise[:100], torch.eye(vocab))
        assert (soft.argmax(-1) == x[:100]).all()
        assert (soft.max(-1).values > 0.99).double().mean() > 0.9
    levels = torch.linspace(-4, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(
        gaussian.level_of(gaussian.kept(levels, clock), clock), levels, atol=1e-5, rtol=1e-5
    )
    t = gaussian.time_of(torch.tensor(0.4), LogLinear())
    torch.testing.assert_close(LogLinear().alpha(t), torch.tensor(0.4))


def test_the_curriculum_reads_soft_tokens_of_the_right_level() -> None:
    """Duo's first half: noisy tokens kept with α, an input whose argmax is the noisy token, and the same bound."""
    vocab, rows, length = 7, 400, 50
    config = DenoiserConfig(
        vocab_size=vocab, length=length, backbone=dataclasses.replace(PLAIN, width=16, depth=1)
    )
    torch.manual_seed(0)
    net = TokenNetwork(config, timed=True, extra=0)
    unzero(net)
    objective = duo.DuoObjective(duo.DuoConfig(), 100, DecodingErrorClock(vocab))
    tokens = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    noise = objective.noise([(0, "noise", 0, i) for i in range(rows)], length, torch.device("cpu"))
    draws = objective.draw(rows, torch.Generator().manual_seed(1)) | {"t": torch.full((rows,), 0.3)}
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    whole = []
    for step in (0, 49, 50):
        objective.prepare(net, step)
        whole.append(objective.losses(net, tokens, noise, draws))
    objective.prepare(net)  # held out: as it will be at the end
    whole.append(objective.losses(net, tokens, noise, draws))
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[2], whole[3])
    assert not seen[2].is_floating_point()
    nearest = (seen[0][..., None, :] - net.embedding).square().sum(-1).argmin(-1)
    kept = float((nearest == tokens).double().mean())
    alpha = float(LogLinear().alpha(torch.tensor(0.3)))
    assert kept == pytest.approx(alpha + (1 - alpha) / vocab, abs=0.02)
    whole[0].mean().backward()
    assert net.embedding.grad is not None
    assert net.embedding.grad.any()


def test_levels_that_are_drawn_evenly_in_g() -> None:
    """Each even draw of g stands for the stretch of t that it covers: the loss is the bound's share of the range."""
    vocab, rows, length = 7, 512, 3
    clock, low, high = DecodingErrorClock(vocab), -2.5, 1.0
    g = torch.linspace(-6, 6, 200, dtype=torch.float64, requires_grad=True)
    (rate,) = torch.autograd.grad(gaussian.kept(g, clock).sum(), g)
    torch.testing.assert_close(gaussian.slope(g.detach(), clock), rate, rtol=1e-4, atol=1e-6)
    ends = gaussian.time_of(gaussian.kept(torch.tensor([low, high]).double(), clock), LogLinear())
    config = DenoiserConfig(
        vocab_size=vocab, length=length, backbone=dataclasses.replace(PLAIN, width=16, depth=1)
    )
    net = TokenNetwork(config, timed=True, extra=0)
    objective = duo.DuoObjective(duo.DuoConfig(g_low=low, g_high=high), 2, clock)
    tokens = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    noise = objective.noise([(0, "noise", 0, i) for i in range(rows)], length, torch.device("cpu"))
    even = (torch.arange(rows) + 0.5) / rows
    draws = objective.draw(rows, torch.Generator().manual_seed(1)) | {"t": even}
    seen: list[Tensor] = []
    whole = duo.bound

    def one(posterior: Posterior, x: Tensor, tokens: Tensor, t: Tensor, *args: Any) -> Tensor:
        seen.append(t)
        return torch.ones_like(whole(posterior, x, tokens, t, *args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duo, "bound", one)
        objective.prepare(net, 0)
        found = objective.losses(net, tokens, noise, draws)
    assert float(found.mean()) == pytest.approx(float(ends[1] - ends[0]), rel=1e-3)
    assert float(ends[0]) < float(seen[0].min()) < float(seen[0].max()) < float(ends[1])
    objective.prepare(net)  # as it will be at the end: all times
    torch.testing.assert_close(
        objective.losses(net, tokens, noise, draws),
        duo.losses(net, tokens, even, noise.transpose(0, 1), vocab, LogLinear()),
    )
    with pytest.raises(ValueError, match=r"duo\.g_low = 1\.0 is to lie below duo\.g_high = -1\.0"):
        duo.DuoConfig(g_low=1.0, g_high=-1.0)


def test_two_levels_of_one_noise() -> None:
    """Duo-DCD's pairs: the student at the noisier level, the teacher a width nearer to the data, both of one ε, so that
    what is right at the first is right at the other too; and the loss is KL(student ‖ teacher)."""
    vocab, rows, length, width = 7, 200, 6, 0.25
    clock = DecodingErrorClock(vocab)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def recorder(name: str, seed: int) -> Any:
        logits = torch.randn(rows, length, vocab, generator=torch.Generator().manual_seed(seed))

        def call(x: Tensor, t: Tensor) -> Posterior:
            seen[name] = (x, t)
            return Posterior(logits, lambda hidden: hidden, torch.eye(vocab))

        call.embedding, call.logits = torch.eye(vocab), logits  # type: ignore[attr-defined]
        call.config = SimpleNamespace(vocab_size=vocab)  # type: ignore[attr-defined]
        return call

    student, teacher = recorder("student", 1), recorder("teacher", 2)
    low, high = -3.0, 1.5
    rounds: Any = SimpleNamespace(teacher=teacher, width=width)
    objective = consistency.DCDObjective(rounds, clock, (low, high))
    tokens = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    draws = objective.draw(rows, torch.Generator().manual_seed(3))
    noise = objective.noise([(0, "noise", 0, i) for i in range(rows)], length, torch.device("cpu"))
    found = objective.losses(student, tokens, noise, draws)
    u = draws["t"].double()
    for name, at in (("student", u), ("teacher", (u - width).clamp_min(0))):
        want = gaussian.time_of(gaussian.kept(low + (high - low) * at, clock), LogLinear())
        torch.testing.assert_close(seen[name][1].double(), want, rtol=1e-6, atol=1e-6)
    (noisy, t), (cleaner, s) = seen["student"], seen["teacher"]
    assert bool((t >= s).all())
    right, also = noisy == tokens, cleaner == tokens
    assert not bool((right & ~also).any())
    assert also.float().mean() > right.float().mean() + 0.05
    for x, times in seen.values():  # each kept with the chance that its time says
        alpha = LogLinear().alpha(times.double())
        chance = float((alpha + (1 - alpha) / vocab).mean())
        assert float((x == tokens).double().mean()) == pytest.approx(chance, abs=0.04)
    p, q = (one.logits.double().log_softmax(-1) for one in (student, teacher))
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
