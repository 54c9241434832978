"""The two stages: a correction around a frozen flow, and a flow map that is regressed on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
from flowlm import FlowLM
from flowlm.clock import DecodingErrorClock
from flowlm.config import load_recipe
from flowlm.correction import CorrectedFlow
from flowlm.denoiser import Denoiser
from flowlm.evaluation.samples import read_samples
from flowlm.objectives import FlowMapObjective, FlowObjective
from flowlm.objectives.flow_map import FlowMapConfig
from flowlm.path import step, velocity
from flowlm.samplers import sample
from flowlm.training.flops import counter
from helpers import command, corpus, flm, fmlm, said
from toy import LANGUAGE, LENGTH

CLOCK = DecodingErrorClock(toy.VOCAB)
STAGES = {name: load_recipe(name).flow_map for name in ("correction", "two-stage")}


def around(flow: Denoiser) -> CorrectedFlow:
    """A correction of a flow that starts as none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = dataclasses.replace(flow.config, family="correction", two_times=True)
        model = CorrectedFlow(config)
    model.flow.load_state_dict(flow.state_dict())
    model.begin()
    return model


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, a state at s, and two times."""
    gen = torch.Generator().manual_seed(seed)
    tau = torch.rand(16, 2, generator=gen, dtype=torch.float64).sort(1).values
    s, t = (x.float() for x in CLOCK.time(tau).unbind(1))
    return LANGUAGE.sample(16, gen), torch.randn(16, LENGTH, 32, generator=gen), s, t


# --- the formula ---------------------------------------------------------------------------------


def test_a_step_is_the_flow_s_with_half_the_square_of_the_change() -> None:
    """F_{s,t}(y) = y + (t-s) b_s(y) + ½ (t-s)² g_{s,t}(y) E, and D_s on the diagonal."""
    model = around(toy.tiny_denoiser()).eval()
    with torch.no_grad():
        model.flow.head.weight.normal_(std=0.3)
        _, y, s, t = states()
        flow = model.flow(y, s)
        torch.testing.assert_close(model(y, s, t).embed(), flow.embed())  # no change at first
        model.weight.normal_(std=0.3)
        found = step(y, model(y, s, t).embed(), s, t)
        g = model.correction(y, s, t).hidden @ model.weight.T @ model.embedding
        width = (t - s)[:, None, None]
        wanted = y + width * velocity(y, flow.embed(), s) + 0.5 * width**2 * g
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - step(y, flow.embed(), s, t)).abs().max() > 0.01
        torch.testing.assert_close(model(y, s, s).embed(), flow.embed())
        torch.testing.assert_close(model(y, s).log_probs(), flow.log_probs())


def test_the_correction_alone_learns() -> None:
    model = around(toy.tiny_denoiser())
    tokens, *_ = states()
    objective = FlowMapObjective(STAGES["correction"], CLOCK, model.flow)
    objective.prepare(model, 0)
    gen = torch.Generator().manual_seed(1)
    xi = torch.randn(16, LENGTH, objective.noise_width, generator=gen)
    # The flow has no dropout of its own while the correction trains.
    assert model.train().correction.training
    assert not model.flow.training
    with torch.no_grad():
        model.flow.head.weight.normal_(std=0.3)
        model.weight.normal_(std=0.3)
    objective.losses(model, tokens, xi, objective.draw(16, gen)).mean().backward()
    changed = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert changed == {"correction", "weight"}
    assert model.correction.embedding.grad is None


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_stages_learn_the_flow_map_at_equal_compute() -> None:
    """As much as 1,200 steps of the published semigroup setting take, half of it for each stage."""
    flow = toy.tiny_denoiser()
    toy.train(FlowObjective(CLOCK), flow, 1200, lr=5e-3)
    flow.requires_grad_(False).eval()
    corrected, student = around(flow), toy.two_time_from(flow)
    first = FlowMapObjective(STAGES["correction"], CLOCK, corrected.flow)
    second = FlowMapObjective(STAGES["two-stage"], CLOCK, corrected)
    published = FlowMapObjective(FlowMapConfig(boundary=1 / 32, diagonal_target="teacher"), CLOCK, flow)

    def flops(objective: FlowMapObjective, model: Any) -> int:
        gen = torch.Generator().manual_seed(0)
        objective.prepare(model)
        tokens = LANGUAGE.sample(256, gen)
        xi = torch.randn(256, LENGTH, objective.noise_width, generator=gen)
        with counter() as counted:
            objective.losses(model, tokens, xi, objective.draw(256, gen)).mean().backward()
        model.zero_grad()
        return counted.get_total_flops()

    budget = 600 * flops(published, student)
    steps = [budget // flops(first, corrected), budget // flops(second, student)]
    toy.train(first, corrected, steps[0])  # type: ignore[arg-type]
    corrected.requires_grad_(False).eval()
    tv = LANGUAGE.total_variation(sample(corrected, 40_000, LENGTH, 1, seed=5).tokens)  # type: ignore[arg-type]
    toy.train(second, student, steps[1])
    found = toy.kl_to_exact(student, pairs=True)
    law = LANGUAGE.total_variation(sample(student, 40_000, LENGTH, 1, seed=5).tokens)
    print(f"two stages: {steps} steps, KL {found:.4f}, one-step total variation {tv:.3f}, then {law:.3f}")
    assert min(steps) > 200
    assert tv < 0.1
    assert found < 0.04
    assert law < 0.1


# --- as runs -------------------------------------------------------------------------------------

SHORT = ("--train.steps", "2", "--train.batch", "8", "--train.eval-every", "0")


def test_two_stages_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "corrected", tmp_path / "student"
    assert command("distill", "correction", "--teacher", flm(), "--out", first, *SHORT) == 0
    assert "of squared error a token" in said(capsys)
    model = FlowLM.from_pretrained(first)
    theirs = FlowLM.from_pretrained(flm()).denoiser.state_dict()
    for name, value in model.denoiser.flow.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    (part,) = model.generate_in_parts(3, 2)
    assert part.nfe == 4  # each step calls the flow and its correction

    assert command("distill", "two-stage", "--teacher", first, "--out", second, *SHORT) == 0
    student = FlowLM.from_pretrained(second)
    assert student.family.name == "flow-map"
    assert torch.equal(student.embedding, model.embedding)
    assert student.denoiser.config.head_start > 0
    assert bool(student.denoiser.mean.any())
    assert command("evaluate", first, "--steps", "1", "--num", "8", "--frontier") == 0
    assert "FLM+g 2 " in said(capsys)
    (file,) = (first / "samples").glob("nfe-0002-seed-0.jsonl")
    header, records = read_samples(file)
    assert {header.nfe, *(record.nfe for record in records)} == {2}  # one step, and no more
    assert records[0].tokens == next(iter(model.generate_in_parts(8, 1))).tokens[0].tolist()
    assert command("generate", first, "--num", "2", "--steps", "3") == 0
    assert "2 passages, 6 network calls each" in said(capsys)
    # It goes on from where it was.
    assert (
        command(
            "train",
            "correction",
            "--init",
            first,
            "--data.corpus",
            "text",
            "--data.path",
            corpus(),
            "--out",
            tmp_path / "on",
            *SHORT,
        )
        == 0
    )


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("text-fmlm --teacher CORRECTED", "regressed on a corrected flow with identity = 'correction'"),
        ("two-stage --teacher FLM", "of the family 'flow', and flow_map.identity = 'correction'"),
        ("correction --teacher FMLM", "is no FLM with probabilities"),
        ("correction --teacher CORRECTED", "is no FLM with probabilities"),
        ("correction --teacher FLM --flow-map.diagonal 0.5", "set flow_map.diagonal = 0.0, not 0.5"),
        (
            "correction --teacher FLM --clock.kind adaptive",
            "objective = 'correction' has none: leave the clock",
        ),
        ("two-stage --teacher CORRECTED --flow-map.loss cross-entropy", "use loss = 'squared-error'"),
        ("text-fmlm --teacher FLM --flow-map.identity correction", "use loss = 'squared-error'"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: str, reason: str) -> None:
    corrected = tmp_path / "corrected"
    assert command("distill", "correction", "--teacher", flm(), "--out", corrected, *SHORT) == 0
    capsys.readouterr()
    runs = {"CORRECTED": corrected, "FLM": flm(), "FMLM": fmlm()}
    given = [runs.get(arg, arg) for arg in args.split()]
    assert command("distill", *given, "--out", tmp_path / "out", *SHORT) != 0
    assert reason in said(capsys)
    assert not (tmp_path / "out").exists()


def test_a_correction_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"the cat number {i} sat ." for i in range(50)))
    data = ("--data.corpus", "text", "--data.path", tmp_path / "text.txt", "--model.length", "8")
    assert command("train", "correction", *data, "--out", tmp_path / "out", *SHORT) == 1
    assert "name it with --teacher RUN" in said(capsys)
