"""Models by name on the hub: what is asked of it, and what is said where it cannot be reached."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from flowlm import FlowLM
from flowlm.card import export
from flowlm.hub import fetch_file, located, push
from helpers import command, flm, fmlm, said


class Hub:
    """Stands for the hub: repositories are folders, and only what may be fetched or pushed is."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[Any] = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        self.asked.append((repo, private, exist_ok))

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        revision: str | None,
        allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> str:
        target = self.folder / repo_id
        target.mkdir(parents=True, exist_ok=True)
        there = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns):
            (target / name).unlink()
        files = [
            path.relative_to(folder_path).as_posix()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        ]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, target / name)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo, revision))
        return str(self.folder / repo)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    out = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: out)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", out.snapshot_download)
    return out


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_model_goes_there_and_comes_back(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command("export", fmlm(), "--out", out, "--push", "somebody/one-step", "--private") == 0
    assert "pushed to https://hub/somebody/one-step" in said(capsys)
    assert hub.asked == [("somebody/one-step", True, True)]
    names = {path.name for path in (hub.folder / "somebody/one-step").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    texts = FlowLM.from_pretrained(fmlm()).generate(3, seed=1)
    assert FlowLM.from_pretrained("hf://somebody/one-step@v1").generate(3, seed=1) == texts
    assert hub.asked[-1] == ("somebody/one-step", "v1")
    capsys.readouterr()
    assert (
        command("generate", "hf://somebody/one-step", "--num", "3", "--seed", "1", "--dtype", "float32") == 0
    )
    assert capsys.readouterr().out == "".join(f"{text}\n\n" for text in texts)


def test_only_the_model_goes_there(hub: Hub, tmp_path: Path) -> None:
    """Its text with it, if that was exported; nothing that lies beside it, and nothing of a run's checkpoints."""
    out = tmp_path / "out"
    assert command("export", fmlm(), "--out", out, "--text") == 0
    made = {path.name for path in out.iterdir()}
    for name in ("secrets.json", "sub/creds.json", "checkpoints/step-00000001/optimizer.safetensors"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    push(out, "somebody/else")
    there = hub.folder / "somebody/else"
    assert {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()} == made
    assert "rows.npz" in made


def test_nothing_of_another_model_stays_there(hub: Hub) -> None:
    """Of a run the averaged weights are read first: left there, they would be taken for those of what comes after."""
    push(fmlm(), "somebody/again")
    there = hub.folder / "somebody/again"
    assert (there / "ema.safetensors").exists()
    (there / "LICENSE").write_text("mine")
    model = FlowLM.from_pretrained(fmlm(), weights="model")
    model.push_to_hub("somebody/again")
    assert FlowLM.from_pretrained("hf://somebody/again").generate(2) == model.generate(2)
    assert not (there / "ema.safetensors").exists()
    assert (there / "LICENSE").exists()


def test_a_model_in_hand_is_pushed(hub: Hub) -> None:
    model = FlowLM.from_pretrained(fmlm())
    assert model.push_to_hub("somebody/again") == "https://hub/somebody/again"
    again = FlowLM.from_pretrained("hf://somebody/again")
    assert again.generate(2) == model.generate(2)


def test_a_model_in_hand_has_its_card(hub: Hub, tmp_path: Path) -> None:
    """Of how its run made it; of weights that no run holds, that this is not known."""
    model = FlowLM.from_pretrained(fmlm())
    model.push_to_hub("somebody/mine", licence="apache-2.0")
    card = (hub.folder / "somebody/mine/README.md").read_text()
    assert card.startswith("---\nlibrary_name: flowlm\n")
    assert "license: apache-2.0\n---\n\n# mine\n" in card
    assert "flowlm distill " in card
    assert "flowlm export" not in card
    export(fmlm(), tmp_path / "out", title="Stories", licence="mit", dtype="int8")
    FlowLM.from_pretrained(tmp_path / "out").push_to_hub("somebody/again", dtype="bfloat16")
    card = (hub.folder / "somebody/again/README.md").read_text()
    assert "license: mit\n" in card
    assert "# Stories\n" in card
    assert "flowlm distill " in card
    assert "held-out loss" in card
    FlowLM.from_pretrained(flm(), weights="model").push_to_hub(
        "somebody/raw"
    )  # the loss is that of the average
    card = (hub.folder / "somebody/raw/README.md").read_text()
    assert "flowlm train " in card
    assert "held-out loss" not in card
    with torch.no_grad():
        model.embedding[0, 0] += 1.0
    model.push_to_hub("somebody/mine")
    card = (hub.folder / "somebody/mine/README.md").read_text()
    assert "Not known: its weights are not those of a run" in card
    assert "flowlm distill" not in card


def test_what_is_no_model_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        push(tmp_path, "somebody/nothing")
    assert hub.asked == []


def test_without_leave_to_write(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise LocalTokenNotFoundError("Token is required")

    hub.create_repo = refuse  # type: ignore[method-assign]
    FlowLM.from_pretrained(fmlm()).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"refuses hf://somebody/one \(Token is required\).*hf auth login"):
        push(tmp_path / "out", "somebody/one")


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert located(tmp_path) == tmp_path
    assert located("runs/demo") == Path("runs/demo")


def test_a_name_may_have_been_taken_for_a_path(hub: Hub) -> None:
    assert located(Path("hf://somebody/one@v1")) == hub.folder / "somebody/one"
    assert hub.asked == [("somebody/one", "v1")]


def test_out_of_reach(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"cannot be reached.*give the folder of a model"):
        located("hf://somebody/one-step")
    with pytest.raises(ValueError, match=r"last\.ckpt of somebody/flm is not.*without --hub"):
        fetch_file("somebody/flm", "last.ckpt")
    assert command("generate", "hf://somebody/one-step") == 1
    assert "the hub cannot be reached" in said(capsys)


def test_a_name_of_another_form(offline: None) -> None:
    with pytest.raises(ValueError, match="the hub refuses hf://no/name/at/all"):
        located("hf://no/name/at/all")
