"""The benchmarks compare like with like, and their tables show what was measured."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flowlm.config import load_recipe
from flowlm.cost import cost_of, models_of
from flowlm.objectives.flow_map import IDENTITIES
from toy import tiny_denoiser

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a machine after a quick run of everything."""
    out = tmp_path_factory.mktemp("benchmarks")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPTS / "run.py"),
            "--quick",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--out",
            str(out),
        ],
        cwd=out,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = out.iterdir()
    return folder


def rows_of(table: str) -> list[dict[str, str]]:
    """The rows of the one Markdown table in a text, by heading."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state", "distillation", "steps", "tokenising", "generation", "families"])
def test_the_table_shows_what_the_json_holds(name: str, quick: Path) -> None:
    result = json.loads((quick / f"{name}.json").read_text(encoding="utf-8"))
    for key in ("cpu", "cores", "threads", "dtype", "torch", "commit"):
        assert result["machine"][key]
    text = (quick / "tables.md").read_text(encoding="utf-8")
    (table,) = [part for part in text.split("## ") if part.startswith(name)]
    assert result["machine"]["cpu"] in table
    assert f"torch {torch.__version__}" in table
    assert "no figures to quote" in table
    shown = rows_of(table)
    assert len(shown) == len(result["rows"]) >= 3
    first = result["rows"][0]
    for row, cells in zip(result["rows"], shown, strict=True):
        assert row["arm"] in cells.values()
        assert float(cells["ms"].replace(",", "")) == pytest.approx(1000 * row["median"], abs=0.06)
        assert float(cells["× the first"]) == pytest.approx(row["ratio"], abs=0.006)
        assert [float(x) for x in cells["within a turn"].split("–")] == pytest.approx(
            [row["ratio_low"], row["ratio_high"]], abs=0.006
        )
        # The ratio is one of the measured seconds, to the first way of the same case.
        if row["arm"] == first["arm"]:
            first = row
        per_call = [statistics.median(r["seconds"]) / r["calls"] for r in (row, first)]
        assert row["ratio"] == pytest.approx(per_call[0] / per_call[1])
        assert row["ratio_low"] <= row["ratio_high"]
        assert all(seconds > 0 for seconds in row["seconds"])


@pytest.mark.slow
def test_memory_is_the_steps_own(quick: Path) -> None:
    rows = json.loads((quick / "state.json").read_text(encoding="utf-8"))["rows"]
    low_rank = rows[0]
    assert [row["arm"] for row in rows] == ["low-rank", "dense", "dense, in place"]
    for row in rows:
        assert 0 < row["step_bytes"] < row["peak_bytes"]
        assert row["step_ratio"] == pytest.approx(row["step_bytes"] / low_rank["step_bytes"])
        assert row["peak_ratio"] == pytest.approx(row["peak_bytes"] / low_rank["peak_bytes"])


@pytest.mark.slow
def test_presets_are_shown_beside_what_is_said_of_them(quick: Path) -> None:
    result = json.loads((quick / "presets.json").read_text(encoding="utf-8"))
    text = (quick / "tables.md").read_text(encoding="utf-8")
    (table,) = [part for part in text.split("## ") if part.startswith("presets")]
    assert "no figures to quote" in table
    rows = result["rows"]
    assert [row["arm"] for row in rows] == ["lm1b-flm", "lm1b-fmlm", "owt-flm"]
    for row, cells in zip(rows, rows_of(table), strict=True):
        assert cells["preset"] == row["arm"]
        assert float(cells["ms"].replace(",", "")) == pytest.approx(1000 * row["median"], abs=0.06)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["length"] / row["median"])
        assert 0 < row["step_bytes"] < row["peak_bytes"]
        assert int(cells["said"].replace(",", "")) == round(row["expected_bytes"] / 1e6)


def test_presets_are_as_they_are_but_for_the_batch(load: Any) -> None:
    presets = load("presets")
    for case in presets.cases(False, torch.float32):
        assert (case.steps, case.batch, case.micro_batch, case.model) == (20, 2, 1, {})
        recipe, config = load_recipe(case.recipe), case.config
        cost = presets.expected(case)
        assert cost.parameters == cost_of(recipe).parameters > 139e6
        assert config.model == models_of(recipe)[0]
        same = ("objective", "flow", "flow_map", "optim", "clock")
        assert all(getattr(config, name) == getattr(recipe, name) for name in same)


def test_presets_take_their_steps(load: Any) -> None:
    presets = load("presets")
    for case in presets.cases(True, torch.float32):
        trainer = presets.make_trainer(case)
        before = trainer.model.head.weight.detach().clone()
        assert len(presets.work(trainer, case.steps)) == case.steps == 3
        assert not torch.equal(trainer.model.head.weight, before)
        assert sum(p.numel() for p in trainer.model.parameters()) == presets.expected(case).parameters


def test_steps_at_the_published_sizes(load: Any) -> None:
    steps = load("steps")
    for case in steps.cases(False, torch.float32):
        assert case.batch * load_recipe(f"{case.corpus}-flm").model.length == 4096
        for name in ("flm", "mdlm", "fmlm"):
            assert (
                case.preset(name).changed(models_of(load_recipe(f"{case.corpus}-{name}"))[0]).backbone.depth
                == 12
            )
    (case,) = steps.cases(True, torch.float32)
    made = steps.steps_of(case)
    assert list(made) == list(steps.ARMS)
    with torch.no_grad():
        for name in ("FLM", "MDLM"):
            made[name].model.head.weight.normal_()  # zero at the start
    # The head on masked positions alone gives the same loss; V = 512 > 2d, so that the dense states draw another one.
    for pair in (("MDLM", "MDLM, head on masks alone"), ("FLM, dense state", "FLM, dense state in place")):
        losses = []
        for name in pair:
            torch.manual_seed(0)  # of dropout
            losses.append(made[name].loss().detach())
        torch.testing.assert_close(*losses)
    for name, step in made.items():
        before = [p.detach().clone() for p in step.model.parameters() if p.requires_grad]
        assert math.isfinite(step())
        after = [p for p in step.model.parameters() if p.requires_grad]
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), name
    assert made[steps.BLOCKS].model.head.weight.grad is None


def test_times_are_drawn_on_the_cpu_wherever_the_model_is(load: Any) -> None:
    """As in training: a clock moves with its model, and draws do not."""
    model, times = tiny_denoiser(), torch.rand(5, dtype=torch.float64)
    expected, clock = model.clock.time(times), load("training_step").clock_of(model)
    model.to("meta")
    with pytest.raises(RuntimeError):
        model.clock.time(times)
    assert torch.equal(clock.time(times), expected)


def test_a_line_is_found(load: Any) -> None:
    growth = load("growth")
    found = growth.line([1, 2, 4, 8], [3.5, 4.0, 5.0, 7.0])
    assert (found["fixed"], found["each"]) == (pytest.approx(3), pytest.approx(0.5))
    assert found["worst"] < 1e-12
    assert found["power"] == pytest.approx(math.log2(7 / 5))
    assert growth.line([1, 2, 4], [1, 4, 16])["worst"] > 0.2
    assert growth.line([1, 2, 4], [1, 4, 16])["power"] == pytest.approx(2)


def test_operations_are_told_apart(load: Any) -> None:
    bounds = load("bounds")
    kinds = {
        "aten::mm": "products",
        "aten::addmm": "products",
        "aten::add_": "pointwise and sums",
        "aten::mul": "pointwise and sums",
        "aten::_log_softmax": "softmax and cross-entropy",
        "aten::_fused_adamw_": "optimizer",
        "aten::copy_": "copies and casts",
        "aten::somethingelse": "other",
    }
    assert {name: bounds.kind_of(name) for name in kinds} == kinds
    a = torch.randn(300, 300)
    found = bounds.shares(lambda: [a @ a for _ in range(20)])
    assert sum(found.values()) == pytest.approx(1)
    assert next(iter(found)) == "products"


@pytest.mark.slow
def test_growth_and_bounds_are_shown(quick: Path) -> None:
    text = (quick / "tables.md").read_text(encoding="utf-8")
    for name in ("growth", "bounds"):
        rows = json.loads((quick / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        (table,) = [part for part in text.split("## ") if part.startswith(name)]
        shown = rows_of(table)
        assert len(shown) == len(rows) == {"growth": 6, "bounds": 1}[name]
        for row, cells in zip(rows, shown, strict=True):
            assert row["arm"] in cells.values()
            if name == "bounds":
                assert sum(row["shares"].values()) == pytest.approx(1)
                assert row["flops_per_second"] == pytest.approx(row["flops"] / row["median"])
                best = max(row["block_flops"], row["head_flops"])
                assert row["utilisation"] == pytest.approx(row["flops_per_second"] / best)
            else:
                by_point = [statistics.median(point) for point in zip(*row["seconds"], strict=True)]
                assert row["medians"] == pytest.approx(by_point)
                assert all(seconds > 0 for seconds in row["medians"])


def test_every_objective_takes_its_step(load: Any) -> None:
    distillation = load("distillation")
    (case,) = distillation.cases(True, torch.float32)
    for arm, options in distillation.ARMS.items():
        step = distillation.step_of(case, arm)
        name = "weight" if arm == distillation.CORRECTION else "head.weight"
        before = step.model.get_parameter(name).detach().clone()
        assert step() > 0
        assert not torch.equal(step.model.get_parameter(name), before)
        if options is not None:
            assert step.objective.identity == options.get("identity", "psd")
            assert step.objective.config.derivative == options.get("derivative", "difference")
    assert {
        options.get("identity", "psd") for options in distillation.ARMS.values() if options is not None
    } == {*IDENTITIES}


@pytest.mark.slow
def test_speeds_follow_from_the_seconds(quick: Path) -> None:
    for row in json.loads((quick / "state.json").read_text(encoding="utf-8"))["rows"]:
        tokens = row["batch"] * row["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / statistics.median(row["seconds"]))
    for row in json.loads((quick / "tokenising.json").read_text(encoding="utf-8"))["rows"]:
        assert row["texts_per_second"] == pytest.approx(row["texts"] / statistics.median(row["seconds"]))
    for row in json.loads((quick / "generation.json").read_text(encoding="utf-8"))["rows"]:
        # All calls of a passage count in its tokens per second.
        tokens = row["batch"] * row["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / statistics.median(row["seconds"]))
        assert row["calls"] == (4 if row["arm"] == "generate, 4 calls" else 1)


def test_ways_take_turns(load: Any) -> None:
    measure = load("measure")
    ran: list[str] = []
    # A step takes 1 second with a, 3 with b; b does the thing twice in it. Between two runs pass 10 seconds.
    took = {"a": 1.0, "b": 3.0}
    now = itertools.count()

    def clock() -> float:
        i = next(now)
        return 10.0 * i + (took[ran[-1]] if i % 2 else 0.0) - (10.0 if i % 2 else 0.0)

    a, b = measure.compare(
        {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, calls={"b": 2}, clock=clock
    )
    assert ran == ["a", "b"] + ["a", "b"] * 3
    assert a["seconds"] == pytest.approx([1, 1, 1])
    assert b["seconds"] == pytest.approx([3, 3, 3])
    assert (a["median"], b["median"]) == (pytest.approx(1), pytest.approx(1.5))
    assert b["ratio"] == b["ratio_low"] == b["ratio_high"] == pytest.approx(1.5)


def test_the_spread_is_that_of_the_turns(load: Any) -> None:
    times = iter([0, 1, 0, 1, 0, 2, 0, 8, 0, 4, 0, 12])
    a, b = load("measure").compare({"a": int, "b": int}, 3, clock=lambda: next(times))
    assert (a["seconds"], b["seconds"]) == ([1, 2, 4], [1, 8, 12])
    assert (b["ratio"], b["ratio_low"], b["ratio_high"]) == (4, 1, 4)


def test_no_repeats_are_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        load("measure").compare({"a": int}, 0)


def test_a_peak_that_is_the_parents_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = load("measure")
    monkeypatch.setattr(measure, "resident_peak", lambda: 12345)
    with pytest.raises(RuntimeError, match=r"12345 bytes.*memory has to be measured before anything large"):
        measure.report_memory(lambda: None, lambda _: None)


@pytest.mark.slow
def test_a_peak_counts_what_the_work_took(tmp_path: Path) -> None:
    script = tmp_path / "take.py"
    script.write_text(
        "import sys, measure\n"
        "measure.report_memory(lambda: b'x' * 50 * 2**20, lambda _: b'x' * (int(sys.argv[1]) * 2**20))\n"
    )
    # From a process between, so that the memory of these tests does not count.
    code = (
        "import measure, pathlib, sys\n"
        "print(*(x for size in (100, 200) for x in measure.memory_of(pathlib.Path(sys.argv[1]), str(size))))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    small, own_of_small, large, own_of_large = map(int, done.stdout.split())
    assert large - small == pytest.approx(100 * 2**20, rel=0.2)
    assert own_of_small == pytest.approx(100 * 2**20, rel=0.2)
    assert own_of_large == pytest.approx(200 * 2**20, rel=0.2)
    assert own_of_large < large - 50 * 2**20


def test_a_script_that_fails_is_said(load: Any, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such case')")
    with pytest.raises(RuntimeError, match=r"(?s)fails.py some case ended with status 1.*no such case"):
        load("measure").memory_of(script, "some", "case")


def test_both_states_are_one_computation(load: Any) -> None:
    state = load("state")
    case = dataclasses.replace(state.cases(True, torch.float32)[0], vocab=64)  # V = 2d: the package draws z
    steps = state.steps_of(case)
    model = steps["low-rank"].model
    with torch.no_grad():
        model.head.weight.normal_()  # zero at the start, with no gradient for E
    found = {}
    for name, step in steps.items():
        loss = step.loss()
        model.zero_grad()
        loss.backward()
        found[name] = loss.detach(), model.embedding.grad.clone()
    loss, gradient = found["low-rank"]
    assert gradient.abs().max() > 0
    for other, other_gradient in found.values():
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(other_gradient, gradient)


def test_above_2d_the_dense_states_agree_and_the_package_draws_no_z(load: Any) -> None:
    state = load("state")
    (case,) = state.cases(True, torch.float32)
    steps = state.steps_of(case)
    torch.testing.assert_close(steps["dense"].loss(), steps["dense, in place"].loss())
    steps["low-rank"].loss()
    assert steps["low-rank"].objective.noise_width == case.width < case.vocab


def test_generation_is_compared_with_its_own_network(load: Any) -> None:
    generation = load("generation")
    model = generation.make_model(64, 8, 32, 1)
    model.denoiser.local = None  # nothing but backbone and head is left to read the state
    model.denoiser.config = dataclasses.replace(model.denoiser.config, local_posterior=False)
    ways = generation.ways(model, 4, 2, torch.float32)
    assert list(ways) == [
        "backbone and head",
        "one call of the denoiser",
        "generate, 1 call",
        "generate, 2 calls",
    ]
    # The gates are zero at the start, so that the conditioning changes nothing: both see the same hidden state.
    assert torch.equal(ways["backbone and head"](), ways["one call of the denoiser"]())
    assert [len(ways[name]()) for name in ("generate, 1 call", "generate, 2 calls")] == [4, 4]
    assert any(text for text in ways["generate, 1 call"]())


def test_encoders_give_the_same_ids(load: Any, tmp_path: Path) -> None:
    import tokenizers

    from flowlm.data.tokens import Tokenizer

    texts = ["the cat saw a dog.", "a dog saw the cat."]
    own = Tokenizer.train_words(texts)
    own.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ways = load("tokenising").encoders(lambda: own, plain, texts)
    assert len(ways) == 3
    assert all(way() == own.encode(texts) for way in ways.values())


def test_the_command_line(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = load("run")
    assert run.parse([]).what == "all"
    assert run.parse(["state", "--quick"]).quick
    with pytest.raises(SystemExit):
        run.parse(["speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.parse(["--threads", "-1"])
    assert "--threads -1: give at least 1" in capsys.readouterr().err


def test_machines_do_not_share_a_folder(load: Any) -> None:
    run = load("run")
    here = {"cpu": "Some(R) CPU @ 2.10GHz", "threads": 2, "dtype": "float32"}
    assert run.folder_name(here) == "some-r-cpu-2-10ghz-2-threads-float32"
    assert run.folder_name(here | {"threads": 4}) != run.folder_name(here)
    on_gpu = run.folder_name(here | {"gpu": "NVIDIA H200"})
    assert on_gpu == "nvidia-h200-some-r-cpu-2-10ghz-2-threads-float32"


COMMITTED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").iterdir())


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_what_was_measured_is_what_is_wanted(folder: Path) -> None:
    """Of the committed figures alone, where there are any: nothing is timed here."""
    measured = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    assert measured
    assert not any(one["quick"] for one in measured.values())
    if "state" in measured:
        rows = [
            row
            for row in measured["state"]["rows"]
            if row["vocab"] > 2 * row["width"] and row["arm"] != "low-rank"
        ]
        assert {row["vocab"] for row in rows} == {8192, 50257}
        for row in rows:
            assert row["ratio"] >= 1, "the low-rank state is never slower"
            if row["vocab"] == 50257 and row["arm"] == "dense":
                assert row["ratio"] >= 1.5
                assert row["peak_ratio"] > 2
    if "distillation" in measured:
        semigroup = [row for row in measured["distillation"]["rows"] if row["arm"] == "PSD"]
        assert semigroup
        assert all(row["ratio"] <= 1.75 for row in semigroup)
