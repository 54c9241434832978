"""On a GPU: what the other tests show on the CPU holds there too. Skipped where torch sees no CUDA device."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowlm import FlowLM, rng
from flowlm.config import RunConfig, from_dict
from flowlm.training.loop import Trainer, open_run
from helpers import begin, flm, map_settings, map_values, settings, silent, trained

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device"
)

GPU = {"train.device": "cuda", "train.dtype": "bfloat16"}
SINGLE = {"train.device": "cuda", "train.dtype": "float32"}
FAMILIES = ("flow", "flow-map", "ar", "mdlm", "sedd", "duo")
STUDENTS = {"sdtt": "mdlm", "duo-dcd": "duo", "di4c": "mdlm"}


@pytest.fixture
def strict() -> Iterator[None]:
    """Within it whoever waits for the GPU fails."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_writes(name: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", settings({"objective": name, **GPU}))
    on_gpu = FlowLM.from_pretrained(run, device="cuda")
    assert on_gpu.denoiser.embedding.device.type == "cuda"
    assert len(on_gpu.generate(3, seed=1)) == 3
    # What was trained there is read anywhere.
    assert len(FlowLM.from_pretrained(run, device="cpu").generate(2, seed=1)) == 2


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_a_discrete_model(name: str, tmp_path: Path) -> None:
    teacher = trained(tmp_path / "teacher", settings({"objective": STUDENTS[name], **GPU}))
    run = trained(tmp_path / "run", from_dict(RunConfig, map_values(teacher, GPU) | {"objective": name}))
    assert len(FlowLM.from_pretrained(run, device="cuda").generate(2, seed=1)) == 2


def test_a_resume_moves_between_devices(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", settings({"train.steps": 4, **GPU}))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('device = "cuda"', 'device = "cpu"'))
    trainer = open_run(run, say=silent)
    assert trainer.step == 4
    assert trainer.device.type == "cpu"


@pytest.mark.parametrize("identity", ["psd", "lsd", "esd", "esd-logit", "cfm"])
def test_a_step_waits_for_nothing(identity: str, tmp_path: Path, strict: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    trainer = begin(tmp_path / "run", map_settings(flm(), {"flow_map.identity": identity, **GPU}))
    trainer.update()  # the optimizer makes its moments
    torch.cuda.set_sync_debug_mode("error")
    trainer.update()


@pytest.mark.parametrize("name", ["flow", "flow-map", "mdlm", "duo"])
def test_losses_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    here = begin(tmp_path / "cpu", settings({"objective": name}))
    there = begin(tmp_path / "gpu", settings({"objective": name, **SINGLE}))
    tokens = here.loader.batch(0)
    draws = here.objective.draw(len(tokens), rng.generator(0, "draw", 0))
    if "seed" in draws:
        # Noise of a seed differs between devices: the plain bound has none.
        here.objective.soft = there.objective.soft = False  # type: ignore[attr-defined]
    found = []
    for trainer in (here, there):
        trainer.model.eval()
        if name != "duo":
            trainer.objective.prepare(trainer.model)
        rows = [(0, "noise", 0, i) for i in range(len(tokens))]
        noise = here.objective.noise(rows, tokens.shape[1], torch.device("cpu")).to(trainer.device)
        losses = trainer.objective.losses(trainer.model, tokens.to(trainer.device), noise, copy.copy(draws))
        found.append(losses.detach().float().cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_noise_is_drawn_there_and_keyed_by_row() -> None:
    device = torch.device("cuda")
    whole = rng.normal_rows([(0, i) for i in range(4)], (3, 5), device)
    part = rng.normal_rows([(0, i) for i in range(2, 4)], (3, 5), device)
    assert whole.device.type == "cuda"
    assert torch.equal(whole[2:], part)
    assert rng.uniform_rows([(0, 1)], (7,), device).dtype == torch.float64


def test_benchmarks_run_there(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "run.py"
    asked = ["--quick", "--device", "cuda", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *asked], check=True)
    (folder,) = (path for path in tmp_path.iterdir() if (path / "steps.json").exists())
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["machine"]["gpu"] == torch.cuda.get_device_name()


def test_a_compiled_step_is_the_eager_one(tmp_path: Path) -> None:
    losses = []
    for name in (False, True):
        trainer = Trainer(settings({"train.compile": name, **SINGLE}), tmp_path / str(name), say=silent)
        losses.append([trainer.optimize()[0] for trainer.step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
