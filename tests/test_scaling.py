"""What docs/scaling.md says of many GPUs is what its formulas give, and these are right where they can be checked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from flowlm.config import load_recipe
from flowlm.cost import cost_of

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("scaling")


def test_the_page_is_what_the_formulas_give(scaling: Any) -> None:
    page = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.written(page) == page
    assert page.count(scaling.BEGIN) == page.count(scaling.END) == 1
    # What the text says of the assumptions is what they are.
    machine = scaling.Machine()
    assert f"{machine.flops / 1e12:.0f} TFLOP/s" in page
    assert f"{100 * machine.used:.0f} % is reached" in page
    assert f"{machine.inside / 1e9:.0f} GB/s per GPU and direction" in page
    assert f"{machine.between / 1e9:.0f} GB/s per GPU between" in page
    assert f"at {machine.written / 1e12:.0f} TB/s with {machine.launch * 1e6:.0f} µs more" in page
    assert f"{scaling.STATE_BYTES} bytes for each parameter" in page
    for recipe in scaling.RECIPES:
        assert load_recipe(recipe).train.batch == 512
    assert "batch 512 over all GPUs" in page


def test_what_the_page_says_of_its_tables(scaling: Any) -> None:
    for recipe in scaling.RECIPES:
        node, nodes, many = (scaling.Step(recipe, gpus) for gpus in scaling.GPUS)
        assert node.drawing < 0.05 * node.computing
        assert nodes.efficiency < 0.5
        assert many.rows == 1
        assert many.least_batch > nodes.least_batch > 512
        assert many.machine.seconds(scaling.muon_flops(recipe)) > many.computing
        assert node.gathering > node.communicating
        assert max(step.memory() for step in (node, nodes, many)) < 50e9  # of an H200's 141
        assert all(step.memory(True) < step.memory() for step in (node, nodes, many))
    page = scaling.DOCUMENT.read_text(encoding="utf-8")
    short, long = (scaling.Step(recipe, scaling.GPUS[0]) for recipe in scaling.RECIPES)
    assert f"leave computing {100 * long.efficiency:.0f} % of the time" in page
    assert f"those of 128 tokens {100 * short.efficiency:.0f} %" in page


def test_a_ring_by_hand(scaling: Any) -> None:
    machine = scaling.Machine(inside=4.0, between=1.0)
    assert machine.passed(2, 8.0, 2) == 2 * 0.5 * 8 / 4
    assert machine.passed(3, 8.0, 16) == 3 * 15 / 16 * 8 / 1  # it leaves the node
    step = scaling.Step("lm1b-flm", 1, 4)
    assert step.communicating == step.gathering == 0
    assert step.rows == step.micro_batch == 4


def test_one_gpu_is_what_flowlm_info_says(scaling: Any) -> None:
    """A step of all of a recipe's batch on one GPU is the recipe's own; with half of it, half of that."""
    for recipe in scaling.RECIPES:
        whole = cost_of(load_recipe(recipe))
        step = scaling.Step(recipe, 1)
        assert step.cost == whole
        assert step.memory() == whole.memory.total
        assert scaling.Step(recipe, 2).cost.step_flops == pytest.approx(whole.step_flops / 2, rel=0.01)
        parts = load_recipe(recipe).train.batch // step.micro_batch
        two = scaling.Step(recipe, 2)
        assert two.gathering / two.communicating == pytest.approx(1.5 * parts / 2)


def test_the_batch_that_is_named_is_the_least(scaling: Any) -> None:
    for recipe in scaling.RECIPES:
        least = scaling.Step(recipe, 64).least_batch
        enough, less = scaling.Step(recipe, 64, least), scaling.Step(recipe, 64, least - 64)
        assert enough.communicating <= scaling.TOLERATED * enough.computing
        assert less.communicating > scaling.TOLERATED * less.computing
