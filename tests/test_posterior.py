"""The posterior: chunked work equals unchunked work, in values and gradients, and stays small."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm import posterior as module
from flowlm.backbone import BackboneConfig
from flowlm.clock import DecodingErrorClock
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.families import Objective
from flowlm.objectives import FlowMapObjective, FlowObjective
from flowlm.objectives.flow_map import FlowMapConfig
from flowlm.posterior import Head, Mixture, OneHot, Posterior, Stacked
from flowlm.samplers import sample
from helpers import LargestTensor

B, L, V, D = 3, 5, 11, 4


def make(seed: int = 0, softcap: float = 0.0, tied: bool = False) -> Posterior:
    gen = torch.Generator().manual_seed(seed)
    embedding = nn.Parameter(torch.randn(V, D, generator=gen))
    head = Head(D, V, softcap, embedding if tied else None)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=gen))
    hidden = torch.randn(B, L, D, generator=gen).requires_grad_()
    return Posterior(hidden, head, embedding)


def logits(p: Posterior) -> Tensor:
    return p.head(p.hidden)


IDS = torch.arange(B * L).reshape(B, L) % V
UNIFORM = torch.rand(B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
WEIGHT = torch.tensor([0.0, 0.25, 1.0])


def mixture() -> Mixture:
    return Mixture([(WEIGHT, make(1)), (1 - WEIGHT, make(2))])


def stacked() -> Stacked:
    """First row of the batch: data; second: one posterior; third: a mixture."""
    return Stacked([(L, OneHot(IDS[:1], V)), (L, make(1)[:1]), (L, Mixture([(WEIGHT[1:2], make(2)[:1])]))])


METHODS: dict[str, tuple[Callable[[Posterior], Tensor], Callable[[Posterior], Tensor]]] = {
    # name: (method, reference on whole logits)
    "log_probs": (lambda p: p.log_probs(), lambda p: logits(p).log_softmax(-1)),
    "embed": (lambda p: p.embed(), lambda p: logits(p).softmax(-1) @ p.embedding),
    "embed cold": (lambda p: p.embed(0.3), lambda p: (logits(p) / 0.3).softmax(-1) @ p.embedding),
    "hard": (
        lambda p: p.cross_entropy(IDS),
        lambda p: -logits(p).log_softmax(-1).gather(-1, IDS[..., None])[..., 0],
    ),
    "soft": (
        lambda p: p.cross_entropy(make(1)),
        lambda p: -(logits(make(1)).softmax(-1).detach() * logits(p).log_softmax(-1)).sum(-1),
    ),
    "mixture": (
        lambda p: p.cross_entropy(mixture()),
        lambda p: (
            -(
                (
                    WEIGHT[:, None, None] * logits(make(1)).softmax(-1)
                    + (1 - WEIGHT)[:, None, None] * logits(make(2)).softmax(-1)
                ).detach()
                * logits(p).log_softmax(-1)
            ).sum(-1)
        ),
    ),
    "stacked": (
        lambda p: p.cross_entropy(stacked()),
        lambda p: (
            -(
                torch.cat(
                    [
                        F.one_hot(IDS[:1], V).float(),
                        logits(make(1)).softmax(-1)[:1],
                        WEIGHT[1] * logits(make(2)).softmax(-1)[:1],
                    ]
                ).detach()
                * logits(p).log_softmax(-1)
            ).sum(-1)
        ),
    ),
    "argmax": (lambda p: p.tokens(), lambda p: logits(p).argmax(-1)),
    "categorical": (
        lambda p: p.tokens("categorical", UNIFORM, 0.7),
        lambda p: (
            (logits(p).double() / 0.7).softmax(-1).cumsum(-1) <= UNIFORM[..., None]
        ).sum(-1),
    ),
}  # fmt: skip


def values_and_gradients(fn: Callable[[Posterior], Tensor], p: Posterior) -> list[Tensor]:
    out = fn(p)
    if not out.is_floating_point():
        return [out]
    leaves = [p.hidden, p.embedding, *p.head.parameters()]  # type: ignore[attr-defined]
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads))]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("positions", [1, 4, 15, 1000])
@pytest.mark.parametrize("name", METHODS)
def test_chunks_change_nothing(
    name: str, positions: int, softcap: float, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any chunk length: the values and gradients of the whole-tensor formula."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", positions * V)
    method, reference = METHODS[name]
    out = values_and_gradients(method, make(softcap=softcap, tied=tied))
    expected = values_and_gradients(reference, make(softcap=softcap, tied=tied))
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_shapes_and_rows() -> None:
    p = make()
    assert p.shape == (B, L)
    assert p.log_probs().shape == (B, L, V)
    assert p.embed().shape == (B, L, D)
    assert p.tokens().shape == p.cross_entropy(IDS).shape == (B, L)
    torch.testing.assert_close(p[1:].embed(), p.embed()[1:])


def test_targets_carry_no_gradient() -> None:
    p, target = make(), make(1)
    p.cross_entropy(target).sum().backward()
    assert p.hidden.grad is not None
    assert target.hidden.grad is None
    assert all(q.grad is None for q in target.head.parameters())  # type: ignore[attr-defined]


def test_categorical_reaches_the_ends() -> None:
    p = make()
    low = p.tokens("categorical", torch.zeros(B, L, dtype=torch.float64))
    high = p.tokens("categorical", torch.full((B, L), 1 - 2**-53, dtype=torch.float64))
    assert not low.any()
    assert (high == V - 1).all()


def test_the_likeliest_token_needs_no_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = make(softcap=2.0)
    expected = posterior.log_probs().argmax(-1)

    def none(*args: object) -> Tensor:
        raise AssertionError("a pass over V for nothing")

    monkeypatch.setattr(torch, "tanh", none)
    assert torch.equal(posterior.tokens(), expected)
    # a head that is made of another and something else is asked as it is
    bias = torch.randn(V)
    other = Posterior(posterior.hidden, lambda h: posterior.head.uncapped(h) + bias, posterior.embedding)
    assert torch.equal(other.tokens(), other.log_probs().argmax(-1))


def test_softcap_bounds_logits() -> None:
    head = Head(D, V, softcap=2.0)
    nn.init.constant_(head.weight, 100.0)
    raw = Head(D, V)
    raw.load_state_dict(head.state_dict())
    hidden = torch.randn(2, 3, D)
    torch.testing.assert_close(head(hidden), 2 * torch.tanh(raw(hidden) / 2))
    assert head(hidden).abs().max() <= 2


def test_a_new_head_is_uniform() -> None:
    p = Posterior(torch.randn(B, L, D), Head(D, V), torch.randn(V, D))
    torch.testing.assert_close(p.log_probs(), torch.full((B, L, V), -math.log(V)))


def test_half_precision_hidden_states_give_float32_answers() -> None:
    p = make()
    low = Posterior(p.hidden.bfloat16(), p.head, p.embedding)
    for out in (low.log_probs(), low.embed(), low.cross_entropy(IDS)):
        assert out.dtype == torch.float32
    expected = logits(p).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(p.log_probs(), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.tokens("nucleus"), "unknown last-step rule 'nucleus'"),
        (lambda p: p.tokens("categorical"), "needs its uniform draws"),
    ],
)
def test_errors(call: Callable[[Posterior], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make())


# --- nothing of size B×L×V -----------------------------------------------------------------------


BIG_V, BIG_D, BIG_B, BIG_L = 4096, 32, 4, 16
WIDE = BIG_B * BIG_L * BIG_V


def big_denoiser(two_times: bool) -> Denoiser:
    backbone = BackboneConfig(width=BIG_D, depth=1, heads=2, conditioning=16)
    return Denoiser(
        DenoiserConfig(vocab_size=BIG_V, length=BIG_L, two_times=two_times, prior_rank=16, backbone=backbone)
    )


def backward(objective: Objective, model: Denoiser) -> None:
    objective.prepare(model)
    draws = objective.draw(BIG_B, torch.Generator().manual_seed(0))
    xi = torch.randn(BIG_B, BIG_L, objective.noise_width)
    tokens = torch.randint(0, BIG_V, (BIG_B, BIG_L))
    objective.losses(model, tokens, xi, draws).mean().backward()
    assert model.embedding.grad is not None


def flow_job() -> Callable[[], None]:
    objective, model = FlowObjective(DecodingErrorClock(BIG_V)), big_denoiser(False)
    return lambda: backward(objective, model)


def flow_map_job(**options: object) -> Callable[[], None]:
    config = FlowMapConfig(boundary=0.5, **options)  # type: ignore[arg-type]
    objective = FlowMapObjective(config, DecodingErrorClock(BIG_V), big_denoiser(False))
    model = big_denoiser(True)
    return lambda: backward(objective, model)


def sampling_job(two_times: bool, last: str) -> Callable[[], None]:
    model = big_denoiser(two_times)
    return lambda: sample(model, BIG_B, BIG_L, 3, seed=0, gamma=0.5 * two_times, last=last) and None


#: Each makes its clocks and networks first, and returns the work to be watched.
JOBS: dict[str, Callable[[], Callable[[], None]]] = {
    "flow": flow_job,
    "flow map, embedding trained": lambda: flow_map_job(freeze_embedding=False),
    "flow map, rollout": lambda: flow_map_job(boundary_target="teacher", rollout_steps=2),
    "sampling a flow": lambda: sampling_job(False, "argmax"),
    "sampling a flow map": lambda: sampling_job(True, "categorical"),
}


@pytest.mark.parametrize("job", JOBS)
def test_no_tensor_of_the_size_of_the_dense_state(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 8 * BIG_V)
    work = JOBS[job]()
    with LargestTensor() as largest:
        work()
    assert largest.numel == BIG_V * BIG_D, "nothing should be larger than the embedding"
    assert largest.numel < WIDE


def test_an_unchunked_posterior_would_be_seen() -> None:
    work = flow_job()
    with LargestTensor() as largest:
        work()
    assert largest.numel == WIDE
