"""A training step asks a GPU for nothing until it is over: no number, no shape that depends on one, no copy back; and
at the published sizes it makes no tensor of batch × length × vocabulary.

Torch's device of shapes alone stands for the GPU. It has no numbers, so whoever asks for one fails, and no memory.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowlm import rng
from flowlm.config import RunConfig, from_dict, load_recipe
from flowlm.training import distributed
from flowlm.training.loop import Trainer
from helpers import LargestTensor, flm, map_settings, map_values, settings, silent, trained

LOW_RANK = {"model.backbone.width": 8, "model.backbone.heads": 1}  # V = 17 > 2d
OUTSIDE = {
    "flow_map.loss": "squared-error",
    "flow_map.diagonal": 0.0,
    "flow_map.freeze_embedding": True,
}
#: Objectives without a teacher, with what their recipes say beside.
ALONE: dict[str, dict[str, Any]] = {
    "flow": {},
    "flow, low rank": LOW_RANK,
    "flow, frozen random embedding": {"model.state": "random"},
    "flow, adaptive clock": {"clock.kind": "adaptive"},
    "flow map": {"objective": "flow-map"},
    **{name: {"objective": name} for name in ("ar", "mdlm", "sedd", "duo")},
}
#: Identities of the flow map, and what else a recipe may change.
MAPS: dict[str, dict[str, Any]] = {
    **{name: {"flow_map.identity": name} for name in ("psd", "lsd", "lsd-logit", "esd", "esd-logit", "cfm")},
    "squared errors": {"flow_map.identity": "esd", "flow_map.loss": "squared-error"},
    "the averaged student's targets": {
        "flow_map.target": "averaged",
        "flow_map.boundary_target": "teacher",
        "flow_map.freeze_embedding": True,
    },
    "forward-mode derivatives": {"flow_map.identity": "lsd", "flow_map.derivative": "jvp"},
}
STUDENTS = {"sdtt": "mdlm", "duo-dcd": "duo", "di4c": "mdlm"}
PRESETS = ("flm", "fmlm", "ar", "mdlm", "duo", "sdtt", "duo-dcd")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From this call on models live on the device of shapes."""

    def rows(
        draw: Any,
        rows: Iterable[tuple[int | str, ...]],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        return torch.empty(len(list(rows)), *shape, dtype=dtype, device=device)

    def now() -> None:
        monkeypatch.setattr(distributed, "resolve_device", lambda name: torch.device("meta"))
        # Neither generators, nor autocast, nor fused optimizers know this device.
        monkeypatch.setattr(rng, "_rows", rows)
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        adamw = torch.optim.AdamW
        monkeypatch.setattr(
            torch.optim, "AdamW", lambda p, **options: adamw(p, **(options | {"fused": False}))
        )

    return now


def _steps(config: RunConfig, folder: Path) -> None:
    trainer = Trainer(config, folder, say=silent)
    assert trainer.model.embedding.device.type == "meta"
    for value in trainer.update():
        assert value.device.type == "meta"


def test_what_stands_for_a_gpu_tells_nothing() -> None:
    number = torch.ones((), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        number.item()
    with pytest.raises(NotImplementedError):
        number.cpu()
    with pytest.raises((RuntimeError, NotImplementedError)):
        number[None].nonzero()


@pytest.mark.parametrize("name", ALONE)
def test_without_a_teacher(name: str, tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    elsewhere()
    _steps(settings(ALONE[name]), tmp_path)


@pytest.mark.parametrize("name", MAPS)
def test_flow_maps(name: str, tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    config = map_settings(flm(), MAPS[name])
    elsewhere()
    _steps(config, tmp_path)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_discrete_models(name: str, tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    teacher = trained(tmp_path / "teacher", settings({"objective": STUDENTS[name], "train.steps": 1}))
    config = from_dict(RunConfig, map_values(teacher) | {"objective": name})
    elsewhere()
    _steps(config, tmp_path / "run")


def test_two_stages(tmp_path: Path, elsewhere: Callable[[], None]) -> None:
    first = from_dict(RunConfig, map_values(flm(), OUTSIDE) | {"objective": "correction"})
    second = OUTSIDE | {"flow_map.identity": "correction", "flow_map.diagonal": 0.5}
    config = map_settings(trained(tmp_path / "corrected", first), second)
    elsewhere()
    _steps(first, tmp_path / "first")
    _steps(config, tmp_path / "second")


@pytest.mark.parametrize("corpus", ["lm1b", "owt"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_at_their_size(
    corpus: str, name: str, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    presets = importlib.import_module("presets")
    recipe = load_recipe(f"{corpus}-{name}")
    rows = recipe.train.micro_batch or recipe.train.batch
    case = presets.Case(f"{corpus}-{name}", batch=rows, micro_batch=rows)
    elsewhere()
    trainer = presets.make_trainer(case)
    shape = trainer.config.model
    assert (shape.length, shape.vocab_size) == {"lm1b": (128, 30522), "owt": (1024, 50258)}[corpus]
    with LargestTensor() as largest:
        loss, _ = trainer.update()
    assert loss.device.type == "meta"
    assert largest.numel >= shape.vocab_size * shape.backbone.width  # the gradient of the head
    assert largest.numel < rows * shape.length * shape.vocab_size / 3
