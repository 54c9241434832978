"""The denoiser: every choice gives a posterior, reads its times, and has one diagonal."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.path import DenseNoise, LowRankNoise, corrupt, evidence_weights
from test_backbone import PLAIN, unzero

B, L, D, V = 3, 5, 16, 40
BACKBONE = PLAIN
CHOICES: list[dict[str, Any]] = [
    {},
    {"clock": "uniform"},
    {"logit_softcap": 3.0},
    {"tied_head": True},
    {"input_scaling": True},
    {"local_posterior": False},
    {"prior_rank": 0},
    {"local_tokens": 7},
    {"head_start": 0.0},
    {"head_start": 0.5},
    {"tied_head": True, "input_scaling": True, "logit_softcap": 3.0},
    {"backbone": dataclasses.replace(BACKBONE, norm="rms", qk_norm=True, attention_softcap=5.0)},
    {"backbone": dataclasses.replace(BACKBONE, position="learned", activation="relu2", time_scale=10.0)},
]
TIMES: dict[str, Tensor | float] = {
    "float": 0.6,
    "scalar": torch.tensor(0.6),
    "rows": torch.tensor([0.0, 0.6, 1.0]),
    "float64": torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64),
    "tokens": torch.linspace(0, 1, B * L).view(B, L),
}


def label(choice: dict[str, Any]) -> str:
    keys = {k: "…" if k == "backbone" else v for k, v in choice.items()}
    return ",".join(f"{k}={v}" for k, v in keys.items()) or "default"


def make(two_times: bool, **choice: Any) -> Denoiser:
    torch.manual_seed(0)
    settings = {"vocab_size": V, "length": L, "backbone": BACKBONE, **choice}
    if not two_times:
        settings.pop("head_start", None)  # of flow maps alone
    net = Denoiser(DenoiserConfig(two_times=two_times, **settings))
    unzero(net)
    return net


def state(seed: int = 0) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed))


def call(net: Denoiser, y: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """Log-probabilities of δ_{s,t}, or of D_s where the network has one time."""
    posterior = net(y, s, t) if net.config.two_times else net(y, s)
    return posterior.log_probs()


each_choice = pytest.mark.parametrize("choice", CHOICES, ids=label)
each_arity = pytest.mark.parametrize("two_times", [False, True], ids=["one time", "two times"])


@each_choice
@each_arity
def test_finite_and_every_parameter_learns(two_times: bool, choice: dict[str, Any]) -> None:
    net = make(two_times, **choice)
    tokens = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(2))
    s, t = torch.tensor([0.0, 0.5, 0.9]), torch.tensor([1.0, 0.7, 0.9])
    law = net.noise_law()
    y = corrupt(tokens, s, net.embedding, law(torch.randn(B, L, law.width)))
    posterior = net(y, s, t) if two_times else net(y, s)
    assert posterior.shape == (B, L)
    posterior.cross_entropy(tokens).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@each_choice
@each_arity
@pytest.mark.parametrize("kind", TIMES)
def test_shapes_of_times_agree(kind: str, two_times: bool, choice: dict[str, Any]) -> None:
    """A time means the same to a token however it is given."""
    net, y, s = make(two_times, **choice), state(), TIMES[kind]
    t = 1.0 if kind == "float" else torch.ones_like(torch.as_tensor(s))
    out = call(net, y, s, t)
    assert out.shape == (B, L, V)
    assert torch.isfinite(out).all()
    grid = torch.as_tensor(s, dtype=torch.float32)
    grid = (grid if grid.dim() else grid.expand(B)).reshape(B, -1).expand(B, L).contiguous()
    torch.testing.assert_close(call(net, y, grid, torch.ones(B, L)), out, atol=1e-5, rtol=1e-4)


@each_choice
@each_arity
def test_times_are_read(two_times: bool, choice: dict[str, Any]) -> None:
    net, y = make(two_times, **choice), state()
    out = call(net, y, 0.4, 0.9)
    assert (call(net, y, 0.5, 0.9) - out).abs().max() > 1e-4
    if two_times:
        assert (call(net, y, 0.4, 0.7) - out).abs().max() > 1e-4


@each_choice
@pytest.mark.parametrize("kind", TIMES)
def test_the_diagonal_is_one(kind: str, choice: dict[str, Any]) -> None:
    """δ_{t,t} = D_t, the call with one time."""
    net, y, t = make(True, **choice), state(), TIMES[kind]
    torch.testing.assert_close(net(y, t, t).log_probs(), net(y, t).log_probs(), atol=0, rtol=0)


@each_choice
@each_arity
def test_rows_are_independent(two_times: bool, choice: dict[str, Any]) -> None:
    net, y = make(two_times, **choice), state()
    s, t = torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0.3, 0.6, 1.0])
    out = call(net, y, s, t)
    torch.testing.assert_close(call(net, y[1:2], s[1:2], t[1:2]), out[1:2], atol=1e-5, rtol=1e-4)
    y2 = y.clone()
    y2[0] += 1
    torch.testing.assert_close(call(net, y2, s, t)[1:], out[1:], atol=0, rtol=0)


@each_arity
def test_a_new_denoiser_is_uniform(two_times: bool) -> None:
    net = Denoiser(DenoiserConfig(vocab_size=V, length=L, two_times=two_times, backbone=BACKBONE))
    out = call(net, state(), 0.3, 0.8)
    torch.testing.assert_close(out, torch.full_like(out, -torch.tensor(float(V)).log()))


def as_student(teacher: Denoiser, head_start: float) -> Denoiser:
    config = dataclasses.replace(teacher.config, two_times=True, head_start=head_start)
    student = Denoiser(config)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == (
        {"end_embedding", "mean"} if head_start else {"end_embedding"}
    )
    return student


def test_a_student_starts_as_its_teacher() -> None:
    """The second time's last layer is zero: with one-time weights and no head start every δ_{s,t} is D_s."""
    teacher, y = make(False), state()
    student = as_student(teacher, 0.0)
    torch.testing.assert_close(student(y, 0.3, 0.9).log_probs(), teacher(y, 0.3).log_probs())


@pytest.mark.parametrize("times", ["scalars", "rows", "tokens"])
def test_the_head_start_is_a_step_towards_the_mean(times: str) -> None:
    """With one-time weights δ_{s,t}(y) = D_u(((1-u) y + (u-s) mean)/(1-s)), u a share of the way in clock time."""
    teacher, y = make(False), state()
    student = as_student(teacher, 0.25)
    tokens = torch.randint(0, V, (5000, L), generator=torch.Generator().manual_seed(4))
    student.set_mean(tokens)
    mean = teacher.embedding[tokens].mean(0)
    torch.testing.assert_close(student.mean.data, mean, atol=1e-5, rtol=1e-4)
    s, t = {
        "scalars": (torch.tensor(0.1), torch.tensor(1.0)),
        "rows": (torch.tensor([0.0, 0.3, 0.6]), torch.tensor([1.0, 0.9, 0.6])),
        "tokens": (torch.linspace(0, 0.5, B * L).view(B, L), torch.linspace(0.5, 1, B * L).view(B, L)),
    }[times]
    tau_s, tau_t = (teacher.clock.tau(x.double()) for x in (s, t))
    u = teacher.clock.time(0.75 * tau_s + 0.25 * tau_t)
    shape = {"scalars": (1, 1, 1), "rows": (B, 1, 1), "tokens": (B, L, 1)}[times]
    a, b = ((x.float()).view(shape) for x in (s, u))
    expected = teacher(((1 - b) * y + (b - a) * mean) / (1 - a), u.float())
    torch.testing.assert_close(student(y, s, t).log_probs(), expected.log_probs(), atol=2e-4, rtol=2e-4)


def test_from_noise_the_head_start_is_the_exact_first_step_of_the_flow() -> None:
    """D_0 is the law of each position's token: Euler's first step goes towards its mean from wherever it starts."""
    law, tokens = toy.LANGUAGE, toy.LANGUAGE.sample(200_000, torch.Generator().manual_seed(0))
    net = Denoiser(DenoiserConfig(vocab_size=toy.VOCAB, length=toy.LENGTH, two_times=True, head_start=0.25))
    net.set_mean(tokens)
    z = torch.randn(3, toy.LENGTH, toy.VOCAB, dtype=torch.float64)
    e = net.embedding.detach().double()
    u = net.clock.time(torch.tensor(0.25, dtype=torch.float64))
    exact = (1 - u) * z @ e + u * law.denoise(z, 0.0) @ e
    y, s = net.head_start((z @ e).float(), 0.0, 1.0)
    torch.testing.assert_close(y, exact.float(), atol=5e-3, rtol=0)
    torch.testing.assert_close(s, u.float().expand(3))


@pytest.mark.parametrize("vocab", [40, 310, 50_000])
def test_the_head_start_spares_a_state_near_the_data(vocab: int) -> None:
    """Where the clock rounds to 1 nothing moves; before, a step of a sixteenth is a small one."""
    net = Denoiser(
        DenoiserConfig(vocab_size=vocab, length=L, two_times=True, head_start=1 / 16, backbone=BACKBONE)
    )
    net.mean.data.normal_()
    y = state()
    for dtype in (torch.float32, torch.float64):
        for s in (0.8, 0.86, 0.9, 0.92, 0.9375, 0.95, 0.99, 1.0):
            u_state, u = net.head_start(y, torch.tensor(s, dtype=dtype), torch.tensor(1.0, dtype=dtype))
            assert u.dtype == dtype
            assert ((u >= s - 1e-7) & (u <= s + 0.1 * (1 - s) + 1e-7)).all(), (s, u)
            assert (u_state - y).abs().max() < 0.5


def test_tangents_in_state_and_times_are_finite_differences() -> None:
    """What Lagrangian and Eulerian targets take: forward-mode derivatives of δ_{s,t}(y), without gradient."""
    net = make(
        True, head_start=0.25, backbone=dataclasses.replace(BACKBONE, attention_backend="math")
    ).double()
    net.mean.data.normal_()
    y, s, t = state().double(), torch.full((B,), 0.35).double(), torch.full((B,), 0.75).double()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).double()

    def at(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return net(y, s, t).log_probs().double()

    one = torch.ones_like(s)
    for tangent in ((direction, 0 * one, 0 * one), (0 * y, one, 0 * one), (0 * y, 0 * one, one)):
        with torch.no_grad():
            _, got = torch.func.jvp(at, (y, s, t), tangent)
            h = 1e-3
            plus = at(*(a + h * b for a, b in zip((y, s, t), tangent)))
            minus = at(*(a - h * b for a, b in zip((y, s, t), tangent)))
        torch.testing.assert_close(got, (plus - minus) / (2 * h), atol=2e-2, rtol=2e-2)


def test_input_scaling_gives_unit_variance() -> None:
    """The state the blocks see has the scale of the noise at every time."""
    net = make(False, input_scaling=True, local_posterior=False)
    law = net.noise_law()
    tokens = torch.randint(0, V, (4000, L))
    seen: list[Tensor] = []
    net.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for t in (0.0, 0.5, 0.9, 1.0):
            y = corrupt(tokens, t, net.embedding, law(torch.randn(4000, L, law.width)))
            net(y, t)
            assert float(seen[-1].square().mean()) == pytest.approx(1, rel=0.05)


def test_the_local_posterior_follows_the_embedding() -> None:
    """Also after a fused optimizer's step, which leaves no mark on the tensor."""
    net, other, y = make(False), make(False), state()
    optimizer = torch.optim.AdamW([net.embedding], lr=0.5, fused=True)
    net(y, 0.5)
    net.embedding.grad = torch.ones_like(net.embedding)
    optimizer.step()
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(y, 0.5).log_probs(), other(y, 0.5).log_probs(), atol=0, rtol=0)


def test_what_follows_from_a_frozen_embedding_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = make(False), state()
    made = count_evidence(monkeypatch)
    want = net(y, 0.5).log_probs()
    with net.frozen_embedding():
        with net.frozen_embedding():
            torch.testing.assert_close(net(y, 0.5).log_probs(), want, atol=0, rtol=0)
        with torch.no_grad():
            net(y, 0.5)
        torch.testing.assert_close(net(y, 0.5).log_probs(), want, atol=0, rtol=0)
    assert len(made) == 2
    net(y, 0.5)
    assert len(made) == 3


def count_evidence(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the evidence's weights are made."""
    made: list[int] = []
    monkeypatch.setattr("flowlm.denoiser.evidence_weights", lambda e: made.append(1) or evidence_weights(e))
    return made


def test_without_gradients_it_is_kept_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = make(False), state()
    made = count_evidence(monkeypatch)
    with torch.no_grad():
        want = net(y, 0.5).log_probs()
        torch.testing.assert_close(net(y, 0.5).log_probs(), want, atol=0, rtol=0)
        assert net.noise_law() is net.noise_law()
    assert len(made) == 1
    # A law that no gradient passes is not handed to a step that needs one.
    assert net.noise_law() is not net.noise_law()


def fused_step(net: Denoiser) -> None:
    optimizer = torch.optim.AdamW([net.embedding], lr=0.5, fused=True)
    net(state(), 0.5).log_probs().square().sum().backward()
    net.embedding.grad = torch.ones_like(net.embedding)
    optimizer.step()


def other_weights() -> dict[str, Tensor]:
    return make(False).state_dict() | {"embedding": torch.randn(V, D)}


CHANGES: dict[str, Callable[[Denoiser], object]] = {
    "a fused optimizer": fused_step,
    "copy_": lambda net: net.embedding.copy_(torch.randn_like(net.embedding)),
    "an average": lambda net: torch._foreach_lerp_([net.embedding], [torch.randn(V, D)], 0.5),
    "loaded weights": lambda net: net.load_state_dict(other_weights()),
    "loaded weights, assigned": lambda net: net.load_state_dict(other_weights(), assign=True),
    "other data": lambda net: setattr(net.embedding, "data", torch.randn(V, D)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_kept_goes_with_the_embedding(name: str) -> None:
    net, fresh, y = make(False), make(False), state()
    with torch.no_grad():
        before = net(y, 0.5).log_probs()
    with torch.set_grad_enabled(name == "a fused optimizer"):
        CHANGES[name](net)
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        after = net(y, 0.5).log_probs()
        torch.testing.assert_close(after, fresh(y, 0.5).log_probs(), atol=0, rtol=0)
    assert not torch.equal(before, after)


def test_a_copy_keeps_nothing_of_the_first() -> None:
    net, y = make(False), state()
    with torch.no_grad():
        want = net(y, 0.5).log_probs()
        other = copy.deepcopy(net)
        net.embedding.mul_(2)
        torch.testing.assert_close(other(y, 0.5).log_probs(), want, atol=0, rtol=0)


def test_under_inference_mode() -> None:
    """Tensors made there have no version: nothing is kept, nothing breaks."""
    with torch.inference_mode():
        net, y = make(False), state()
        before = net(y, 0.5).log_probs()
        net.embedding.mul_(2)
        assert not torch.equal(net(y, 0.5).log_probs(), before)


def test_an_embedding_needs_a_scale() -> None:
    with pytest.raises(ValueError, match=r"model\.embedding_scale must be positive, got 0"):
        make(False, embedding_scale=0.0)


def test_a_head_start_is_for_flow_maps() -> None:
    with pytest.raises(ValueError, match=r"model\.head_start = 0\.5 is for flow maps"):
        Denoiser(DenoiserConfig(vocab_size=V, length=L, head_start=0.5, backbone=BACKBONE))


def test_a_head_start_is_a_share_of_the_way() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(
            ValueError, match=rf"model\.head_start is a share of the way in \[0, 1\), got {share}"
        ):
            make(True, head_start=share)


@pytest.mark.parametrize("choice", [{}, {"local_posterior": False, "head_start": 0.5}], ids=label)
def test_a_passage_beyond_the_known_positions_is_refused(choice: dict[str, Any]) -> None:
    rotary = dataclasses.replace(BACKBONE, position="rotary")
    net = make(True, backbone=rotary, **choice)
    with pytest.raises(ValueError, match=rf"{L + 1} tokens is longer than the {L} positions whose prior"):
        net(torch.randn(B, L + 1, D), 0.0, 1.0)
    free = make(True, backbone=rotary, prior_rank=0)
    assert free(torch.randn(B, L + 1, D), 0.0, 1.0).shape == (B, L + 1)


def test_a_prior_has_a_rank() -> None:
    with pytest.raises(ValueError, match=r"model\.prior_rank cannot be negative, got -1"):
        make(False, prior_rank=-1)


def test_tied_head_shares_the_embedding() -> None:
    net = make(False, tied_head=True)
    assert "head.weight" not in net.state_dict()
    hidden = torch.randn(2, D)
    torch.testing.assert_close(net.head(hidden), hidden @ net.embedding.T + net.head.bias)
    assert "head.weight" in make(False).state_dict()


def test_tied_head_follows_a_copy() -> None:
    """A deep copy (an average of the weights) ties its head to its own embedding."""
    import copy

    net = make(False, tied_head=True)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.embedding.add_(1.0)
    hidden = torch.randn(2, D)
    torch.testing.assert_close(twin.head(hidden), hidden @ twin.embedding.T + twin.head.bias)
    torch.testing.assert_close(net.head(hidden), hidden @ net.embedding.T + net.head.bias)


@pytest.mark.parametrize(("vocab", "law"), [(2 * D, DenseNoise), (2 * D + 1, LowRankNoise)])
def test_noise_law(vocab: int, law: type) -> None:
    assert type(make(False, vocab_size=vocab).noise_law()) is law


@pytest.mark.parametrize("choice", CHOICES, ids=label)
def test_autocast_keeps_answers_float32(choice: dict[str, Any]) -> None:
    net, y = make(True, **choice), state()
    with torch.autocast("cpu", torch.bfloat16):
        low = net(y, 0.3, 0.8)
        assert low.hidden.dtype == torch.bfloat16
        assert low.embed().dtype == torch.float32
    torch.testing.assert_close(low.log_probs(), net(y, 0.3, 0.8).log_probs(), atol=0.2, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 1}, "V must be at least 2"),
        ({"vocab_size": 0}, "V must be at least 2"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"clock": "cosine"}, "unknown clock 'cosine'"),
    ],
)
def test_config_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(False, **settings)


def test_one_time_has_no_flow_map() -> None:
    with pytest.raises(ValueError, match="built with one time"):
        make(False)(state(), 0.3, 0.8)
