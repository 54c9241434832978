"""The FMLM objective: the semigroup identity on the exact toy, the law of its draws, targets, gradients."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import toy
from flowlm.clock import DecodingErrorClock, UniformClock
from flowlm.config import RunConfig
from flowlm.denoiser import Denoiser
from flowlm.device import can_compile
from flowlm.objectives import FlowMapObjective, flow_map, identities
from flowlm.objectives.flow_map import (
    BOUNDARY,
    DIAGONAL,
    IDENTITIES,
    INTERIOR,
    PATIENCE,
    FlowMapConfig,
    psd_target,
    rollout_target,
    semigroup_weight,
)
from flowlm.objectives.identities import sparsemax
from flowlm.path import corrupt, step
from test_denoiser import BACKBONE, D, L, V, make
from toy import LANGUAGE

# --- the identity, on the exact flow --------------------------------------------------------------

CLOCK = DecodingErrorClock(toy.VOCAB)


def random_triples(num: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States x_s on the path and s < u < t."""
    gen = torch.Generator().manual_seed(0)
    tau = torch.rand(num, 3, generator=gen, dtype=torch.float64).mul(0.98).add(0.01).sort(1).values
    s, u, t = CLOCK.time(tau).unbind(1)
    onehot = torch.nn.functional.one_hot(LANGUAGE.sample(num, gen), toy.VOCAB)
    z = torch.randn(num, toy.LENGTH, toy.VOCAB, generator=gen, dtype=torch.float64)
    return (1 - toy.times(s)) * z + toy.times(s) * onehot, s, u, t


#: The exact flow of x itself, and of y = xE, two numbers for three tokens, of which less is known.
LOW_RANK = toy.Language(torch.tensor([[1.0, 0.0], [-0.3, 0.9], [-0.8, -0.5]], dtype=torch.float64))
each_language = pytest.mark.parametrize("language", [LANGUAGE, LOW_RANK], ids=["x", "y = xE"])


def semigroup_error(language: toy.Language = LANGUAGE) -> Tensor:
    """|PSD target - δ_{s,t}| of each random triple, with the exact flow map as the network."""
    x, s, u, t = random_triples()
    y = x @ language.embedding
    network: Any = toy.ExactDenoiser(two_times=True, language=language)
    target = psd_target(network, y, s, u, t).probs_at(slice(None)).view_as(x)
    return (target - language.flow_map_denoiser(y, s, t)).abs().amax((1, 2))


@each_language
def test_semigroup_identity(language: toy.Language) -> None:
    assert semigroup_error(language).max() < 1e-6


def test_less_is_known_of_a_state_of_low_rank() -> None:
    """Its D_t is E[D_t of x | y]: on average as right as it says, and of larger entropy."""
    gen = torch.Generator().manual_seed(5)
    t = torch.full((20_000,), 0.5, dtype=torch.float64)
    tokens = LANGUAGE.sample(len(t), gen)
    onehot = torch.nn.functional.one_hot(tokens, toy.VOCAB).double()
    z = torch.randn(onehot.shape, generator=gen, dtype=torch.float64)
    x = (1 - toy.times(t)) * z + toy.times(t) * onehot
    entropies = []
    for law in (LANGUAGE, LOW_RANK):
        probs = law.denoise(x @ law.embedding, t)
        right = probs.gather(-1, tokens[..., None])
        entropy = -torch.xlogy(probs, probs).sum(-1).mean()
        assert -right.log().mean() == pytest.approx(float(entropy), rel=0.02)
        entropies.append(float(entropy))
    assert entropies[1] > entropies[0] + 0.005


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, u, t: 1 - semigroup_weight(s, u, t),
        lambda s, u, t: semigroup_weight(CLOCK.tau(s), CLOCK.tau(u), CLOCK.tau(t)),
        lambda s, u, t: (1 - s) * (u - s) / ((1 - u) * (t - s)),
        lambda s, u, t: (u - s) / (t - s),
        lambda s, u, t: -semigroup_weight(s, u, t),
    ],
    ids=["λ and 1-λ swapped", "τ for t", "1-s for 1-t", "no clock factor", "sign"],
)
def test_wrong_semigroup_weights_are_caught(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_map, "semigroup_weight", wrong)
    assert semigroup_error().median() > 1e-3


def test_a_wrong_middle_state_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_map, "step", lambda y, d, s, t: y)
    assert semigroup_error().median() > 1e-3


def test_weights_of_the_semigroup_are_convex() -> None:
    _, s, u, t = random_triples()
    weight = semigroup_weight(s, u, t)
    assert ((weight > 0) & (weight < 1)).all()
    # Against 1-λ as the method writes it.
    torch.testing.assert_close(1 - weight, (1 - s) * (t - u) / ((1 - u) * (t - s)))
    assert not semigroup_weight(s, u, torch.ones_like(t)).any()


@pytest.mark.parametrize("steps", [1, 2, 64])
def test_rollout_is_the_eulers_of_the_teacher(steps: int) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(300, toy.LENGTH, toy.VOCAB, generator=gen, dtype=torch.float64)
    teacher: Any = toy.ExactDenoiser(two_times=False)
    probs = rollout_target(teacher, x, CLOCK, steps).probs_at(slice(None)).view_as(x)
    grid = CLOCK.time(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    y = x
    for s, t in itertools.pairwise(grid[:-1]):
        y = y + (t - s) / (1 - s) * (LANGUAGE.denoise(y, s) - y)
    torch.testing.assert_close(probs, LANGUAGE.denoise(y, grid[-2]), atol=1e-5, rtol=0)
    if steps == 64:
        exact = LANGUAGE.flow_map(x, 0.0, 1.0).argmax(-1)
        assert (probs.argmax(-1) != exact).any(-1).double().mean() < 0.02


# --- the draws ------------------------------------------------------------------------------------


def draw(num: int, clock: Any = None, seed: int = 0, **config: Any) -> dict[str, Tensor]:
    objective = FlowMapObjective(FlowMapConfig(**config), clock or DecodingErrorClock(V))
    return objective.draw(num, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("diagonal", "boundary"), [(0.5, 0.03125), (0.25, 0.5), (0.0, 0.0), (1.0, 0.3)])
def test_shares_of_the_kinds(diagonal: float, boundary: float) -> None:
    """Exact in the mean, also where a share of a batch is a fraction of a row."""
    for num, repeats in ((4096, 1), (6, 3000)):
        kinds = torch.cat(
            [
                draw(num, UniformClock(), i, diagonal=diagonal, boundary=boundary)["kind"]
                for i in range(repeats)
            ]
        )
        assert len(kinds) == num * repeats
        share = torch.bincount(kinds, minlength=3) / len(kinds)
        expected = [diagonal, (1 - diagonal) * boundary, (1 - diagonal) * (1 - boundary)]
        assert share[[DIAGONAL, BOUNDARY, INTERIOR]].tolist() == pytest.approx(expected, abs=0.01)


def test_law_of_the_pairs() -> None:
    clock = DecodingErrorClock(V)
    draws = draw(20_000, clock, boundary=0.25)
    kind, s, u, t = (draws[name] for name in ("kind", "s", "u", "t"))
    assert s.dtype == u.dtype == t.dtype == torch.float64
    assert ((s <= u) & (u <= t)).all()
    assert torch.equal(s[kind == DIAGONAL], t[kind == DIAGONAL])
    assert torch.equal(s[kind == DIAGONAL], u[kind == DIAGONAL])
    assert (s[kind == BOUNDARY] == 0).all()
    assert (t[kind == BOUNDARY] == 1).all()

    inside = kind == INTERIOR
    assert (s[inside] < u[inside]).all()
    assert (u[inside] < t[inside]).all()
    tau_s, tau_u, tau_t = (clock.tau(x[inside]) for x in (s, u, t))
    torch.testing.assert_close(tau_u, (tau_s + tau_t) / 2, atol=1e-9, rtol=0)
    width = tau_t - tau_s
    place = (tau_s / (1 - width))[width < 0.99]
    for values in (width, place, clock.tau(s[kind == DIAGONAL])):
        # Kolmogorov–Smirnov to the uniform law; the draws are stratified, so the bound is a wide one.
        ordered = values.sort().values
        assert (ordered - torch.linspace(0, 1, len(values), dtype=torch.float64)).abs().max() < 0.01
    assert torch.corrcoef(torch.stack([width[width < 0.99], place]))[0, 1].abs() < 0.05


def test_other_laws_of_the_pairs() -> None:
    """Two uniform draws in order, and u anywhere between them; what is not asked for stays as it is."""
    draws = draw(20_000, UniformClock(), diagonal=0.0, boundary=0.0, pairs="uniform", middle="random")
    s, u, t = (draws[name] for name in ("s", "u", "t"))
    n = len(s)
    even = torch.linspace(0, 1, n, dtype=torch.float64)
    # P(max <= x) = x^2, P(min <= x) = 1 - (1-x)^2
    for values in (t.square(), 1 - (1 - s).square()):
        assert (values.sort().values - even).abs().max() < 0.02
    share = (u - s) / (t - s)
    assert ((s < u) & (u < t)).all()
    assert (share.sort().values - even).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([share, t - s]))[0, 1].abs() < 0.05
    wide, even_pairs = (
        draw(20_000, diagonal=0.0, boundary=0.0, pairs=pairs) for pairs in ("width", "uniform")
    )
    clock = DecodingErrorClock(V)
    means = [(clock.tau(d["t"]) - clock.tau(d["s"])).mean() for d in (wide, even_pairs)]
    assert means == [pytest.approx(1 / 2, abs=0.01), pytest.approx(1 / 3, abs=0.01)]


def test_kinds_are_spread_over_the_batch() -> None:
    """Any share of the rows (a micro-batch, a process) sees every kind."""
    kind = draw(4096, boundary=0.25)["kind"]
    for part in kind.split(512):
        assert (torch.bincount(part, minlength=3) > 30).all()


# --- losses ---------------------------------------------------------------------------------------

B = 12
FROZEN = {"freeze_embedding": True}
#: The settings under which losses are compared; the last distils a network into itself.
PUBLISHED = {
    "diagonal_target": "teacher",
    "boundary_target": "self",
    "target": "student",
    "freeze_embedding": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "rollout": {"boundary_target": "teacher", "rollout_steps": 3},
    "averaged": {"target": "averaged"},
    "rollout, averaged": {"boundary_target": "teacher", "rollout_steps": 2, "target": "averaged"},
    "embedding trained": {"freeze_embedding": False, "boundary_target": "teacher", "rollout_steps": 3},
    "no teacher": {"diagonal_target": "data"},
    "the teacher is where it starts": {"diagonal_target": "data", "target": "averaged"},
    "the data, embedding trained": {"diagonal_target": "data", "freeze_embedding": False},
    "the data and the teacher's rollout": {
        "diagonal_target": "data",
        "boundary_target": "teacher",
        "rollout_steps": 2,
    },
    "lsd": {"identity": "lsd", "derivative": "jvp"},
    "lsd-logit": {
        "identity": "lsd-logit",
        "derivative": "jvp",
        "boundary_target": "teacher",
        "rollout_steps": 2,
    },
    "esd": {"identity": "esd", "derivative": "jvp", "denoiser": "teacher", "target": "averaged"},
    "esd-logit": {"identity": "esd-logit", "derivative": "jvp"},
    "esd, squared": {"identity": "esd", "derivative": "jvp", "loss": "squared-error"},
    "esd-logit by differences": {"identity": "esd-logit"},
    "cfm": {"identity": "cfm", "freeze_embedding": False, "diagonal_target": "data"},
    "cfm and the teacher's rollout": {
        "identity": "cfm",
        "denoiser": "teacher",
        "boundary_target": "teacher",
        "rollout_steps": 2,
    },
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)
each_vocabulary = pytest.mark.parametrize("vocab_size", [V, 20], ids=["low-rank", "dense"])


def perturbed(net: Denoiser, scale: float, embedding: bool, seed: int) -> Denoiser:
    """A copy with other weights, but the same embedding unless told."""
    gen = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if embedding or name != "embedding":
                parameter.add_(scale * torch.randn(parameter.shape, generator=gen))
    return twin


class Case:
    """A student, its teacher and average, and one batch with every kind of row."""

    def __init__(self, setting: str, vocab_size: int = V):
        self.config = FlowMapConfig(diagonal=0.5, boundary=0.5, **PUBLISHED | SETTINGS[setting])
        self.student = make(True, vocab_size=vocab_size)
        self.teacher = perturbed(make(False, vocab_size=vocab_size), 0.1, not self.config.freeze_embedding, 1)
        self.averaged = perturbed(self.student, 0.1, False, 2)
        alone = setting == "no teacher"
        self.objective = FlowMapObjective(
            self.config, self.student.clock, None if alone else self.teacher, self.averaged
        )
        self.draws = self.objective.draw(B, torch.Generator().manual_seed(0))
        assert (torch.bincount(self.draws["kind"], minlength=3) > 1).all()
        self.objective.prepare(self.student)
        gen = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, vocab_size, (B, L), generator=gen)
        self.xi = torch.randn(B, L, self.objective.noise_width, generator=gen)

    def losses(self, rows: slice = slice(None)) -> Tensor:
        draws = {name: value[rows] for name, value in self.draws.items()}
        return self.objective.losses(self.student, self.tokens[rows], self.xi[rows], draws)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.student.zero_grad()
        loss.mean().backward(retain_graph=True)
        return {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}


@torch.no_grad()
def written_out_target(case: Case, i: int, y: Tensor, teacher_y0: Tensor) -> Tensor:
    """The target of row i, (1, L, V), from the formulas."""
    kind = int(case.draws["kind"][i])
    s, u, t = (case.draws[name][i : i + 1].float() for name in "sut")
    tokens = case.tokens[i : i + 1]
    if kind == DIAGONAL:
        if case.config.diagonal_target == "data":
            return torch.nn.functional.one_hot(tokens, case.student.config.vocab_size).float()
        x = corrupt(tokens, s, case.teacher.embedding, teacher_y0)
        return case.teacher(x, s).log_probs().exp()
    if kind == BOUNDARY and case.config.boundary_target == "teacher":
        n = case.config.rollout_steps
        grid = case.student.clock.time(torch.linspace(0, 1, n + 1, dtype=torch.float64)).tolist()
        x = teacher_y0
        for a, b in itertools.pairwise(grid[:-1]):
            x = step(x, case.teacher(x, a).embed(), a, b)
        return case.teacher(x, grid[-2]).log_probs().exp()
    network = case.averaged if case.config.target == "averaged" else case.student
    # At (0, 1) the Eulerian identity of probabilities alone says something.
    if case.config.identity != "psd" and (case.config.identity == "esd" or kind == INTERIOR):
        return written_out_rate_target(case, network, y, *(case.draws[name][i : i + 1] for name in "st"))
    first = network(y, s, u)
    second = network(step(y, first.embed(), s, u), u, t)
    s, u, t = (case.draws[name][i] for name in "sut")
    weight = float((1 - t) * (u - s) / ((1 - u) * (t - s)))
    return weight * first.log_probs().exp() + (1 - weight) * second.log_probs().exp()


def written_out_rate_target(case: Case, network: Denoiser, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The Lagrangian or Eulerian target of one row, with rates of the probabilities themselves."""
    config, e = case.config, network.embedding

    def probs(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return network(y, s, t).log_probs().exp()

    def inner(y: Tensor, t: Tensor) -> Tensor:
        return case.teacher(y, t).log_probs().exp() if config.denoiser == "teacher" else probs(y, t, t)

    def rate(*direction: Tensor) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(probs, (y, s, t), direction)

    a, b = float(s), float(t)
    if config.identity == "cfm":
        return inner(step(y, probs(y, s, t) @ e, a, b), t)
    if config.identity.startswith("lsd"):
        p, dp = rate(torch.zeros_like(y), torch.zeros_like(s), torch.ones_like(t))
        d = inner(step(y, p @ e, a, b), t)
        weight, left = -(1 - b) * (b - a) / (1 - a), 1.0
    else:
        d = inner(y, s)
        p, dp = rate((d @ e - y) / (1 - a), torch.ones_like(s), torch.zeros_like(t))
        weight, left = (1 - a) * (b - a), 1 - b
    if config.identity.endswith("logit"):
        ratio = 1 - weight / left * dp / p
        most = p / config.log_floor
        wanted = torch.where(ratio > 0, torch.minimum(d / ratio, most), most)
        return wanted / wanted.sum(-1, keepdim=True)
    target = p + left * (d - p) + weight * dp
    return target if config.loss == "squared-error" else sparsemax(target)


def written_out_drift(case: Case, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """½ |c ∂_t δ_{s,t}|² of one row, by forward-mode differentiation."""

    def probs(t: Tensor) -> Tensor:
        return case.student(y, s, t).log_probs().exp()

    with sdpa_kernel(SDPBackend.MATH):
        _, rate = torch.func.jvp(probs, (t,), (torch.ones_like(t),))
    c = float((1 - t) * (t - s) / (1 - s))
    return 0.5 * (c * rate).square().sum(-1)


@each_vocabulary
@each_setting
def test_loss_and_gradient_are_the_written_formulas(setting: str, vocab_size: int) -> None:
    """Row by row: cross-entropy to a target that carries no gradient, gradient through noise and all."""
    case = Case(setting, vocab_size)
    noise = case.objective._noise(case.xi)  # type: ignore[misc]
    teacher_y0, y0 = noise if isinstance(noise, tuple) else (noise, noise)
    expected = []
    for i in range(B):
        row = slice(i, i + 1)
        s, t = (case.draws[name][row].float() for name in "st")
        y = corrupt(case.tokens[row], s, case.student.embedding, y0[row])
        target = written_out_target(case, i, y.detach(), teacher_y0[row])
        log_probs = case.student(y, s, t).log_probs()
        if case.config.loss == "squared-error" and case.draws["kind"][i] != DIAGONAL:
            expected.append((target - log_probs.exp()).square().sum(-1))
        else:
            expected.append(-(target * log_probs).sum(-1))
        if case.config.identity == "cfm" and case.draws["kind"][i] == INTERIOR:
            expected[-1] = expected[-1] + written_out_drift(
                case, y, *(case.draws[name][row] for name in "st")
            )
    loss = case.losses()
    assert loss.shape == (B, L)
    # A difference's own error is bounded where it is made, in test_derivative.py.
    by_jvp = case.config.derivative == "jvp"
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if by_jvp else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(loss, torch.cat(expected), **tolerance)
    got, want = case.gradients(loss), case.gradients(torch.cat(expected))
    assert got.keys() == want.keys()
    assert "embedding" in got
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], atol=1e-5 if by_jvp else 1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_setting
def test_micro_batches_give_the_whole_batch(setting: str) -> None:
    case = Case(setting)
    whole = case.losses()
    parts = torch.cat([case.losses(rows) for rows in (slice(0, 5), slice(5, 6), slice(6, None))])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    got, want = case.gradients(parts), case.gradients(whole)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-3)


@each_setting
def test_teacher_and_average_are_left_alone(setting: str) -> None:
    case = Case(setting)
    networks = (case.teacher, case.averaged)
    before = [copy.deepcopy(net.state_dict()) for net in networks]
    case.losses().mean().backward()
    for net, state in zip(networks, before):
        assert all(parameter.grad is None for parameter in net.parameters())
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is not None for parameter in case.student.parameters())


def test_targets_see_no_dropout() -> None:
    """The student answers for its target in evaluation mode, and goes on training."""
    case = Case("no teacher")
    modes: list[bool] = []
    case.student.backbone.register_forward_hook(lambda net, *_: modes.append(net.training))
    case.losses()
    assert modes == [True, False, False]
    assert case.student.training


def test_the_semigroup_comes_first() -> None:
    """For the first share of the training's steps; what is measured outside of it is the identity in the end."""
    case = Case("no teacher")

    def losses(step: int | None, **options: Any) -> Tensor:
        objective = FlowMapObjective(FlowMapConfig(**options), case.student.clock, steps=10)
        objective.prepare(case.student, step)
        return objective.losses(case.student, case.tokens, case.xi, case.draws).detach()

    case.student.eval()
    changing = {"identity": "esd", "psd_first": 0.5}
    semigroup, eulerian = losses(0), losses(0, identity="esd")
    assert not torch.allclose(semigroup, eulerian)
    for at, want in ((0, semigroup), (4, semigroup), (5, eulerian), (9, eulerian), (None, eulerian)):
        assert torch.equal(losses(at, **changing), want)


def test_the_flow_comes_first() -> None:
    """All rows are on the diagonal in the first share of the training's steps, and what the loss is measured by
    outside of it is as in the end."""
    case = Case("no teacher")
    config = FlowMapConfig(diagonal=0.25, boundary=0.5, flow_first=0.5)
    objective = FlowMapObjective(config, case.student.clock, steps=10)

    def kinds(step: int | None) -> list[int]:
        objective.prepare(case.student, step)
        draws = objective.draw(32, torch.Generator().manual_seed(0))
        on = draws["kind"] == DIAGONAL
        assert torch.equal(draws["s"][on], draws["t"][on])
        return torch.bincount(draws["kind"], minlength=3).tolist()

    found = {step: kinds(step) for step in (0, 4, 5, 9, None)}
    assert found == {0: [32, 0, 0], 4: [32, 0, 0], 5: [8, 12, 12], 9: [8, 12, 12], None: [8, 12, 12]}
    with pytest.raises(ValueError, match=r"flow_map\.flow_first = 0\.5 is for learning without a teacher"):
        RunConfig(objective="flow-map", teacher="runs/flm", flow_map=config)


# The regression on a corrected teacher takes that teacher's map as it is, and watches nothing.
@pytest.mark.parametrize("identity", [name for name in IDENTITIES if name != "correction"])
def test_what_leaves_the_simplex_is_reported(identity: str) -> None:
    case = Case("no teacher")
    objective = FlowMapObjective(FlowMapConfig(identity=identity, boundary=0.5), case.student.clock)
    objective.prepare(case.student)
    assert objective.report() == {}
    loss = objective.losses(case.student, case.tokens, case.xi, case.draws)
    before = objective.report()
    loss.mean().backward()
    assert objective.report() == before
    watched = [] if identity in ("psd", "cfm") else ["clamped" if "logit" in identity else "outside"]
    assert list(before) == watched
    assert all(0 <= value < 1 for value in before.values())


def test_the_figures_are_the_mass_outside_and_at_the_bound() -> None:
    target = torch.tensor([[0.5, 0.7, -0.2], [0.2, 0.3, 0.5], [1.6, -0.5, -0.1]])
    watched = identities._of_probabilities(lambda rows: target[rows], project=True)
    assert watched.probs_at(slice(0, 2)).min() >= 0
    watched.probs_at(slice(2, 3))
    assert (float(watched.total), watched.count) == (pytest.approx(0.2 + 0.6), 3)

    # δ and D of two positions; the second's first token is to gain more than twice its probability, its last one has a
    # rate without a logarithm: both are given twice what the network gives them, and their neighbour what is its.
    p = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    d = torch.tensor([[0.3, 0.3, 0.4], [0.9, 0.05, 0.05]])
    ratio = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -0.5]])
    inner = SimpleNamespace(log_probs_at=lambda rows: d[rows].log())
    moving = SimpleNamespace(log_probs_at=lambda rows: (p[rows].log(), None))
    watched = identities._of_logits(inner, moving, lambda rows, a: ratio[rows], floor=0.5)  # type: ignore[arg-type]
    want = torch.tensor([[0.3, 0.3, 0.4], [0.2 / 0.45, 0.05 / 0.45, 0.2 / 0.45]])
    torch.testing.assert_close(watched.probs_at(slice(0, 2)), want)
    assert (float(watched.total), watched.count) == (pytest.approx(0.4 / 0.45), 2)


@pytest.mark.parametrize(("identity", "figure"), [("lsd", "outside"), ("esd-logit", "clamped")])
def test_targets_that_are_none_for_long_are_told_once(identity: str, figure: str) -> None:
    objective = FlowMapObjective(FlowMapConfig(identity=identity), UniformClock())
    told = []
    for share in [0.9] * (PATIENCE - 1) + [0.1] + [0.6] * (PATIENCE + 5):
        objective._watched = [(figure, 8 * share, 8)]
        assert objective.report() == {figure: pytest.approx(share)}
        told.append(objective.warning())
    assert [i for i, text in enumerate(told) if text] == [2 * PATIENCE - 1]
    assert f"the target of flow_map.identity = '{identity}'" in told[2 * PATIENCE - 1]
    assert "--flow-map.psd-first 0.75" in told[2 * PATIENCE - 1]


@pytest.mark.parametrize(
    "options",
    [
        {"identity": "esd", "loss": "squared-error"},
        {"identity": "correction", "loss": "squared-error", "freeze_embedding": True},
        {"identity": "lsd", "psd_first": 0.75},
        {"identity": "lsd", "flow_first": 0.8},
    ],
)
def test_no_remedy_is_named_that_would_be_refused_or_is_there(options: dict[str, Any]) -> None:
    objective = object.__new__(FlowMapObjective)
    objective.config, objective.identity = FlowMapConfig(**options), options["identity"]
    assert objective.remedy() == "lower --optim.lr and --optim.muon-lr"


def test_coupled_noise_is_one_state_for_equal_embeddings() -> None:
    """With equal embeddings, training E starts from the loss of a frozen E's objective."""
    case = Case("embedding trained")
    case.teacher.load_state_dict(make(False).state_dict())
    case.objective._noise = None  # a teacher does not change in a run
    case.objective.prepare(case.student)
    noise = case.objective._noise(case.xi)  # type: ignore[misc]
    torch.testing.assert_close(noise[0], noise[1], atol=1e-5, rtol=1e-5)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diagonal": 1.5}, r"flow_map.diagonal is a share of rows in \[0, 1\], got 1.5"),
        ({"boundary": -0.1}, r"flow_map.boundary is a share of rows in \[0, 1\], got -0.1"),
        ({"boundary_target": "data"}, "flow_map.boundary_target = 'data': use 'self' or 'teacher'"),
        ({"target": "teacher"}, "flow_map.target = 'teacher': use 'student' or 'averaged'"),
        ({"rollout_steps": 0}, "flow_map.rollout_steps must be at least 1, got 0"),
        ({"target": "averaged", "freeze_embedding": False}, "needs freeze_embedding = true"),
        ({"identity": "correction", "loss": "squared-error"}, "'correction' needs freeze_embedding = true"),
        (
            {"identity": "ecld"},
            "flow_map.identity = 'ecld': use 'psd', 'lsd', 'lsd-logit', 'esd', 'esd-logit', 'cfm'",
        ),
        (
            {"psd_first": 2.0, "identity": "esd"},
            r"flow_map.psd_first is a share of the steps in \[0, 1\], got 2.0",
        ),
        ({"flow_first": -0.5}, r"flow_map.flow_first is a share of the steps in \[0, 1\], got -0.5"),
        ({"psd_first": 0.5}, "flow_map.psd_first = 0.5 means nothing for identity = 'psd'"),
        (
            {"psd_first": 0.5, "flow_first": 0.5, "identity": "esd"},
            "flow_map.psd_first = 0.5 is over when flow_map.flow_first = 0.5 is",
        ),
        (
            {"psd_first": 0.5, "identity": "esd", "loss": "squared-error"},
            "would take the semigroup's target in squared errors too",
        ),
        ({"pairs": "even"}, "flow_map.pairs = 'even': use 'width', 'uniform'"),
        ({"middle": "mid"}, "flow_map.middle = 'mid': use 'half', 'random'"),
        ({"loss": "mse"}, "flow_map.loss = 'mse': use 'cross-entropy', 'squared-error'"),
        ({"denoiser": "data"}, "flow_map.denoiser = 'data': use 'student', 'teacher'"),
        ({"derivative": "vjp"}, "flow_map.derivative = 'vjp': use 'jvp', 'difference'"),
        (
            {"identity": "esd-logit", "loss": "squared-error"},
            "identity = 'esd-logit' is none: use identity = 'esd' or loss = 'cross-entropy'",
        ),
        (
            {"identity": "cfm", "loss": "squared-error"},
            "identity = 'cfm' is none: use identity = 'lsd' or loss = 'cross-entropy'",
        ),
        ({"denoiser": "teacher"}, "flow_map.denoiser = 'teacher' means nothing for identity = 'psd'"),
        (
            {"identity": "lsd", "denoiser": "teacher", "freeze_embedding": False},
            "flow_map.denoiser = 'teacher' needs freeze_embedding = true",
        ),
        ({"log_floor": 0.0}, r"flow_map.log_floor must lie in \(0, 1\), got 0.0"),
        (
            {
                "target": "averaged",
                "identity": "correction",
                "loss": "squared-error",
                "freeze_embedding": True,
            },
            r"flow_map\.target = 'averaged' means nothing for identity = 'correction'.*use target = 'student'",
        ),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMapConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary_target": "teacher"}, "boundary_target = 'teacher' needs a teacher"),
        ({"diagonal_target": "teacher"}, "diagonal_target = 'teacher' needs a teacher"),
        (
            {"identity": "esd", "denoiser": "teacher", **FROZEN},
            "flow_map.denoiser = 'teacher' needs a teacher",
        ),
    ],
)
def test_objective_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMapObjective(FlowMapConfig(**options), UniformClock())


def test_the_noise_follows_an_embedding_that_is_trained() -> None:
    """Also where it is measured by the average, which asks for no gradient and yet changes."""
    average = make(True).requires_grad_(False)
    objective = FlowMapObjective(FlowMapConfig(), average.clock)
    laws = []
    for _ in range(2):
        objective.prepare(average)
        laws.append(objective._noise(torch.eye(D)[None]))  # type: ignore[misc, operator]
        average.embedding.mul_(2)
    torch.testing.assert_close(laws[1], 2 * laws[0])


def test_an_averaged_target_needs_the_average() -> None:
    config = FlowMapConfig(target="averaged", freeze_embedding=True)
    with pytest.raises(ValueError, match="needs the averaged weights"):
        FlowMapObjective(config, UniformClock(), teacher=make(False))


# --- the same target however it is computed -------------------------------------------------------


@pytest.mark.parametrize("identity", [name for name in IDENTITIES if name != "correction"])
def test_targets_are_the_same_in_any_precision_and_mode(identity: str) -> None:
    """With dropout as without, to the bit; in bfloat16 as in float32 to a total variation of three hundredths."""
    case = Case("no teacher")
    student = make(True, backbone=dataclasses.replace(BACKBONE, dropout=0.5))
    student.load_state_dict(case.student.state_dict())
    objective = FlowMapObjective(FlowMapConfig(identity=identity), student.clock)
    inside = case.draws["kind"] == INTERIOR
    s, u, t = (case.draws[name][inside] for name in "sut")
    objective.prepare(student)
    y = corrupt(case.tokens[inside], s.float(), student.embedding, objective._noise(case.xi[inside])).detach()  # type: ignore[misc, arg-type]

    def probs() -> Tensor:
        with torch.no_grad():
            return objective._pair_target(identity, student, y, s, u, t).probs_at(slice(None))

    student.eval()
    want = probs()
    student.train()
    assert torch.equal(probs(), want)
    assert student.training
    with torch.autocast("cpu", torch.bfloat16):
        apart = 0.5 * (probs().float() - want.float()).abs().sum(-1)
    assert apart.max() < 0.03


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("identity", [name for name in IDENTITIES if name != "correction"])
def test_targets_of_compiled_networks(identity: str) -> None:
    case = Case("no teacher")
    config = FlowMapConfig(identity=identity, boundary=0.5)

    def losses() -> Tensor:
        objective = FlowMapObjective(config, case.student.clock)
        objective.prepare(case.student)
        return objective.losses(case.student, case.tokens, case.xi, case.draws).detach()

    want = losses()
    case.student.backbone.compile()
    torch.testing.assert_close(losses(), want, atol=1e-3, rtol=1e-3)
