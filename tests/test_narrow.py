"""A device that refuses float64, as MPS does: the CPU stands for one, and whoever makes float64 of less fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowlm import FlowLM, device
from flowlm.config import RunConfig, from_dict
from helpers import begin, flm, map_settings, map_values, settings, trained

STUDENTS = {"sdtt": "mdlm", "duo-dcd": "duo", "di4c": "mdlm", "duo-di4c": "duo"}
NARROWER = (torch.float32, torch.bfloat16, torch.float16)


class NoFloat64(TorchDispatchMode):
    """Refuses to widen a tensor of less to float64, and to compute with both: on the device there is but one of them.
    What starts as float64 is a table or a draw of the CPU's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()
        }
        made = {leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        if torch.float64 in made and given & {*NARROWER}:
            raise RuntimeError(f"{func} makes float64 of {given}")
        return out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "NARROW", {"cpu"})


def test_the_stand_in_refuses() -> None:
    with NoFloat64():
        torch.zeros(2, dtype=torch.float64).float()
        for make in (lambda x: x.double(), lambda x: x + torch.ones(2, dtype=torch.float64)):
            with pytest.raises(RuntimeError, match="makes float64"):
                make(torch.zeros(2))


def _works(folder: Path, config: RunConfig) -> None:
    trainer = begin(folder / "run", config)
    with NoFloat64():
        for _ in range(2):
            trainer.update()
            trainer.step += 1
        trainer.held_out()
    assert trainer.train().finished
    model = FlowLM.from_pretrained(folder / "run")
    with NoFloat64():
        assert len(model.generate(2, steps=3, seed=1)) == 2


@pytest.mark.parametrize("name", ["flow", "flow-map", "ar", "mdlm", "sedd", "duo"])
def test_a_family_works(narrow: None, tmp_path: Path, name: str) -> None:
    _works(tmp_path, settings({"objective": name}))


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_works(narrow: None, tmp_path: Path, name: str) -> None:
    teacher = trained(tmp_path / "teacher", settings({"objective": STUDENTS[name]}))
    _works(tmp_path, from_dict(RunConfig, map_values(teacher) | {"objective": name}))


@pytest.mark.parametrize(
    "over",
    [
        *({"flow_map.identity": name} for name in ("psd", "lsd", "lsd-logit", "esd", "esd-logit", "cfm")),
        {"flow_map.boundary_target": "teacher"},
        {"flow_map.diagonal_target": "teacher"},
    ],
    ids=str,
)
def test_a_flow_map_works(narrow: None, tmp_path: Path, over: dict[str, Any]) -> None:
    _works(tmp_path, map_settings(flm(), over))


def test_a_state_of_low_rank_works(narrow: None, tmp_path: Path) -> None:
    """V > 2d: noise is drawn through factors of the embeddings, of a student's beside its teacher's."""
    teacher = trained(tmp_path / "teacher", settings({"model.backbone.width": 8}))
    with NoFloat64():
        assert len(FlowLM.from_pretrained(teacher).generate(2, steps=3, seed=1)) == 2
    _works(tmp_path, map_settings(teacher, {"flow_map.diagonal_target": "teacher"}))


@pytest.mark.parametrize("over", [{"clock.kind": "adaptive"}, {"model.state": "embedding"}], ids=str)
def test_a_flow_works(narrow: None, tmp_path: Path, over: dict[str, Any]) -> None:
    _works(tmp_path, settings(over))
