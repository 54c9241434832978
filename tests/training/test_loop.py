"""The loop: accumulation, averaging, held-out losses, checkpoint choice, and the ways in which a run stops."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowlm import rng
from flowlm.clock import AdaptiveClock
from flowlm.model import FlowLM
from flowlm.training import distributed
from flowlm.training.checkpoint import Metrics
from flowlm.training.loop import TAU_BINS, HeldOut, Trainer, TrainingError, open_run
from helpers import begin, content, flm, fmlm, map_settings, metrics, settings, silent, tensors, trained


def _config(objective: str, over: dict[str, Any] | None = None) -> Any:
    return settings(over) if objective == "flow" else map_settings(flm(), over)


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient that the optimizer would see at the trainer's step."""
    found: dict[str, Tensor] = {}

    def step(number: int) -> Tensor:
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return torch.zeros(())

    trainer.optimizer.step = step  # type: ignore[method-assign]
    trainer.optimize()
    return found


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_micro_batches_accumulate_the_gradient_of_the_whole_batch(objective: str, tmp_path: Path) -> None:
    over = {"init": str(flm() if objective == "flow" else fmlm()), "flow_map.boundary": 0.3}
    whole, parts = (
        Trainer(_config(objective, over | {"train.micro_batch": size}), tmp_path, say=silent)
        for size in (0, 3)
    )
    one, many = _gradients(whole), _gradients(parts)
    assert one.keys() == many.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    for name, gradient in one.items():
        assert torch.allclose(many[name], gradient, rtol=1e-4, atol=1e-6 * scale), name


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_micro_batches_give_the_same_weights_and_losses(objective: str, tmp_path: Path) -> None:
    # Without Muon, whose iteration in bfloat16 would make rounding a thousand times larger.
    init = str(flm() if objective == "flow" else fmlm())
    over = {"init": init, "train.steps": 4, "optim.muon_lr": 0.0}
    whole = trained(tmp_path / "whole", _config(objective, over))
    parts = trained(tmp_path / "parts", _config(objective, over | {"train.micro_batch": 3}))
    for one, many in zip(metrics(whole), metrics(parts)):
        assert one.keys() == many.keys()
        for name in one.keys() & {"loss", "held_out", "gradient_norm"}:
            assert many[name] == pytest.approx(one[name], rel=1e-4), name
    start = tensors(Path(init) / "ema.safetensors")
    other = tensors(parts / "model.safetensors")
    for name, value in tensors(whole / "model.safetensors").items():
        change = (value - start[name]).norm() if name in start else value.norm()
        # Adam divides by the gradient's own size: where it is almost zero, rounding decides its sign.
        assert (other[name] - value).norm() <= 0.01 * change + 1e-7, name


# ------------------------------------------------------------------------------------- seeds, precision, kernels


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_a_seed_gives_the_same_bytes(objective: str, tmp_path: Path) -> None:
    over = {"clock.kind": "adaptive", "clock.refit_every": 3, "train.dtype": "bfloat16"}
    runs = [trained(tmp_path / name, _config(objective, over)) for name in "ab"]
    assert content(runs[0]) == content(runs[1])


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    runs = [
        trained(tmp_path / str(seed), settings({"train.seed": seed, "train.steps": 2})) for seed in (0, 1)
    ]
    one, other = (tensors(run / "model.safetensors") for run in runs)
    assert not torch.equal(one["embedding"], other["embedding"])
    assert metrics(runs[0])[1]["loss"] != metrics(runs[1])[1]["loss"]


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path: Path) -> None:
    over = {"init": str(flm()), "train.steps": 3}
    full = trained(tmp_path / "full", settings(over))
    half = trained(tmp_path / "half", settings(over | {"train.dtype": "bfloat16"}))
    assert {t.dtype for t in tensors(half / "model.safetensors").values()} == {torch.float32}
    one, other = (metrics(run)[0]["loss"] for run in (full, half))
    assert other != one  # else the choice would change nothing
    assert other == pytest.approx(one, rel=0.02)


def test_the_choice_of_precision_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    Trainer(settings({"train.dtype": "bfloat16"}), tmp_path, say=lines.append)
    assert lines[0] == "device cpu, compute in bfloat16 (asked for)"


def _compile_and_compare(folder: Path) -> None:
    over = {"init": str(flm()), "train.steps": 2, "train.eval_every": 0}
    eager = begin(folder / "eager", settings(over))
    compiled = begin(folder / "compiled", settings(over | {"train.compile": True}))
    assert eager.model.backbone._compiled_call_impl is None
    assert compiled.model.backbone._compiled_call_impl is not None
    one, other = eager.optimize(), compiled.optimize()
    assert other == pytest.approx(one, rel=1e-4)
    # the names in the files do not depend on it
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


@pytest.mark.slow
def test_compile_captures_the_whole_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, forwards and backwards, without a compiler for it."""
    compile_ = torch.nn.Module.compile

    def capture(self: torch.nn.Module) -> None:
        compile_(self, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    _compile_and_compare(tmp_path)


@pytest.mark.skipif(
    "FLOWLM_TEST_COMPILE" not in os.environ, reason="takes minutes: set FLOWLM_TEST_COMPILE=1"
)
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang", "g++"))), reason="no C compiler")
@pytest.mark.slow
def test_compile_gives_the_same_losses(tmp_path: Path) -> None:
    _compile_and_compare(tmp_path)


# -------------------------------------------------------------------------------------------- what a run looks at


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_held_out_loss_of_an_ignorant_model_is_log_v_in_every_bin(micro_batch: int, tmp_path: Path) -> None:
    trainer = Trainer(settings({"train.micro_batch": micro_batch}), tmp_path, say=silent)
    held_out = trainer.held_out()  # the head starts at zero: every posterior is uniform
    by_tau = held_out.by_tau
    uniform = math.log(trainer.config.model.vocab_size)
    assert held_out.loss == pytest.approx(uniform, rel=1e-6)
    assert held_out.by_kind == {}
    assert len(by_tau) == TAU_BINS
    assert [x for x in by_tau if x is not None] == pytest.approx([uniform] * len([x for x in by_tau if x]))
    assert trainer.held_out() == held_out  # the same rows and noise each time


def test_held_out_loss_by_kind_of_row(tmp_path: Path) -> None:
    """On the diagonal the loss is the teacher's own; the longest jump is the hardest."""
    trainer = Trainer(map_settings(flm(), {"flow_map.boundary": 0.5}), tmp_path, say=silent)
    held_out = trainer.held_out()
    assert held_out.by_kind.keys() == {"diagonal", "boundary", "interior"}
    counts = torch.bincount(
        trainer.objective.draw(10, rng.generator(trainer.config.train.seed, "held-out"))["kind"], minlength=3
    )
    mean = sum(float(n) * value for n, value in zip(counts, held_out.by_kind.values())) / 10
    assert held_out.loss == pytest.approx(mean, rel=1e-5)
    trainer.start()
    trainer._evaluate(Metrics(tmp_path / "metrics.jsonl"), silent)
    (line,) = metrics(tmp_path)
    for kind, value in held_out.by_kind.items():
        assert line[f"held_out_{kind}"] == value


def test_held_out_loss_falls_along_the_clock(tmp_path: Path) -> None:
    trainer = Trainer(settings({"init": str(flm())}), tmp_path, say=silent)
    held_out = trainer.held_out()
    loss, first, last = held_out.loss, held_out.by_tau[0], held_out.by_tau[-1]
    assert first is not None
    assert last is not None
    assert last < loss < first  # near the data there is less to guess
    rows = trainer.corpus.held_out
    assert len(rows) == 10  # a bin's mean is over the rows that fall into it
    assert loss == pytest.approx(sum(x for x in held_out.by_tau if x is not None) / TAU_BINS, rel=0.1)


def test_metrics_and_samples(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", settings({"train.log_every": 2}))
    lines = metrics(run)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    assert [line["tokens"] for line in logged] == [n * 8 * 12 for n in (2, 4, 6, 8)]
    assert logged[0]["lr_factor"] == 1.0
    assert all(line["gradient_norm"] > 0 for line in logged)
    held_out = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in held_out] == [4, 8]
    assert all(len(line["held_out_by_tau"]) == TAU_BINS for line in held_out)
    for step in (4, 8):
        first, *texts = (run / "samples" / f"step-{step:08d}.txt").read_text().splitlines()
        assert first == f"# step {step}, 2 network calls"
        assert len(texts) == 4
    model = FlowLM.from_pretrained(run)
    assert texts == model.generate(4, 2, seed=0)


def test_samples_and_losses_are_said(tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = Trainer(settings({"train.steps": 4}), tmp_path / "run", say=lines.append)
    trainer.start()
    result = trainer.train()
    told = [line for line in lines if line.startswith("step 4: held-out loss")]
    assert told == [f"step 4: held-out loss {result.held_out:.4f} nats a token; 2 network calls:"]
    at = lines.index(told[0])
    assert lines[at + 1 : at + 3] == [
        "  " + text for text in FlowLM.from_pretrained(tmp_path / "run").generate(2, 2, seed=0)
    ]


def test_passages_that_repeat_themselves_are_told_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropies stand in the metrics; from half of the steps on, that of the passages far below the data's is said."""
    collapsed = torch.full((16, 12), 5)
    monkeypatch.setattr(
        FlowLM,
        "generate_in_parts",
        lambda *a, **k: iter([SimpleNamespace(tokens=collapsed, texts=["a"] * 16)]),
    )
    lines: list[str] = []
    config = settings({"train.steps": 8, "train.eval_every": 2})
    trainer = Trainer(config, tmp_path / "run", say=lines.append)
    trainer.start()
    trainer.train()
    told = [line for line in lines if "repeat themselves" in line]
    assert len(told) == 3  # after 4, 6 and 8
    found = [m for m in metrics(tmp_path / "run") if "held_out" in m]
    assert [m["sample_entropy"] for m in found] == [0.0] * 4
    assert 1 < found[0]["data_entropy"] < math.log(12)
    assert f"0.00 nats of entropy, those of held-out text {found[0]['data_entropy']:.2f}" in told[0]
    assert "lower --optim.lr" in told[0]


def test_a_flow_map_is_watched_in_one_call_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: FlowLM, num: int, steps: int, **options: Any) -> Any:
        rows = torch.full((16, 12), 5) if steps == 1 else torch.arange(5, 17).repeat(16, 1)
        return iter([SimpleNamespace(tokens=rows, texts=["a"] * 16)])

    monkeypatch.setattr(FlowLM, "generate_in_parts", generate)
    lines: list[str] = []
    trainer = Trainer(
        map_settings(flm(), {"train.steps": 4, "train.eval_every": 4, "train.sample_steps": 2}),
        tmp_path / "run",
        say=lines.append,
    )
    trainer.start()
    trainer.train()
    (told,) = [line for line in lines if "repeat themselves" in line]
    assert told.startswith("  passages of 1 network call repeat themselves: their tokens have 0.00 nats")
    (found,) = [m for m in metrics(tmp_path / "run") if "held_out" in m]
    assert (found["one_call_entropy"], found["sample_entropy"] > 2) == (0.0, True)


def test_a_start_beside_a_teacher_is_made_like_it(tmp_path: Path) -> None:
    """Weights that fit by their shapes say nothing of a network that reads them otherwise."""
    shutil.copytree(fmlm(), tmp_path / "start")
    over = {"init": str(tmp_path / "start")}
    Trainer(map_settings(flm(), over), tmp_path / "run", say=silent)
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    config["model"]["logit_softcap"] = 3.0
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"made otherwise than its teacher .*: they differ in model.logit_softcap"
    ):
        Trainer(map_settings(flm(), over), tmp_path / "run", say=silent)


def test_what_an_objective_warns_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flowlm.objectives.flow.FlowObjective.warning", lambda self: "the targets are no targets"
    )
    lines: list[str] = []
    trainer = Trainer(settings({"train.steps": 4, "train.log_every": 2}), tmp_path / "run", say=lines.append)
    trainer.start()
    trainer.train()
    assert [line for line in lines if "no targets" in line] == [
        f"step {step}: the targets are no targets" for step in (2, 4)
    ]


def test_eval_every_zero_looks_only_at_the_end(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", settings({"train.eval_every": 0, "train.steps": 3}))
    assert [line["step"] for line in metrics(run) if "held_out" in line] == [3]


# ---------------------------------------------------------------------------------------------- checkpoint choice


def _losses_of(monkeypatch: pytest.MonkeyPatch, by_step: dict[int, float]) -> None:
    monkeypatch.setattr(Trainer, "held_out", lambda self: HeldOut(by_step[self.step], [None] * TAU_BINS, {}))


@pytest.mark.parametrize(
    ("choose", "over", "chosen", "kept"),
    [
        ("last", {}, 8, [7, 8]),
        ("best", {}, 3, [3, 7, 8]),
        # the best weights are kept also where no checkpoint was due
        ("best", {"train.save_every": 4}, 3, [3, 4, 8]),
        ("last", {"train.save_every": 4, "train.keep": 1}, 8, [8]),
        ("best", {"train.save_every": 2, "train.keep": 1}, 3, [3, 8]),
    ],
)
def test_choice_and_pruning(
    choose: str,
    over: dict[str, Any],
    chosen: int,
    kept: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {1: 3.0, 2: 2.5, 3: 1.0, 4: 1.5, 5: 1.2, 6: 1.1, 7: 1.3, 8: 1.4}
    _losses_of(monkeypatch, losses)
    defaults = {"train.choose": choose, "train.eval_every": 1, "train.save_every": 1}
    trainer = begin(tmp_path / "run", settings(defaults | over))
    result = trainer.train()
    assert trainer.run.steps() == kept
    for name in ("model.safetensors", "ema.safetensors"):
        exported = (tmp_path / "run" / name).read_bytes()
        assert exported == (trainer.run.checkpoint(chosen) / name).read_bytes()
        assert (exported == (trainer.run.checkpoint(8) / name).read_bytes()) == (chosen == 8)
    assert result.held_out == losses[chosen]  # of the exported weights


def test_the_best_is_remembered_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _losses_of(monkeypatch, {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0})
    over = {"train.choose": "best", "train.eval_every": 2, "train.save_every": 2}
    trainer = begin(tmp_path / "run", settings(over))
    _interrupt_at(trainer, 5)
    assert not trainer.train().finished
    result = open_run(tmp_path / "run", say=silent).train()
    assert result.held_out == 1.0
    best = trainer.run.checkpoint(2) / "ema.safetensors"
    assert (tmp_path / "run" / "ema.safetensors").read_bytes() == best.read_bytes()


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _losses_of(monkeypatch, {4: math.nan, 8: 2.0})
    trainer = begin(tmp_path / "run", settings({"train.choose": "best"}))
    trainer.train()
    assert trainer.best == (2.0, 8)
    assert trainer.run.steps() == [4, 8]


# ------------------------------------------------------------------------------------------- weights to start from


@pytest.mark.parametrize("source", [flm, fmlm])
@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_init_continues_from_any_runs_averaged_weights(
    source: Callable[[], Path], objective: str, tmp_path: Path
) -> None:
    config = settings({"init": str(source()), "objective": objective})
    trainer = Trainer(config, tmp_path, say=silent)
    assert trainer.config.model.backbone.width == 32
    assert trainer.config.model.two_times == (objective == "flow-map" or source is fmlm)
    found = trainer.model.state_dict()
    for name, value in tensors(source() / "ema.safetensors").items():
        assert torch.equal(found[name], value), name
    trainer.optimize()  # and it trains


def test_a_flow_map_keeps_its_head_start(tmp_path: Path) -> None:
    """Continued by --init, and resumed: the model is what its weights were made for."""
    published = trained(tmp_path / "published", map_settings(flm(), {"flow_map.head_start": 0.0}))
    assert "mean" not in tensors(published / "model.safetensors")
    over = {"init": str(published), "objective": "flow-map", "train.save_every": 2}
    message = r"flow_map\.head_start is 0\.0625, but .* with 0\.0 .*--flow-map\.head-start 0\.0"
    with pytest.raises(ValueError, match=message):
        Trainer(settings(over), tmp_path / "run", say=silent)
    run = trained(tmp_path / "run", settings(over | {"flow_map.head_start": 0.0}))
    shutil.rmtree(run / "checkpoints" / f"step-{8:08d}")
    before, found, after = (run / "config.toml").read_text().rpartition("head_start = 0.0\n")  # of [flow_map]
    assert found
    (run / "config.toml").write_text(before + "head_start = 0.5\n" + after)
    resumed = open_run(run, say=silent)
    assert resumed.model.config.head_start == 0.0
    assert resumed.train().finished


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_the_models_head_start_is_not_set_by_hand(objective: str, tmp_path: Path) -> None:
    config = settings({"objective": objective, "model.head_start": 0.1})
    with pytest.raises(
        ValueError, match=r"model\.head_start = 0\.1 is filled in by itself: set flow_map\.head_start"
    ):
        Trainer(config, tmp_path, say=silent)


def test_init_says_what_of_the_recipe_it_overrules(tmp_path: Path) -> None:
    said: list[str] = []
    config = settings({"init": str(flm()), "model.backbone.width": 64, "model.tied_head": True})
    assert Trainer(config, tmp_path, say=said.append).config.model.backbone.width == 32
    assert (
        f"model and weights are those of {flm()}, not the recipe's: model.tied_head = True (the run has False), "
        "model.backbone.width = 64 (the run has 32)"
    ) in said
    Trainer(settings({"init": str(flm())}), tmp_path, say=said.append)
    assert said[-1].endswith(f"are those of {flm()}")


def test_a_resume_does_not_need_the_run_that_it_started_from(tmp_path: Path) -> None:
    shutil.copytree(flm(), tmp_path / "source")
    trainer = begin(tmp_path / "run", settings({"init": str(tmp_path / "source")}))
    _interrupt_at(trainer, 3)
    trainer.train()
    shutil.rmtree(tmp_path / "source")
    assert open_run(tmp_path / "run", say=silent).train().finished


def test_distillation_starts_from_its_teacher_and_may_keep_the_embedding(tmp_path: Path) -> None:
    run = trained(
        tmp_path / "run", map_settings(flm(), {"train.steps": 3, "flow_map.freeze_embedding": True})
    )
    teacher, student = tensors(flm() / "ema.safetensors"), tensors(run / "model.safetensors")
    assert torch.equal(student["embedding"], teacher["embedding"])
    assert not torch.equal(student["head.weight"], teacher["head.weight"])
    assert {name for name in student if name not in teacher} == {
        "mean",
        *(f"end_embedding.mlp.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")),
    }
    beginner = begin(tmp_path / "beginner", map_settings(flm()))
    rows = torch.from_numpy(beginner.corpus.train.astype(np.int64))
    torch.testing.assert_close(
        beginner.model.mean.data, teacher["embedding"][rows].mean(0), atol=1e-5, rtol=1e-5
    )
    free = trained(tmp_path / "free", map_settings(flm(), {"train.steps": 3}))
    assert not torch.equal(tensors(free / "model.safetensors")["embedding"], teacher["embedding"])


def test_the_teacher_is_not_trained(tmp_path: Path) -> None:
    over = {"train.steps": 2, "flow_map.diagonal_target": "teacher"}
    trainer = begin(tmp_path / "run", map_settings(flm(), over))
    assert trainer.objective.teacher is not None  # type: ignore[attr-defined]
    trainer.train()
    teacher = trainer.objective.teacher.state_dict()  # type: ignore[attr-defined]
    for name, value in tensors(flm() / "ema.safetensors").items():
        assert torch.equal(teacher[name], value), name


def test_only_a_teacher_s_embedding_is_kept(tmp_path: Path) -> None:
    frozen = settings({"objective": "flow-map", "flow_map.freeze_embedding": True})
    with pytest.raises(ValueError, match=r"keeps a teacher's embedding, and there is no teacher: name one"):
        begin(tmp_path / "run", frozen)


def test_a_teacher_that_is_only_begun_with_is_not_kept(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", map_settings(flm(), {"train.steps": 2}))
    assert trainer.objective.teacher is None  # type: ignore[attr-defined]
    assert trainer._networks == [trainer.model, trainer.ema.model]
    assert trainer.train().finished


def test_self_distillation_needs_no_teacher(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", settings({"objective": "flow-map", "train.steps": 2}))
    assert FlowLM.from_pretrained(run).denoiser.config.two_times


@pytest.mark.parametrize("name", ["teacher", "init"])
def test_a_run_never_replaces_the_one_it_learns_from(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(flm(), source)
    config = map_settings(source) if name == "teacher" else settings({"init": str(source)})
    before = content(source)
    with pytest.raises(ValueError, match=rf"is this run's own {name}: choose another folder with --out"):
        Trainer(config, source, say=silent).start(force=True)
    assert content(source) == before


# ---------------------------------------------------------------------------------------------- the adaptive clock


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_the_adaptive_clock_is_trained_saved_and_restored(objective: str, tmp_path: Path) -> None:
    over = {"clock.kind": "adaptive", "clock.refit_every": 2, "clock.floor": 0.3, "train.steps": 6}
    trainer = begin(tmp_path / "run", _config(objective, over))
    clock = trainer.clock
    assert isinstance(clock, AdaptiveClock)
    straight = torch.linspace(0, 1, clock.bins + 1, dtype=torch.float64)
    assert torch.equal(clock.cdf, straight)
    _interrupt_at(trainer, 3)
    trainer.train()
    assert clock.floor == 0.3
    assert float(clock.count.sum()) > 0
    assert not torch.allclose(clock.cdf, straight)
    restored = open_run(tmp_path / "run", say=silent)
    for name, value in clock.state_dict().items():
        assert torch.equal(restored.clock.state_dict()[name], value), name
    restored.train()
    model = FlowLM.from_pretrained(tmp_path / "run")
    assert isinstance(model.sampling_clock, AdaptiveClock)
    assert torch.equal(model.sampling_clock.cdf, restored.clock.cdf)  # type: ignore[arg-type]
    # the network goes on reading the conditioning clock
    tau = torch.tensor([0.3, 0.6])
    assert not torch.allclose(model.sampling_clock.time(tau), model.denoiser.clock.time(tau))


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
def test_held_out_times_do_not_move_with_the_adaptive_clock(objective: str, tmp_path: Path) -> None:
    over = {"clock.kind": "adaptive", "clock.refit_every": 1, "train.batch": 64}
    trainer = Trainer(_config(objective, over), tmp_path, say=silent)
    before = trainer.held_out()
    assert isinstance(trainer.clock, AdaptiveClock)
    t = torch.rand(4000)
    trainer.clock.observe(t, 1 - t)
    trainer.clock.refit()
    assert trainer.held_out() == before


def test_a_fixed_clock_draws_in_the_conditioning_clocks_time(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings({"train.batch": 64}))
    draws = trainer.objective.draw(64, torch.Generator().manual_seed(0))
    tau = trainer.model.clock.tau(draws["t"].double()).sort().values
    # one draw in each of 64 equal cells of clock time
    assert torch.equal((tau * 64).floor(), torch.arange(64, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ how a run stops


def _before_step(trainer: Trainer, step: int, act: Callable[[], None]) -> None:
    update = trainer.update

    def wrapped() -> tuple[Tensor, Tensor]:
        if trainer.step == step:
            act()
        return update()

    trainer.update = wrapped  # type: ignore[method-assign]


def _interrupt_at(trainer: Trainer, step: int) -> None:
    _before_step(trainer, step, trainer.interrupt)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number: int, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", settings())
    lines: list[str] = []
    trainer = Trainer(settings(), tmp_path / "run", say=lines.append)
    trainer.start()
    _before_step(trainer, 5, lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    result = trainer.train()
    assert signal.getsignal(number) == before  # the caller's handlers are back
    assert (result.finished, result.step) == (False, 6)
    assert trainer.run.steps() == [4, 6]
    assert lines[-1] == (
        f"interrupted at step 6; everything is saved. Continue with: flowlm train --resume {tmp_path / 'run'}"
    )
    resumed = open_run(tmp_path / "run", say=silent)
    assert resumed.step == 6
    assert resumed.train().finished
    last = "checkpoints/step-00000008/"
    one, other = content(whole), content(tmp_path / "run")
    assert {k: v for k, v in one.items() if k.startswith(last)} == {
        k: v for k, v in other.items() if k.startswith(last)
    }
    assert metrics(whole) == metrics(tmp_path / "run")


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings())

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    _before_step(trainer, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.run.steps() == [4]
    assert open_run(tmp_path / "run", say=silent).step == 4


def test_seconds_go_on_where_they_were(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings())
    _interrupt_at(trainer, 5)
    trainer.train()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"seconds": 1000.0}) + "\n" for line in lines))
    open_run(tmp_path / "run", say=silent).train()
    last = [json.loads(line).get("seconds", 0) for line in path.read_text().splitlines()]
    assert 1000 < max(last) < 1100


def test_a_resumed_run_that_had_finished_says_its_loss(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings())
    result = trainer.train()
    again = open_run(tmp_path / "run", say=silent).train()
    assert again.finished
    assert again.held_out == result.held_out


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what a step came to is read when the next one was given."""
    monkeypatch.setattr(Trainer, "runs_ahead", True)


@pytest.mark.usefixtures("ahead")
def test_a_run_that_runs_ahead_is_the_same(tmp_path: Path) -> None:
    over = {"train.steps": 7, "train.log_every": 3, "train.save_every": 5, "train.eval_every": 0}
    read: list[int] = []
    trainer = begin(tmp_path / "ahead", settings(over))
    own = trainer._read

    def told(given: Any) -> tuple[float, float]:
        read.append(trainer.step - given.step)
        return own(given)

    trainer._read = told  # type: ignore[method-assign]
    result = trainer.train()
    # a step behind, but where it is logged or saved
    assert read == [2, 2, 1, 2, 1, 1, 1]
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(Trainer, "runs_ahead", False)
        other = begin(tmp_path / "plain", settings(over))
        assert other.train().held_out == result.held_out
    drop = {"seconds"}
    lines = [
        [{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / name)]
        for name in ("ahead", "plain")
    ]
    assert lines[0] == lines[1]
    for name, value in tensors(tmp_path / "ahead" / "ema.safetensors").items():
        assert torch.equal(value, tensors(tmp_path / "plain" / "ema.safetensors")[name])


@pytest.mark.usefixtures("ahead")
def test_an_interruption_leaves_no_step_unread(tmp_path: Path) -> None:
    over = {"train.log_every": 100, "train.save_every": 100, "train.eval_every": 0, "train.steps": 50}
    trainer = begin(tmp_path / "run", settings(over))
    losses = trainer.objective.losses
    trainer.objective.losses = (  # type: ignore[method-assign]
        lambda *args: losses(*args) * (math.nan if trainer.step == 5 else 1.0)
    )
    _before_step(trainer, 5, trainer.interrupt)
    with pytest.raises(TrainingError, match=r"the loss became nan .* at step 5"):
        trainer.train()
    assert not trainer.run.steps()


@pytest.mark.parametrize("objective", ["flow", "flow-map"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("far", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_run(
    far: int, bad: float, objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "runs_ahead", bool(far))
    trainer = begin(tmp_path / "run", _config(objective))
    losses = trainer.objective.losses

    def broken(*args: Any) -> dict[str, Tensor]:
        out = losses(*args)
        return out * bad if trainer.step == 5 else out

    trainer.objective.losses = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    good = tmp_path / "run" / "checkpoints" / "step-00000004"
    saved = tmp_path / "run" / "nonfinite-step-00000005.safetensors"
    assert f"the loss became {bad}" in message
    assert "at step 5" in message
    assert f"the batch is in {saved}" in message
    assert f"The last good checkpoint is {good}." in message
    assert "--optim.lr" in message
    batch = tensors(saved)
    assert torch.equal(batch["tokens"], trainer.loader.batch(5))
    assert {"t"} <= batch.keys()
    assert trainer.run.steps() == [4]  # nothing bad was saved
    resumed = open_run(tmp_path / "run", say=silent)
    assert all(bool(value.isfinite().all()) for value in resumed.model.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings())
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda n: step(n) * math.inf  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"gradient norm inf\) at step 0.*No checkpoint yet\."):
        trainer.train()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize(
    ("micro_batch", "fix"),
    [
        (
            0,
            r"with 8 passages.*--train\.micro-batch 4 \(accumulating 2 of them a step\) gives the same result",
        ),
        (100, r"with 8 passages.*--train\.micro-batch 4 \(accumulating 2 of them"),
        (3, r"with 3 passages.*--train\.micro-batch 1 \(accumulating 8 of them"),
        (1, r"with 1 passages of 12 tokens.*make the model or its passages smaller"),
    ],
)
def test_out_of_memory_names_what_would_fit(
    error: Exception, micro_batch: int, fix: str, tmp_path: Path
) -> None:
    trainer = begin(tmp_path / "run", settings({"train.micro_batch": micro_batch}))

    def full() -> None:
        raise error

    _before_step(trainer, 4, full)
    with pytest.raises(TrainingError, match=r"out of memory at step 4, training, " + fix) as caught:
        trainer.train()
    assert f"The last good checkpoint is {trainer.run.checkpoint(4)}." in str(caught.value)


def test_out_of_memory_while_evaluating_is_mended_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin(tmp_path / "run", settings({"train.save_every": 2, "train.eval_every": 3}))

    def full(self: Trainer) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "held_out", full)
    with pytest.raises(TrainingError, match=r"out of memory at step 3, evaluating, .*--train\.micro-batch 4"):
        trainer.train()
    monkeypatch.undo()
    resumed = open_run(tmp_path / "run", changes={"train.micro_batch": 4}, say=silent)
    assert resumed.step == 2
    assert resumed.config.train.micro_batch == 4
    assert resumed.train().finished
    assert [line["step"] for line in metrics(tmp_path / "run") if "held_out" in line] == [3, 6, 8]


def test_a_resume_changes_nothing_else() -> None:
    with pytest.raises(
        ValueError, match=r"train\.steps cannot change in a run that goes on, only train\.micro_batch"
    ):
        open_run(flm(), changes={"train.steps": 50, "train.micro_batch": 2}, say=silent)


def test_a_resume_refuses_the_tokenizer_of_another_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    config = (run / "config.toml").read_text()
    sha = FlowLM.from_pretrained(flm()).tokenizer.vocabulary_sha256
    (run / "config.toml").write_text(config.replace(sha, "0" * 64))  # of as many tokens, but others
    with pytest.raises(ValueError, match=r"tokenizer\.json \(17 tokens\) is the tokenizer of another run"):
        open_run(run, say=silent)


def test_other_errors_are_not_called_out_of_memory(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings())

    def fail() -> None:
        raise RuntimeError("shapes do not match")

    _before_step(trainer, 0, fail)
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingError)


# ------------------------------------------------------------------------------------------------------- its data


def test_the_clocks_that_draw_times_stay_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model elsewhere (torch's shapes-only device stands for an accelerator) times are still drawn."""
    monkeypatch.setattr(distributed, "resolve_device", lambda name: torch.device("meta"))
    for kind in ("fixed", "adaptive"):
        trainer = Trainer(settings({"clock.kind": kind}), tmp_path, say=silent)
        assert trainer.model.embedding.device.type == "meta"
        assert trainer.objective.draw(8, torch.Generator())["t"].device.type == "cpu"


def test_the_config_that_is_saved_is_resolved(tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", settings())
    model = trainer.config.model
    assert model.vocab_size == trainer.corpus.tokenizer.vocab_size == 17
    assert trainer.model.backbone.length == model.length == 12
    trainer.train()
    again = open_run(tmp_path / "run", say=silent)
    assert again.config == dataclasses.replace(trainer.config)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 17
    assert re.fullmatch(r"flowlm/\d+", saved["format"])


def test_one_part_of_a_batch_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulating is for want of memory: what a part's backward pass needed is gone when the next one is made."""
    trainer = begin(tmp_path / "run", settings({"train.micro_batch": 2}))
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    losses = trainer._losses

    def watched(*args: Any) -> torch.Tensor:
        held.append(sum(ref() is not None for ref in made))
        out = losses(*args)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(trainer, "_losses", watched)
    trainer.optimize()
    assert held == [0] * 4
