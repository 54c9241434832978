"""Every family through the same train, resume, generate and evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flowlm.config import RunConfig, from_dict
from flowlm.families import NAMES, family
from flowlm.model import FlowLM
from flowlm.weights import read_tensors
from helpers import begin, command, content, map_values, recipe, said, settings, trained

DISCRETE = ("ar", "mdlm", "sedd", "duo")


def over(name: str) -> dict[str, Any]:
    return {"objective": name, "train.steps": 6, "train.save_every": 3, "train.eval_every": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: trained(folder / name, settings(over(name))) for name in DISCRETE}


def test_all_have_what_tables_need() -> None:
    labels = [family(name).label for name in NAMES]
    assert len(set(labels)) == len(labels)
    assert all(family(name).name == name for name in NAMES)
    with pytest.raises(ValueError, match="objective = 'gan': use 'flow', 'flow-map', 'ar'"):
        family("gan")


@pytest.mark.parametrize("name", DISCRETE)
def test_a_passage_depends_on_its_number_alone(name: str, runs: dict[str, Path]) -> None:
    model = FlowLM.from_pretrained(runs[name])
    assert model.family.label == family(name).label
    whole = torch.cat([part.tokens for part in model.generate_in_parts(7, 3, seed=2)])
    parts = torch.cat([part.tokens for part in model.generate_in_parts(7, 3, seed=2, batch=2)])
    assert torch.equal(whole, parts)
    later = torch.cat([part.tokens for part in model.generate_in_parts(3, 3, seed=2, first=4)])
    assert torch.equal(whole[4:], later)
    assert int(whole.max()) < model.tokenizer.vocab_size
    assert not torch.equal(whole, torch.cat([p.tokens for p in model.generate_in_parts(7, 3, seed=3)]))


@pytest.mark.parametrize("name", DISCRETE)
def test_a_resumed_run_is_the_same(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / name
    shutil.copytree(runs[name], run)
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    assert command("train", "--resume", run) == 0
    mine, whole = content(run), content(runs[name])
    assert mine.keys() == whole.keys()
    assert [path for path in whole if mine[path] != whole[path]] == []


@pytest.mark.parametrize("name", DISCRETE)
def test_on_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert command("train", recipe(tmp_path / "r.toml", over(name)), "--out", run) == 0
    assert command("generate", run, "--num", "2", "--steps", "2") == 0
    assert command("info", run) == 0
    assert f"{family(name).label} ({family(name).about})" in said(capsys)
    assert command("evaluate", run, "--steps", "1,2", "--num", "8", "--json", tmp_path / "rows.json") == 0
    rows = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["nfe"]]
    assert [row["nfe"] for row in rows] == ([12] if name == "ar" else [1, 2])
    assert {row["model"] for row in rows} == {family(name).label}
    assert rows[0]["sampler"] == dict(family(name).options)
    assert command("generate", run, "--num", "2", "--gamma", "0.5") == 1
    assert f"{family(name).label} has no sampler option gamma" in said(capsys)


def test_what_is_for_flows_is_refused() -> None:
    for option, value in (("model.prior_rank", 3), ("model.clock", "uniform"), ("clock.kind", "adaptive")):
        with pytest.raises(ValueError, match="is for flows"):
            settings({"objective": "mdlm", option: value})
    with pytest.raises(ValueError, match="learns from data alone: use 'flow-map', 'sdtt', 'duo-dcd'"):
        settings({"objective": "mdlm", "teacher": "x"})


def test_weights_of_another_family(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of the family 'mdlm', and 'flow' needs one of 'flow'"):
        trained(tmp_path / "run", settings({"init": str(runs["mdlm"]), "train.steps": 1}))


STUDENTS = {"sdtt": "mdlm", "duo-dcd": "duo"}
ROUNDS = {"rounds.rounds": 3, "rounds.start": 4}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_learns_in_rounds(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """A new round's teacher is the averaged student; a resume in the middle of a round changes nothing."""
    config = from_dict(
        RunConfig, map_values(runs[STUDENTS[name]], {**over(name), **ROUNDS}) | {"objective": name}
    )
    run = trained(tmp_path / "run", config)
    model = FlowLM.from_pretrained(run)
    assert model.family.label == family(name).label
    assert len(set(model.generate(4, 2))) > 1
    # Six steps in three rounds: the third checkpoint is in the middle of the second.
    found = read_tensors(run / "checkpoints" / f"step-{3:08d}" / "objective.safetensors")
    assert int(found["round"]) == 1
    start = read_tensors(runs[STUDENTS[name]] / "ema.safetensors")
    assert not torch.equal(found["teacher.head.weight"], start["head.weight"])
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(max((resumed / "checkpoints").iterdir()))
    assert command("distill", "--resume", resumed) == 0
    mine, whole = content(resumed), content(run)
    assert [path for path in whole if mine[path] != whole[path]] == []


@pytest.mark.parametrize("name", STUDENTS)
def test_the_next_teacher_is_the_averaged_student(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    config = from_dict(
        RunConfig, map_values(runs[STUDENTS[name]], {**over(name), **ROUNDS}) | {"objective": name}
    )
    trainer = begin(tmp_path / "run", config)
    for trainer.step in range(2):
        trainer.optimize()
    averaged = {key: value.clone() for key, value in trainer.ema.model.state_dict().items()}
    # one teacher, of the held-out loss too, and compiled with the others
    assert trainer._held_out_objective is trainer.objective
    assert trainer.objective.networks() == [trainer.objective.rounds.teacher]  # type: ignore[attr-defined]
    trainer.step = 2
    trainer.optimize()
    teacher = trainer.objective.rounds.teacher.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(teacher[key], averaged[key]) for key in averaged)
    assert not torch.equal(teacher["head.weight"], trainer.ema.model.state_dict()["head.weight"])


def test_a_student_needs_its_teacher(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective = 'sdtt' learns from a teacher alone"):
        trained(tmp_path / "a", settings({**over("sdtt"), **ROUNDS}))
    with pytest.raises(ValueError, match="is of the family 'duo', and 'sdtt' needs one of 'mdlm'"):
        trained(tmp_path / "b", from_dict(RunConfig, map_values(runs["duo"]) | {"objective": "sdtt"}))
    with pytest.raises(ValueError, match="a round needs a step"):
        settings({"objective": "sdtt", "train.steps": 3})
    with pytest.raises(ValueError, match="step over the whole way at once; give at most 3 rounds"):
        settings({"rounds.rounds": 4, "rounds.start": 4})
