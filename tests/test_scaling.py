"""What docs/scaling.md says of many GPUs is what its formulas give, and these are right where they can be checked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from flowlm.training.flops import flops_of_step
from helpers import settings

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
    machine, model = scaling.Machine(), scaling.MODELS[0]
    assert f"{machine.flops / 1e12:.0f} TFLOP/s" in page
    assert f"{100 * machine.used:.0f} % is reached" in page
    assert f"{machine.inside / 1e9:.0f} GB/s per GPU and direction" in page
    assert f"{machine.between / 1e9:.0f} GB/s per GPU between" in page
    assert f"at {machine.written / 1e12:.0f} TB/s with {machine.launch * 1e6:.0f} µs more" in page
    assert f"{model.parameters / 1e6:.0f} million parameters" in page
    assert f"width {model.width}, {model.depth} blocks" in page
    assert f"batch {scaling.BATCH} over" in page
    assert f"{scaling.STATE_BYTES} bytes for each parameter" in page
    assert f"{scaling.KEPT} d bytes" in page


def test_what_the_page_says_of_its_tables(scaling: Any) -> None:
    for model in scaling.MODELS:
        node, nodes, many = (scaling.Step(model, gpus, scaling.BATCH) for gpus in scaling.GPUS)
        assert node.bottleneck == "Muon"
        assert node.drawing < 0.05 * node.computing
        assert nodes.efficiency < 0.5
        assert many.rows == 1
        assert many.bottleneck == "all-reduce"
        assert many.least_batch > nodes.least_batch > scaling.BATCH
        assert many.muon > many.computing
        assert many.muon == node.muon
    short, long = (scaling.Step(model, scaling.GPUS[0], scaling.BATCH) for model in scaling.MODELS)
    assert f"leave computing {100 * long.efficiency:.0f} % of the time" in scaling.DOCUMENT.read_text(
        encoding="utf-8"
    )
    assert 0.3 < 1 - short.efficiency < 0.36  # a third


def test_a_ring_by_hand(scaling: Any) -> None:
    machine = scaling.Machine(inside=4.0, between=1.0)
    assert machine.all_reduce(8.0, 2) == 2 * 0.5 * 8 / 4
    assert machine.all_reduce(8.0, 16) == 2 * 15 / 16 * 8 / 1  # it leaves the node
    step = scaling.Step(scaling.MODELS[0], 1, 4)
    assert step.communicating == 0
    assert step.rows == 4
    whole = step.memory(False, 1) - step.model.length * step.model.activation_bytes_per_token
    assert whole == 20 * step.model.parameters


def test_the_batch_that_is_named_is_the_least(scaling: Any) -> None:
    for model in scaling.MODELS:
        least = scaling.Step(model, 64, scaling.BATCH).least_batch
        enough, less = scaling.Step(model, 64, least), scaling.Step(model, 64, least - 64)
        assert enough.communicating <= scaling.TOLERATED * enough.computing
        assert less.communicating > scaling.TOLERATED * less.computing


@pytest.mark.slow
def test_operations_are_those_that_torch_counts(scaling: Any) -> None:
    shape = {"length": 32, "backbone.width": 64, "backbone.depth": 2, "backbone.mlp_ratio": 4.0}
    over = {f"model.{name}": value for name, value in shape.items()}
    # Pieces of bytes have at least 256 tokens, so that the head is of some weight.
    text = {"data.tokenizer": "bpe", "data.vocab_size": 384, "optim.muon_lr": 0.0}
    config = settings({**over, **text, "model.local_posterior": False})
    counted = flops_of_step(config) / (config.train.batch * 32)
    model = scaling.Model(384, 32, 1e6, width=64, depth=2, told_apart=-1)
    assert counted == pytest.approx(model.flops_per_token, rel=0.1)
