"""What FLM and FMLM are compared with: other states, outputs, losses and weights of rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flowlm import FlowLM
from flowlm.card import export
from flowlm.config import read_run_config
from flowlm.objectives.weighting import BINS, LEAST, InverseWeights
from flowlm.path import IsotropicNoise, corrupt, evidence_gains, isotropic_evidence_weights
from flowlm.posterior import Head, Posterior, Regression
from flowlm.provenance import command_of, describe_run
from flowlm.training.loop import open_run
from helpers import begin, flm, map_settings, settings, silent, tensors, trained
from test_denoiser import D, L, V, make

# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["embedding", "random"])
def test_a_flow_on_embeddings(state: str, tmp_path: Path) -> None:
    """From training to a student's passages: rows of length 1 all along, those that are random as they were."""
    trainer = begin(tmp_path / "flm", settings({"model.state": state}))
    before = trainer.model.embedding.detach().clone()
    assert trainer.train().finished
    for name in ("model", "ema"):
        rows = tensors(tmp_path / "flm" / f"{name}.safetensors")["embedding"]
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
        assert torch.equal(rows, before) == (state == "random")
    student = trained(tmp_path / "fmlm", map_settings(tmp_path / "flm"))
    for run, steps in ((tmp_path / "flm", 3), (student, 1)):
        model = FlowLM.from_pretrained(run)
        assert model.denoiser.config.state == state
        assert len(model.generate(4, steps=steps, gamma=0.0 if steps == 1 else 0.5)) == 4


def test_its_noise_is_its_own() -> None:
    net = make(False, state="embedding")
    law = net.noise_law()
    xi = torch.randn(7, L, D)
    assert (type(law), law.width) == (IsotropicNoise, D)
    assert law(xi) is xi
    y = corrupt(torch.zeros(7, L, dtype=torch.long), 0.25, net.embedding, law(xi))
    torch.testing.assert_close(y, 0.75 * xi + 0.25 * net.embedding[0])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_its_evidence_is_the_likelihood(t: float) -> None:
    torch.manual_seed(0)
    embedding, y = F.normalize(torch.randn(23, 6), dim=-1), torch.randn(2, 3, 6)
    weight, offset = isotropic_evidence_weights(embedding)
    gain, offset_gain = evidence_gains(t, y)
    got = gain * (y @ weight.T) + offset_gain * offset
    want = torch.distributions.Normal(t * embedding, 1 - t).log_prob(y[..., None, :]).sum(-1)
    torch.testing.assert_close(got.log_softmax(-1), want.log_softmax(-1), atol=1e-4, rtol=1e-4)


# --- the local posterior of few tokens ------------------------------------------------------------


def test_few_tokens_are_told_apart(tmp_path: Path) -> None:
    """The most frequent ones of the text, the same after a resume, in a student and in an exported model."""
    run = trained(tmp_path / "flm", settings({"model.local_tokens": 5}))
    model = FlowLM.from_pretrained(run)
    kept = model.denoiser.local.tokens
    often = {model.tokenizer.decode([token]) for token in kept.tolist()}
    assert {"the", "."} <= often or {"the", "saw"} <= often
    assert len(kept) == 5
    assert len(model.denoiser.local.embedding) == 6
    student = trained(tmp_path / "fmlm", map_settings(run))
    export(student, tmp_path / "exported", dtype="int8")
    for folder in (student, tmp_path / "exported"):
        again = FlowLM.from_pretrained(folder)
        assert torch.equal(again.denoiser.local.tokens, kept)
        assert len(again.generate(3, steps=1)) == 3
    on = begin(tmp_path / "more", settings({"init": str(run), "train.steps": 1}))
    assert torch.equal(on.model.local.tokens, kept)


@pytest.mark.parametrize("kind", ["student", "alone", "flow"])
def test_runs_of_before_there_was_a_choice_go_on_as_they_were(kind: str, tmp_path: Path) -> None:
    """A student copied its teacher; without one a frozen embedding meant nothing, and to a flow nothing of it does."""
    over = {"train.save_every": 4, "train.steps": 8}
    copying = {"flow_map.diagonal_target": "teacher", "flow_map.freeze_embedding": True}
    run = trained(
        tmp_path / "run",
        {
            "student": lambda: map_settings(flm(), over | copying),
            "alone": lambda: settings({"objective": "flow-map", **over}),
            "flow": lambda: settings(over),
        }[kind](),
    )
    path = run / "config.toml"
    lines = path.read_text().splitlines(keepends=True)
    written = "".join(line for line in lines if not line.startswith("diagonal_target"))
    path.write_text(written.replace("freeze_embedding = false", "freeze_embedding = true"))
    before = read_run_config(run).flow_map
    assert (before.diagonal_target, before.freeze_embedding) == (
        ("teacher", True) if kind == "student" else ("data", False)
    )
    assert kind == "student" or "flow-map" not in command_of(run).replace("objective flow-map", "")
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    trainer = open_run(run, say=silent)
    assert trainer.config.flow_map == before
    assert trainer.train().finished


def test_runs_of_before_tell_all_apart(tmp_path: Path) -> None:
    """A run that was begun when there was no choice goes on, and is loaded, as it was."""
    run = trained(tmp_path / "flm", settings({"model.local_tokens": 0, "train.save_every": 4}))
    for path in (run / "config.toml", run / "config.json", *run.glob("checkpoints/*/config.json")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "local_tokens" not in line))
    assert describe_run(run)["config"]["model"]["local_tokens"] == 0  # what makes it again is what made it
    model = FlowLM.from_pretrained(run)
    assert (model.denoiser.config.local_tokens, model.denoiser.local.partial) == (0, False)
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    assert open_run(run, say=silent).train().finished
    assert not FlowLM.from_pretrained(trained(tmp_path / "fmlm", map_settings(run))).denoiser.local.partial
    assert read_run_config(trained(tmp_path / "ar", settings({"objective": "ar"}))).objective == "ar"


def test_how_many_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"model\.local_tokens cannot be negative, got -1"):
        make(False, local_tokens=-1)


# --- outputs and losses ---------------------------------------------------------------------------


def posterior(kind: type[Posterior]) -> tuple[Posterior, torch.Tensor]:
    """Of a random head; and what its logits are."""
    torch.manual_seed(0)
    head = Head(D, V)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, L, D)
    return kind(hidden, head, torch.randn(V, D)), head(hidden).detach()


@pytest.mark.parametrize("kind", [Posterior, Regression])
def test_squared_errors_of_tokens(kind: type[Posterior]) -> None:
    found, logits = posterior(kind)
    mean = logits.softmax(-1) if kind is Posterior else logits
    tokens = torch.randint(0, V, (2, L))
    want = (mean - F.one_hot(tokens, V)).square().sum(-1)
    torch.testing.assert_close(found.squared_error(tokens), want)
    torch.testing.assert_close(found.embed(), mean @ found.embedding)
    torch.testing.assert_close(found[:1].embed(), (mean @ found.embedding)[:1])
    assert torch.equal(found.tokens(), logits.argmax(-1))


def test_a_regression_is_no_distribution() -> None:
    found, _ = posterior(Regression)
    with pytest.raises(ValueError, match=r"temperature = 0\.5 is of probabilities.*use temperature = 1"):
        found.embed(0.5)
    with pytest.raises(ValueError, match="last = 'categorical' is of probabilities"):
        found.tokens("categorical", torch.rand(2, L))
    with pytest.raises(ValueError, match=r"use flow\.loss = 'squared-error'"):
        found.cross_entropy(torch.zeros(2, L, dtype=torch.long))
    for ask in (found.log_probs, lambda: found.log_probs_at(slice(0, 2))):
        with pytest.raises(ValueError, match="a log-probability is of probabilities"):
            ask()


@pytest.mark.parametrize("output", ["softmax", "linear"])
def test_a_flow_by_squared_errors(output: str, tmp_path: Path) -> None:
    over = {"model.output": output, "flow.loss": "squared-error", "train.steps": 40, "train.eval_every": 20}
    trainer = begin(tmp_path / "flm", settings(over))
    before = trainer.held_out().loss
    assert trainer.train().held_out < 0.95 * before <= 1.05
    assert len(FlowLM.from_pretrained(tmp_path / "flm").generate(4, steps=3)) == 4
    if output == "linear":
        with pytest.raises(ValueError, match=r"was trained with model\.output = 'linear'"):
            begin(tmp_path / "fmlm", map_settings(tmp_path / "flm"))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"flow.loss": "mse"}, r"flow\.loss = 'mse': use 'cross-entropy' or 'squared-error'"),
        ({"model.output": "linear"}, r"with flow\.loss = 'squared-error' alone"),
        (
            {"model.output": "linear", "flow.loss": "squared-error", "objective": "flow-map"},
            "is a regression, for objective = 'flow'",
        ),
        ({"model.state": "embedding", "objective": "mdlm"}, r"model\.state = 'embedding' is for flows"),
        ({"model.output": "linear", "objective": "ar"}, r"model\.output = 'linear' is for flows"),
    ],
)
def test_what_means_nothing(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(over)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"state": "dense"}, r"model\.state = 'dense': use 'one-hot', 'embedding', 'random'"),
        ({"output": "tanh"}, r"model\.output = 'tanh': use 'softmax', 'linear'"),
        ({"state": "random", "input_scaling": True}, r"model\.input_scaling is for the one-hot state"),
    ],
)
def test_no_such_network(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(False, **choice)


def test_one_embedding_has_one_noise(tmp_path: Path) -> None:
    trained(tmp_path / "flm", settings({"model.state": "embedding", "train.steps": 2}))
    with pytest.raises(ValueError, match=r"use flow_map\.freeze_embedding = true"):
        begin(tmp_path / "fmlm", map_settings(tmp_path / "flm", {"flow_map.diagonal_target": "teacher"}))


# --- weights of rows ------------------------------------------------------------------------------


def test_weights_are_inverse_losses() -> None:
    weights = InverseWeights()
    s, t = torch.tensor([0.05, 0.05, 0.3, 0.3]), torch.tensor([0.05, 0.95, 0.3, 0.9])
    assert torch.equal(weights.of(s, t), torch.ones(4))
    weights.observe(s[:2], t[:2], torch.tensor([4.0, 2.0]))
    weights.observe(s[2:], t[2:], torch.tensor([1.0, 0.5]))
    assert torch.equal(weights.of(s, t), torch.ones(4))  # micro-batches of one step are weighted alike
    weights.step(list)
    found = weights.of(s, t)
    torch.testing.assert_close(found * torch.tensor([4.0, 2.0, 1.0, 0.5]), found[0] * 4 * torch.ones(4))
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    # what no row was seen of counts as all of them together
    (unseen,) = weights.of(torch.tensor([0.6]), torch.tensor([0.6]))
    torch.testing.assert_close(unseen, found[0] * 4 / 1.875)


def test_weights_forget_and_have_a_limit() -> None:
    weights = InverseWeights()
    s = torch.arange(BINS) / BINS
    for _ in range(400):
        weights.observe(s, s, torch.cat([torch.full((BINS - 1,), 1.0), torch.zeros(1)]))
        weights.step(list)
    found = weights.of(s, s)
    mean = (BINS - 1) / BINS
    torch.testing.assert_close(found[-1] / found[0], torch.tensor(1 / (LEAST * mean)), rtol=1e-3, atol=0)
    for _ in range(400):
        weights.observe(s, s, torch.ones(BINS))
        weights.step(list)
    torch.testing.assert_close(weights.of(s, s), torch.ones(BINS), rtol=1e-2, atol=0)


def test_weights_are_of_training_alone(tmp_path: Path) -> None:
    """Held-out losses are those without weights, and accumulation changes nothing."""
    teacher = trained(tmp_path / "flm", settings({"train.steps": 4}))
    over = {"flow_map.weight": "inverse", "train.steps": 6}
    whole, parts = (
        begin(tmp_path / f"fmlm-{size}", map_settings(teacher, over | {"train.micro_batch": size}))
        for size in (0, 3)
    )
    for _ in range(6):
        assert whole.optimize() == pytest.approx(parts.optimize(), rel=1e-4)
        # From the same weights each time: what rounding changes, an optimizer's first steps make larger.
        parts.model.load_state_dict(whole.model.state_dict())
        parts.ema.model.load_state_dict(whole.ema.model.state_dict())
        whole.step, parts.step = whole.step + 1, parts.step + 1
    plain = begin(tmp_path / "plain", map_settings(teacher))
    plain.ema.model.load_state_dict(whole.ema.model.state_dict())
    assert plain.held_out().loss == pytest.approx(whole.held_out().loss, rel=1e-6)


def test_weights_go_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = trained(tmp_path / "flm", settings({"train.steps": 4}))
    config = map_settings(teacher, {"flow_map.weight": "inverse", "train.steps": 6})
    trained(tmp_path / "whole", config)
    trainer = begin(tmp_path / "parts", config)
    update = trainer.update

    def stopping() -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.step == 2:
            trainer.interrupt()
        return update()

    monkeypatch.setattr(trainer, "update", stopping)
    assert not trainer.train().finished
    assert open_run(tmp_path / "parts", say=silent).train().finished
    for name in ("model", "ema"):
        one, other = (tensors(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_clock_of_losses_needs_them_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"flow_map\.weight = 'inverse' and clock\.kind = 'adaptive'"):
        settings({"objective": "flow-map", "flow_map.weight": "inverse", "clock.kind": "adaptive"})
    # which are those of rows on the diagonal
    with pytest.raises(
        ValueError, match=r"flow_map\.diagonal = 0 has none: give it some, or leave the clock"
    ):
        settings({"objective": "flow-map", "flow_map.diagonal": 0.0, "clock.kind": "adaptive"})


def test_weights_are_of_rows_off_the_diagonal(tmp_path: Path) -> None:
    """Those on it have another loss, which neither counts nor is weighted."""
    teacher = trained(tmp_path / "flm", settings({"train.steps": 4}))
    plain, weighted = (
        begin(tmp_path / f"fmlm-{weight}", map_settings(teacher, {"flow_map.weight": weight}))
        for weight in ("none", "inverse")
    )
    off = []
    for trainer in (plain, weighted):
        trainer.optimize()
        trainer.model.load_state_dict(plain.model.state_dict())
        objective: Any = trainer.objective
        if trainer is weighted:
            objective._weights.step()
            assert 0 < objective._weights.count.sum() < 8  # of a batch of eight, those alone
            objective._weights.total = torch.linspace(1, 2, BINS * BINS).double()
            objective._weights.count = torch.ones(BINS * BINS).double()
        objective.prepare(trainer.model, 1)
        draws = objective.draw(64, torch.Generator().manual_seed(0))
        tokens = torch.randint(
            0, 5, (64, trainer.model.config.length), generator=torch.Generator().manual_seed(1)
        )
        xi = torch.randn(*tokens.shape, objective.noise_width, generator=torch.Generator().manual_seed(2))
        trainer.model.eval()
        off.append((draws["s"] < draws["t"], objective.losses(trainer.model, tokens, xi, draws).mean(-1)))
    (one, a), (other, b) = off
    assert torch.equal(one, other)
    torch.testing.assert_close(a[~one], b[~one])
    assert not torch.isclose(a[one], b[one], rtol=1e-2).any()
