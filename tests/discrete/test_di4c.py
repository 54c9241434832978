"""Mixtures of factorised denoisers: what they are compared by, what they learn, how they write."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact import (
    EYE,
    FACTORISED,
    frequencies,
    masked_posterior,
    network,
    posterior_weights,
    uniform_posterior,
    uniforms,
)
from torch import Tensor

from flowlm.config import RunConfig, from_dict
from flowlm.denoiser import DenoiserConfig
from flowlm.discrete import di4c
from flowlm.discrete.network import TokenNetwork
from flowlm.discrete.schedule import LogLinear
from flowlm.families import Ask, family
from flowlm.model import FlowLM
from flowlm.posterior import OneHot, Posterior
from helpers import begin, command, content, map_values, said, settings, trained
from test_backbone import PLAIN, unzero
from toy import LANGUAGE, LENGTH, VOCAB, ExactPosterior

MASK = VOCAB
PROCESSES = {"di4c": di4c.Masked(MASK), "duo-di4c": di4c.Uniform(VOCAB)}
TEACHERS = {"di4c": "mdlm", "duo-di4c": "duo"}
MARGINALS = torch.einsum("p,plk->lk", LANGUAGE.probs, LANGUAGE.onehot)
#: Σ_l H(marginal) - H(law), the multi-information: what no product of marginals can know.
CORRELATION = float((LANGUAGE.probs * (LANGUAGE.probs / FACTORISED).log()).sum())


def distance(law: Tensor) -> float:
    """Total variation from the language."""
    return float((law - LANGUAGE.probs).abs().sum() / 2)


def passage_weights(name: str, x: Tensor, t: Tensor) -> Tensor:
    """p(passage | x_t = x), (B, 27), by enumeration."""
    same = x[:, None] == LANGUAGE.passages
    if name == "di4c":
        chance = (same | (x[:, None] == MASK)).all(-1).double()
    else:
        alpha = LogLinear().alpha(t.double())[:, None, None]
        chance = (alpha * same + (1 - alpha) / VOCAB).prod(-1)
    weights = chance * LANGUAGE.probs
    return weights / weights.sum(-1, keepdim=True)


def exact_mixture(name: str) -> di4c.Student:
    """A mixture that is p(x_0 | x_t): each λ is a passage, by inversion."""

    def student(x: Tensor, t: Tensor, latent: Tensor) -> Posterior:
        index = torch.searchsorted(passage_weights(name, x, t).cumsum(-1), latent.double()[:, None])
        return ExactPosterior(LANGUAGE.onehot[index.squeeze(-1).clamp_max(26)], EYE)

    return student


def exact_teacher(name: str) -> di4c.Teacher:
    if name == "di4c":
        return network(lambda x, t: masked_posterior(x))
    return network(lambda x, t: uniform_posterior(x, t, LogLinear()))


def tiny(name: str, seed: int = 0) -> TokenNetwork:
    torch.manual_seed(seed)
    backbone = dataclasses.replace(
        PLAIN, width=32, conditioning=32, activation="relu2", position="learned", position_scale=0.1
    )
    config = DenoiserConfig(vocab_size=VOCAB, length=LENGTH, backbone=backbone)
    net = family(name).network(config)
    assert isinstance(net, TokenNetwork)
    return net


# -- the two processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_what_a_position_says_of_itself_makes_the_exact_posterior(name: str) -> None:
    process = PROCESSES[name]
    tokens = LANGUAGE.passages.repeat(4, 1)
    t = torch.linspace(0.05, 0.95, 4, dtype=torch.float64).repeat_interleave(27)
    x = process.corrupt(tokens, t, uniforms(2, len(tokens), LENGTH))
    found = di4c.informed(exact_teacher(name)(x, t), x, process.gain(x, t)).log_probs().exp()
    exact = torch.einsum("bp,plk->blk", passage_weights(name, x, t), LANGUAGE.onehot)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_way_back_is_bayes(name: str) -> None:
    """x_s given x_t and x_0 has the weights q(x_s | x_0) q(x_t | x_s)."""
    n, schedule = 100_000, LogLinear()
    t, s = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    uniform = ((torch.arange(n) + 0.5) / n)[:, None].double()
    alpha_s, ratio = float(schedule.alpha(s)), float(schedule.alpha(t) / schedule.alpha(s))
    states = VOCAB + (name == "di4c")
    eye = torch.eye(states, dtype=torch.float64)
    rest = eye[MASK] if name == "di4c" else torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    for clean in range(VOCAB):
        for noisy in {clean, MASK} if name == "di4c" else range(VOCAB):
            x, known = torch.full((n, 1), noisy), torch.full((n, 1), clean)
            found = PROCESSES[name].back(x, known, t.expand(n), s.expand(n), uniform)
            weights = (alpha_s * eye[clean] + (1 - alpha_s) * rest) * (ratio * eye + (1 - ratio) * rest)[
                :, noisy
            ]
            counts = torch.bincount(found.flatten(), minlength=states).double() / n
            torch.testing.assert_close(counts, weights / weights.sum(), atol=1e-4, rtol=0.0)


# -- what is compared --------------------------------------------------------------------------------------------


def test_compared_in_parts_as_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    b, m, k, length, v = 3, 4, 5, 6, 7
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(b * m, length, v, generator=gen, dtype=torch.float64)
    tokens = torch.randint(v, (b, k, length), generator=gen)
    probs = torch.randn(b, length, v, generator=gen).double().softmax(-1)
    target = Posterior(probs.log(), lambda hidden: hidden, torch.eye(v))
    given = OneHot(tokens[:, 0], v)

    own = logits.clone().requires_grad_()
    log_p = own.view(b, m, length, v).log_softmax(-1)
    passages = (
        log_p[:, :, None]
        .expand(-1, -1, k, -1, -1)
        .gather(-1, tokens[:, None, ..., None].expand(-1, m, -1, -1, 1))
    )
    log_mean = log_p.exp().mean(1).log()
    marginal = log_mean[:, None].expand(-1, k, -1, -1).gather(-1, tokens[..., None]).squeeze(-1).sum(-1)
    want = (
        marginal - passages.squeeze(-1).sum(-1).exp().mean(1).log(),
        torch.stack(
            [(probs * (probs.log() - log_mean)).sum(-1), -log_mean.gather(-1, tokens[:, 0, :, None])[..., 0]]
        ),
        (probs[:, None] * (probs.log()[:, None] - log_p)).sum(-1).mean(1),
    )
    (slope,) = torch.autograd.grad(sum((part.square().sum() for part in want), torch.zeros(())), own)
    for chunk in (2**24, 3 * m * v):  # all at once, and three positions at a time
        monkeypatch.setattr(di4c, "CHUNK_ELEMENTS", chunk)
        mine = logits.clone().requires_grad_()
        found = di4c.compare(Posterior(mine, lambda hidden: hidden, torch.eye(v)), m, tokens, [target, given])
        for a, w in zip(found, want, strict=True):
            torch.testing.assert_close(a, w)
        (got,) = torch.autograd.grad(sum((part.square().sum() for part in found), torch.zeros(())), mine)
        torch.testing.assert_close(got, slope)


def test_the_loss_is_least_where_the_mixture_is_the_law() -> None:
    """There its gradient vanishes, and it is the multi-information below what the product of the marginals has.

    First and last word are independent given the middle one, whose chances are .28, .37 and .35: a hundred latents,
    each of which knows the middle word, are the law itself. So are a thousand passages, in place of draws.
    """
    thousand = LANGUAGE.passages.repeat_interleave((1000 * LANGUAGE.probs).round().long(), 0)
    assert len(thousand) == 1000
    middle = torch.tensor([0] * 28 + [1] * 37 + [2] * 35)
    joint = torch.einsum("p,pi,pjk->ijk", LANGUAGE.probs, LANGUAGE.onehot[:, 1], LANGUAGE.onehot)
    given = joint / joint.sum(-1, keepdim=True)  # of the middle word: (3, L, V)
    start = given[middle].clamp_min(1e-12).log()
    target = Posterior(MARGINALS.log()[None], lambda hidden: hidden, EYE)

    def loss(logits: Tensor, data: float = 1.0) -> Tensor:
        mixture = Posterior(logits, lambda hidden: hidden, EYE)
        correlation, marginals, _ = di4c.compare(mixture, len(logits), thousand[None], [target])
        return data * correlation.mean() + marginals.sum()

    assert float(loss(start)) == pytest.approx(-CORRELATION, abs=1e-5)
    product = MARGINALS.log().expand(100, -1, -1)
    assert float(loss(product)) == pytest.approx(0.0, abs=1e-5)
    for data in (1.0, 0.3):
        logits = start.clone().requires_grad_()
        value = loss(logits, data)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.abs().max() < 1e-6
        for seed in range(5):
            noise = torch.randn(
                start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            assert loss(start + 0.1 * noise, data) > value + 1e-5
            assert loss(start + 0.1 * noise[:1], data) > value + 1e-5  # all latents alike


@pytest.mark.parametrize("name", PROCESSES)
def test_the_teachers_step_and_the_students_way_make_the_law(name: str) -> None:
    """Of an exact teacher and an exact student, to the error of one short step; the marginals too."""
    n, m, process = 3000, 8, PROCESSES[name]
    x = torch.full((n, LENGTH), MASK) if name == "di4c" else torch.tensor([0, 2, 1]).expand(n, -1)
    t = torch.full((n,), 0.9, dtype=torch.float64)
    known = di4c.informed(exact_teacher(name)(x, t), x, process.gain(x, t))
    latents = uniforms(n, m, seed=1)
    composed, passages = di4c.compose(
        exact_mixture(name), known, process, x, t, t - 1 / 64, latents, uniforms(3, n, m, LENGTH, seed=2)
    )
    exact = passage_weights(name, x[:1], t[:1])[0]
    found = frequencies(passages.flatten(0, 1)) / (n * m)
    assert float((found - exact).abs().sum() / 2) < 0.02
    marginals = di4c.Averaged(composed, m).probs_at(slice(0, n * LENGTH)).view(n, LENGTH, VOCAB).mean(0)
    torch.testing.assert_close(
        marginals, torch.einsum("p,plk->lk", exact, LANGUAGE.onehot), atol=0.01, rtol=0.0
    )


def test_a_loss_from_its_draws() -> None:
    """Worked out one passage and one latent at a time."""
    n, config = 6, di4c.Di4CConfig(latents=2, steps=4, near=0.2, data=0.7)
    process, m = PROCESSES["di4c"], config.latents
    tokens = LANGUAGE.sample(n, torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.15, 0.4, 0.6, 0.9, 1.0], dtype=torch.float64)
    uniform = uniforms(di4c.planes(config), n, LENGTH, seed=4)
    table = torch.randn(8, LENGTH, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def answer(x: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        """Logits that depend on all that a student reads."""
        bumps = (7 * latent[:, None] + x.sum(-1, keepdim=True) + t[:, None] * torch.arange(8)).sin()
        return torch.einsum("bi,ilk->blk", bumps, table)

    def student(x: Tensor, t: Tensor, latent: Tensor) -> Posterior:
        return Posterior(answer(x, t, latent), lambda hidden: hidden, EYE)

    teacher = exact_teacher("di4c")
    found = di4c.losses(student, student, teacher, process, config, tokens, t, uniform)

    def posterior(logits: Tensor, x: Tensor) -> Tensor:
        return torch.where(
            (x == MASK)[:, None], logits.softmax(-1), (x[:, None] == torch.arange(VOCAB)).double()
        )

    def draw(probs: Tensor, u: Tensor) -> Tensor:
        return (probs.cumsum(-1) <= u[:, None]).sum(-1)

    for i in range(n):
        x = torch.where(uniform[0, i] < 1 - LogLinear().alpha(t[i]), MASK, tokens[i])
        known = masked_posterior(x[None])[0]
        s = t[i] - min(0.25, float(t[i]) / 2)
        opens = (LogLinear().alpha(s) - LogLinear().alpha(t[i])) / LogLinear().noise(t[i])
        parts, targets, passages = [], [], []
        for j in range(m):
            latent, other = ((j + uniform[plane, i, 0]) / m for plane in (2, 3))
            parts.append(posterior(answer(x[None], t[i, None], latent[None])[0], x))
            guess = draw(known, uniform[4 + j, i])
            z = torch.where((x == MASK) & (uniform[4 + m + j, i] < opens), guess, x)
            targets.append(posterior(answer(z[None], s[None], other[None])[0], z))
            passages.append(draw(targets[-1], uniform[4 + 2 * m + j, i]))
        p, r = torch.stack(parts), torch.stack(targets).mean(0)

        def correlation(w: Tensor, p: Tensor = p) -> Tensor:
            own = p[:, torch.arange(LENGTH), w]
            return own.mean(0).log().sum() - own.prod(-1).mean().log()

        def kl(a: Tensor, b: Tensor) -> Tensor:
            return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)

        want = 0.7 * torch.sigmoid(20 * (t[i] - 0.5)) * correlation(tokens[i]) + kl(known, p.mean(0)).sum()
        if t[i] < 0.2:
            want = want + torch.stack([kl(known, part) for part in parts]).mean(0).sum()
        else:
            want = want + torch.stack([correlation(w) for w in passages]).mean() + kl(r, p.mean(0)).sum()
        torch.testing.assert_close(found[i].sum(), want, atol=1e-5, rtol=1e-5)


def test_small_times_have_their_share() -> None:
    config = di4c.Di4CConfig(near=0.1, near_share=0.4)
    objective = di4c.Di4CObjective(config, tiny("di4c"), PROCESSES["di4c"])
    t = objective.draw(10_000, torch.Generator().manual_seed(0))["t"]
    assert float((t < 0.1).double().mean()) == pytest.approx(0.4, abs=0.002)
    assert 0.001 <= float(t.min()) < 0.002
    assert 0.999 < float(t.max()) <= 1
    for low, high, share in ((0.0, 0.05, 0.2), (0.1, 0.55, 0.3), (0.55, 1.0, 0.3)):
        assert float(((t >= low) & (t < high)).double().mean()) == pytest.approx(share, abs=0.01)


# -- what is learnt ----------------------------------------------------------------------------------------------


def best_product() -> float:
    """Least total variation of a product of three laws from the language, by descent from many starts."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(100, LENGTH, VOCAB, generator=gen, dtype=torch.float64)
    logits[0] = MARGINALS.log()
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.05)
    at = torch.arange(LENGTH)
    least = math.inf
    for i in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 400)
        laws = logits.softmax(-1)[:, at, LANGUAGE.passages].prod(-1)
        off = (laws - LANGUAGE.probs).abs().sum(-1) / 2
        least = min(least, float(off.detach().min()))
        optimizer.zero_grad()
        off.sum().backward()
        optimizer.step()
    return least


def learnt(name: str, config: di4c.Di4CConfig, steps: int = 400, batch: int = 64) -> TokenNetwork:
    """A student of an exact teacher, from no weights."""
    net = tiny(name)
    objective = di4c.Di4CObjective(config, net, PROCESSES[name])
    objective.teacher = exact_teacher(name)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    gen = torch.Generator().manual_seed(0)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min((i + 1) / 20, 2 * (1 - i / steps), 1)
        noise = torch.rand(batch, di4c.planes(config), LENGTH, generator=gen, dtype=torch.float64)
        loss = objective.losses(net, LANGUAGE.sample(batch, gen), noise, objective.draw(batch, gen))
        loss.sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


@torch.no_grad()
def one_step_law(name: str, net: TokenNetwork) -> Tensor:
    """Of the 27 passages, λ integrated and the first tokens summed over."""
    starts = torch.full((1, LENGTH), MASK) if name == "di4c" else LANGUAGE.passages
    n = 2048 // len(starts)
    latent = ((torch.arange(n) + 0.5) / n).repeat_interleave(len(starts))
    x = starts.repeat(n, 1)
    p = net(x, torch.ones(len(x)), latent=latent).log_probs().double().exp()
    if name == "duo-di4c":
        p = posterior_weights(p, x, 0.0, 1.0, LogLinear())
        p = p / p.sum(-1, keepdim=True)
    return torch.stack([p[:, torch.arange(LENGTH), w].prod(-1).mean() for w in LANGUAGE.passages])


def written(name: str, net: TokenNetwork, n: int, steps: int) -> Tensor:
    return family(name).sample(net, Ask(n, LENGTH, steps, 0, 0), **family(name).options).tokens


@pytest.mark.slow
def test_it_writes_in_one_step_what_no_product_can() -> None:
    product = best_product()
    assert product <= distance(FACTORISED)
    net = learnt("di4c", di4c.Di4CConfig(latents=8, steps=8, data=1.0, near_share=0.1))
    law = one_step_law("di4c", net)
    assert distance(law) < product / 2
    # The sampler draws from that law, and in more steps it does no worse.
    tokens = written("di4c", net, 20_000, 1)
    assert float((frequencies(tokens) / 20_000 - law).abs().sum() / 2) < 0.03
    assert LANGUAGE.total_variation(written("di4c", net, 20_000, 4)) < product / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"), [("di4c", 0.0), ("duo-di4c", 1.0)], ids=["from the teacher alone", "uniform"]
)
def test_so_it_does_from_its_teacher_alone_and_of_uniform_states(name: str, data: float) -> None:
    net = learnt(name, di4c.Di4CConfig(latents=16, steps=4 if data == 0 else 8, data=data, near_share=0.1))
    assert distance(one_step_law(name, net)) < 0.6 * best_product()


# -- how it is read and written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_each_step_draws_a_latent_for_each_passage(name: str) -> None:
    seen: list[Tensor] = []
    net = tiny(name)
    unzero(net)
    net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["latent"]), with_kwargs=True
    )
    written(name, net, 50, 1)
    (one,) = seen
    assert one.shape == (50,)
    assert len(one.unique()) == 50
    assert float(one.min()) < 0.1
    assert float(one.max()) > 0.9
    seen.clear()
    written(name, net, 50, 3)
    assert len(torch.cat(seen).unique()) == 150
    assert torch.equal(seen[0], one)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_parameter_learns(name: str) -> None:
    net = tiny(name)
    unzero(net)
    x = LANGUAGE.passages[:8].clone()
    if name == "di4c":
        x[:, 0] = MASK
    net(x, torch.rand(8), latent=torch.rand(8)).cross_entropy(LANGUAGE.passages[:8]).mean().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


# -- through the commands ----------------------------------------------------------------------------------------


def over(name: str) -> dict[str, Any]:
    return {"objective": name, "train.steps": 6, "train.save_every": 3, "train.eval_every": 3}


FEW = {"di4c.latents": 3, "di4c.steps": 8}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: trained(folder / name, settings(over(name))) for name in TEACHERS.values()}


def student_config(name: str, teacher: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    values = map_values(teacher, {**over(name), **FEW, **(changes or {})}) | {"objective": name}
    return from_dict(RunConfig, values)


@pytest.fixture(scope="module")
def students(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {name: trained(folder / name, student_config(name, teachers[TEACHERS[name]])) for name in TEACHERS}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_starts_as_its_teacher_and_learns_to_read_latents(
    name: str, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    teacher = FlowLM.from_pretrained(teachers[TEACHERS[name]])
    student = begin(tmp_path / "run", student_config(name, teachers[TEACHERS[name]])).model
    x = torch.randint(teacher.tokenizer.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0))
    t, latent = torch.linspace(0.1, 0.9, 8), torch.linspace(0, 0.99, 8)
    with torch.no_grad():
        want = teacher.denoiser(x, t).log_probs()
        assert torch.equal(student.eval()(x, t, latent=latent).log_probs(), want)
        done = FlowLM.from_pretrained(students[name])
        assert done.family.label == family(name).label
        a, b = (done.denoiser(x, t, latent=at).log_probs() for at in (latent, 1 - latent))
    assert (a - b).abs().max() > 1e-5


@pytest.mark.parametrize("name", TEACHERS)
def test_a_resumed_student_is_the_same(name: str, students: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(students[name], run)
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    assert command("distill", "--resume", run) == 0
    mine, whole = content(run), content(students[name])
    assert mine.keys() == whole.keys()
    assert [path for path in whole if mine[path] != whole[path]] == []


@pytest.mark.parametrize("name", TEACHERS)
def test_a_passage_depends_on_its_number_alone(name: str, students: dict[str, Path]) -> None:
    model = FlowLM.from_pretrained(students[name])

    def tokens(num: int, **options: Any) -> Tensor:
        return torch.cat([part.tokens for part in model.generate_in_parts(num, 5, **options)])

    whole = tokens(7, seed=2)
    assert torch.equal(whole, tokens(7, seed=2, batch=2))
    assert torch.equal(whole[4:], tokens(3, seed=2, first=4))
    assert not torch.equal(whole, tokens(7, seed=3))


@pytest.mark.parametrize("name", TEACHERS)
def test_on_the_command_line(
    name: str, students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert command("export", students[name], "--out", out) == 0
    for place in (students[name], out):
        assert command("generate", place, "--num", "2", "--steps", "1") == 0
    assert command("info", students[name]) == 0
    assert f"{family(name).label} ({family(name).about})" in said(capsys)
    rows_file = tmp_path / "rows.json"
    assert command("evaluate", out, "--steps", "1,2", "--num", "8", "--json", rows_file) == 0
    rows = [row for row in json.loads(rows_file.read_text()) if row["nfe"]]
    assert [(row["nfe"], row["model"]) for row in rows] == [(1, family(name).label), (2, family(name).label)]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_batch_may_be_split_and_computed_in_bfloat16(
    name: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for number, changes in enumerate(({}, {"train.micro_batch": 3}, {"train.dtype": "bfloat16"})):
        config = student_config(name, teachers[TEACHERS[name]], {"train.steps": 2, **changes})
        trainer = begin(tmp_path / str(number), config)
        found.append([trainer.optimize()[0], trainer.held_out().loss])
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=0.05)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_needs_a_teacher_of_its_kind(
    name: str, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=f"objective = '{name}' learns from a teacher alone: add --teacher RUN"
    ):
        trained(tmp_path / "a", settings({**over(name), **FEW}))
    other = next(kind for kind in teachers if kind != TEACHERS[name])
    for wrong, kind in ((teachers[other], other), (students[name], name)):
        with pytest.raises(
            ValueError,
            match=f"is of the family '{kind}', and '{name}' needs a teacher with the network of '{TEACHERS[name]}'",
        ):
            begin(tmp_path / "b", student_config(name, wrong))
    # A student in rounds, without latents, is a teacher as good.
    few = {"mdlm": "sdtt", "duo": "duo-dcd"}[TEACHERS[name]]
    family(name).check_source(settings(), DenoiserConfig(family=few), "x")


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("latents", 1, "di4c.latents = 1: a mixture of fewer than two is a product"),
        ("steps", 1, "di4c.steps = 1 is too few: the teacher would take the whole way in one step"),
        ("near", 0.0, r"di4c.near must lie in \(0, 1\), got 0.0"),
        ("near_share", 1.0, r"di4c.near_share must lie in \(0, 1\), got 1.0"),
        ("data", 1.5, r"di4c.data must lie in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_mean_nothing(option: str, value: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        settings({f"di4c.{option}": value})
