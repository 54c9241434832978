"""A model to hand on: it writes what the run wrote, in half the size, and its card says only what was measured."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from flowlm import cli
from flowlm import model as model_module
from flowlm.card import export, write_card
from flowlm.evaluation.runs import evaluate_run
from flowlm.model import FlowLM
from flowlm.provenance import command_of, cost_of, describe_run, made
from flowlm.trained_on import ROWS, corpus_of
from helpers import command, flm, fmlm, grammar_flm, recipe, said, settings, trained


def test_an_exported_model_is_the_run_s(tmp_path: Path) -> None:
    model = export(fmlm(), tmp_path / "out")
    assert model.generate(8, steps=1, seed=3) == FlowLM.from_pretrained(fmlm()).generate(8, steps=1, seed=3)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("README.md", "about.json", "clock.json", "config.json", "config.toml", "data.json"),
        *("model.safetensors", "tokenizer.json"),
    }


def test_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert command("export", fmlm(), "--out", out, "--title", "A tiny model", "--licence", "mit") == 0
    assert "MB; flowlm evaluate" in said(capsys)
    text = (out / "README.md").read_text()
    assert "# A tiny model\n" in text
    assert "license: mit\n" in text
    assert "How good it is" not in text
    about, data = json.loads((out / "about.json").read_text()), json.loads((out / "data.json").read_text())
    assert [r["objective"] for r in about["runs"]] == ["flow", "flow-map"]
    for part in (
        f"{about['parameters']:,} parameters",
        data["sha256"],
        *(r["command"] for r in about["runs"]),
    ):
        assert part in text
    assert command("evaluate", out, "--steps", "1,2", "--num", "20", "--card") == 0
    text = (out / "README.md").read_text()
    assert f"Measured by `flowlm evaluate {out} --steps 1,2 --num 20 --card`" in text
    for part in (
        "| held-out |",
        "| 5-gram |",
        "perplexity",
        "known words",
        "self-BLEU",
        "copied",
        "## In 2 network calls",
    ):
        assert part in text
    samples = [
        json.loads(line) for line in (out / "samples" / "nfe-0001-seed-0.jsonl").read_text().splitlines()[1:]
    ]
    assert f"1. {' '.join(samples[0]['text'].split())}\n" in text


def test_the_card_of_a_language_with_a_law(tmp_path: Path) -> None:
    """It is judged by the law, and by the stories it learned from."""
    out = tmp_path / "out"
    export(grammar_flm(), out)
    assert command("evaluate", out, "--steps", "1", "--num", "20", "--card") == 0
    text = (out / "README.md").read_text()
    by_law, by_text = (part.split("\n\n")[0] for part in text.split("\n| model ")[1:])
    assert "valid" in by_law
    assert "perplexity" not in by_law
    assert "perplexity" in by_text
    assert "valid" not in by_text
    models = [[line.split("|")[1].strip() for line in t.splitlines()[2:]] for t in (by_law, by_text)]
    assert models == [["FLM", "held-out", "5-gram", "law"], ["FLM", "held-out", "5-gram"]]
    assert "stories that flowlm draws itself" in text
    assert "The law of the language is known" in text


def test_the_command_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path / "tiny.toml", {"train.steps": 1, "optim.lr": 0.01})
    assert command("train", path, "--out", "runs/a", "--train.batch", "4", "--train.seed", "3") == 0
    # its recipe is not one of the package's: the resolved one says it all
    assert command_of(Path("runs/a")) == "flowlm train runs/a/config.toml"
    shutil.copytree("runs/a", "runs/b")
    text = (tmp_path / "runs/b/config.toml").read_text().replace('recipe = "tiny"', 'recipe = "grammar"')
    (tmp_path / "runs/b/config.toml").write_text(text)
    typed = command_of(Path("runs/b"))
    assert typed.startswith("flowlm train grammar --out runs/b ")
    for part in (
        "--train.batch 4",
        "--train.seed 3",
        "--optim.lr 0.01",
        "--model.backbone.width 32",
        "--data.corpus text",
    ):
        assert part in typed
    assert "vocab-size" not in typed
    # and it is a command: what it makes has the same settings
    config = (tmp_path / "runs/b/config.toml").read_text()
    assert command(*typed.replace("--out runs/b", "--out runs/c").split()[1:]) == 0
    assert (tmp_path / "runs/c/config.toml").read_text() == config


def test_the_command_of_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from its teacher's data is an option; its teacher is that from which it learned, whatever lies in
    that folder later."""
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path / "tiny.toml", {"train.steps": 1, "train.eval_every": 0})
    assert command("train", path, "--out", "runs/t") == 0
    options = ["--train.steps", "1", "--train.eval-every", "0", "--train.batch", "4", "--train.device", "cpu"]
    before = describe_run(Path("runs/t"))
    student = ["distill", "text-fmlm", "--teacher", "runs/t", *options]
    assert command(*student, "--out", "runs/plain") == 0
    assert command(*student, "--out", "runs/s", "--data.held-out", "20") == 0
    assert "--data." not in command_of(Path("runs/plain"))
    made_by = command_of(Path("runs/s"))
    assert made_by.startswith("flowlm distill text-fmlm --teacher runs/t --out runs/s ")
    assert [word for word in made_by.split() if word.startswith("--data.")] == ["--data.held-out"]
    # and it is a command
    assert command(*made_by.replace("--out runs/s", "--out runs/again").split()[1:]) == 0
    assert Path("runs/again/config.toml").read_text() == Path("runs/s/config.toml").read_text()
    assert command("train", path, "--out", "runs/t", "--force", "--train.steps", "2") == 0
    assert made(Path("runs/s"))[0] == before != describe_run(Path("runs/t"))
    shutil.rmtree("runs/t")
    assert made(Path("runs/s"))[0] == before
    assert command_of(Path("runs/s")) == made_by
    # what another run started from is told as well
    assert command("train", path, "--init", "runs/s", "--out", "runs/on", "--objective", "flow-map") == 0
    assert [run["objective"] for run in made(Path("runs/on"))] == ["flow", "flow-map", "flow-map"]


def test_a_last_line_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    shutil.copytree(flm(), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert describe_run(tmp_path / "run")["steps"] == 30
    export(tmp_path / "run", tmp_path / "out")


def test_a_folder_that_an_export_made_is_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(flm(), out)
    export(fmlm(), out)
    assert FlowLM.from_pretrained(out).family.label == "FMLM"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    export(fmlm(), tmp_path / "other", force=True)
    assert (tmp_path / "other" / "notes.md").read_text() == "mine"


def test_the_card_says_what_is_true_of_the_model(tmp_path: Path) -> None:
    """Of another family, of another scorer, and of a text that is not here."""
    ar, out = tmp_path / "ar", tmp_path / "out"
    trained(ar, settings({"objective": "ar", "train.steps": 2}))
    export(ar, out)
    assert command("evaluate", out, "--num", "8", "--scorer", ar, "--card") == 0
    text = (out / "README.md").read_text()
    assert "tags: [text-generation]\n" in text
    assert "flowlm generate FOLDER --num 5\n" in text
    assert "one-step" not in text
    assert re.search(r"Perplexity is that of AR \S+.*Fréchet: distance", text)
    assert "that of the n-gram model" not in text
    write_card(out, [{"nfe": 1, "entropy": 2.0, "perplexity": None, "scorer": None}], "flowlm evaluate")
    text = (out / "README.md").read_text()
    assert "Perplexity is" not in text
    assert "Known words" not in text
    export(fmlm(), tmp_path / "map")
    text = (tmp_path / "map" / "README.md").read_text()
    assert "tags: [text-generation, flow-language-model, one-step-generation]\n" in text
    assert "flowlm generate FOLDER --num 5 --steps " in text


def test_a_corpus_by_name_is_on_the_card(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(flm(), out)
    data = json.loads((out / "data.json").read_text())
    named = {"label": "Some corpus", "repository": "some/corpus", "commit": "abc123", "licence": "CC0-1.0"}
    (out / "data.json").write_text(json.dumps(data | named))
    write_card(out)
    text = (out / "README.md").read_text()
    assert "Some corpus; from some/corpus at commit abc123; licence: CC0-1.0; " in text


def test_the_best_weights_are_said_to_be(tmp_path: Path) -> None:
    """What is exported is the checkpoint that did best on held-out rows, and its loss stands on the card."""
    run = trained(tmp_path / "run", settings({"train.choose": "best"}))
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    evaluated = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in evaluated] == [4, 8]
    evaluated[0]["held_out"] = 0.5 * evaluated[1]["held_out"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = describe_run(run)
    assert (about["chosen"], about["steps"]) == (4, 8)
    assert about["held_out"] == evaluated[0]["held_out"]
    assert f"held-out loss {about['held_out']:.4f} nats a token at step 4, whose weights" in cost_of([about])


def test_the_last_weights_are_not_said_to_be_older(tmp_path: Path) -> None:
    """Of a run that was stopped between two held-out losses, the last one is not of the weights that are kept."""
    about = describe_run(flm()) | {"steps": 31}
    assert about["chosen"] == 30
    assert cost_of([about]).partition(", on ")[0].endswith("nats a token at step 30")


def test_a_flow_map_without_a_teacher_is_trained(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", settings({"objective": "flow-map", "train.steps": 1}))
    assert command_of(run).startswith("flowlm train ")


def test_what_a_run_cost(tmp_path: Path) -> None:
    about = describe_run(flm())
    assert about["steps"] == 30
    assert about["seconds"] >= 0
    assert about["held_out"] > 0
    assert describe_run(fmlm())["held_out"] is None  # to a moving target
    shutil.copytree(flm(), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl: it is not a run that was trained here"):
        describe_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"has no about\.json"):
        write_card(flm())


def test_without_a_run_the_model_of_the_package_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packaged = tmp_path / "pretrained"
    monkeypatch.setattr(model_module, "PACKAGED", packaged)
    for args in (["generate"], ["evaluate"], ["info"], ["generate", "--num", "2"]):
        assert command(*args) == 1
        assert "give a run directory first" in said(capsys)
    export(fmlm(), packaged)
    before = {p.name: p.read_bytes() for p in packaged.iterdir()}
    assert command("generate", "--num", "3", "--dtype", "float32") == 0
    assert capsys.readouterr().out == "".join(t + "\n\n" for t in FlowLM.from_pretrained().generate(3))
    assert command("evaluate", "--steps", "1", "--num", "8") == 0
    assert command("info") == 0
    assert "## How it was made" in capsys.readouterr().out
    assert {
        p.name: p.read_bytes() for p in packaged.iterdir()
    } == before  # an installed package is not written into


def test_commands_of_the_usage_are_known() -> None:
    named: set[Any] = {line.split()[1] for line in cli.USAGE.splitlines() if line.startswith("  flowlm ")}
    assert {"prepare", "train", "distill", "generate", "evaluate", "export", "demo", "info"} <= named


def test_the_cost_of_a_run_that_was_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    lines = [{"step": s, "loss": 1.0, "seconds": t} for s, t in ((1, 10.0), (2, 20.0), (3, 4.0), (4, 9.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert describe_run(run)["seconds"] == 29


def test_an_exported_model_can_be_exported_and_taught_from(tmp_path: Path) -> None:
    export(flm(), tmp_path / "flm")
    export(tmp_path / "flm", tmp_path / "small", dtype="int8")
    assert json.loads((tmp_path / "small" / "about.json").read_text())["runs"] == [describe_run(flm())]
    text = "[train]\nsteps = 1\nbatch = 4\ndevice = 'cpu'\neval_every = 0\n"
    (tmp_path / "map.toml").write_text(text)
    assert (
        command("distill", tmp_path / "map.toml", "--teacher", tmp_path / "small", "--out", tmp_path / "fmlm")
        == 0
    )
    export(tmp_path / "fmlm", tmp_path / "out")
    runs = json.loads((tmp_path / "out" / "about.json").read_text())["runs"]
    assert [r["objective"] for r in runs] == ["flow", "flow-map"]


def test_the_text_goes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(fmlm(), run)
    corpus = corpus_of(run, FlowLM.from_pretrained(run))
    export(run, out, text=True)
    monkeypatch.setattr("flowlm.trained_on.load_corpus", lambda *args: pytest.fail("the text is not here"))
    model = FlowLM.from_pretrained(out)
    found = corpus_of(out, model)
    assert (found.train == corpus.train).all()
    assert (found.held_out == corpus.held_out).all()
    assert (out / ROWS).stat().st_size not in (0, json.loads((out / "about.json").read_text())["bytes"])
    rows = evaluate_run(out, [1], 8, device="cpu", dtype="float32")
    assert [row["model"] for row in rows] == ["FMLM", "held-out", "5-gram"]
    (out / ROWS).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"rows\.npz is damaged \(.*\): export the model again"):
        corpus_of(out, model)
    monkeypatch.undo()
    export(run, out)
    assert not (out / ROWS).exists()
