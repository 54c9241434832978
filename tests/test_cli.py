"""The command line, end to end: what is printed, what is written, and what help says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import flowlm
from flowlm import cli
from flowlm.cli import main, parse_steps
from flowlm.config import RunConfig, load_recipe
from flowlm.data.grammar import Grammar
from flowlm.evaluation.metrics import ROW
from flowlm.evaluation.report import numbered
from flowlm.evaluation.samples import read_samples
from flowlm.model import FlowLM
from helpers import (
    LINES,
    command,
    content,
    corpus,
    flm,
    fmlm,
    grammar_flm,
    map_settings,
    metrics,
    recipe,
    said,
    settings,
    tensors,
    trained,
    values,
)

COMMANDS = ("train", "distill", "generate", "evaluate", "demo", "info")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


# ---------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("args", [(), ("-h",), ("--help",), ("help",)])
def test_usage_names_every_command(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    out = capsys.readouterr().out
    assert all(f"flowlm {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"flowlm {flowlm.__version__}\n"


def _options(kind: type, where: str = "--") -> dict[str, str]:
    """Flag and explanation of every field."""
    hints = typing.get_type_hints(kind)
    out = {}
    source = Path(sys.modules[kind.__module__].__file__ or "").read_text()
    # A field is explained in the class that declares it: a base class, maybe.
    bodies = (source.partition(f"class {c.__name__}")[2].partition("\nclass ")[0] for c in kind.__mro__[:-1])
    body = "".join(bodies)
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            out |= _options(hints[field.name], f"{where}{name}.")  # type: ignore[arg-type]
        else:
            found = re.search(rf"\n    {field.name}: [^\n]*\n    \"\"\"(.*?)\"\"\"(?:\n|$)", body, re.S)
            assert found is not None, field.name
            # A switch that is on is turned off.
            out[f"{where}{'no-' * (field.default is True)}{name}"] = found[1]
    return out


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("train", [RunConfig, cli._RunOptions]),
        ("distill", [RunConfig, cli._RunOptions]),
        ("generate", [cli.GenerateOptions]),
        ("evaluate", [cli.EvaluateOptions]),
        ("demo", [cli.DemoOptions]),
    ],
)
def test_help_explains_every_option(name: str, kinds: list[type], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name, "--help") == 0
    text = said(capsys)
    for kind in kinds:
        for flag, explanation in _options(kind).items():
            assert flag + " " in text or flag + "," in text, flag
            first = " ".join(explanation.replace('"', "").split()[:4])
            assert first in text.replace('"', ""), flag


def test_help_of_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("info", "--help") == 0
    assert "usage: flowlm info [RUN|RECIPE.toml]" in said(capsys)


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_help_after_the_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name, "runs/any", "--help") == 0
    assert "--steps" in said(capsys)


def test_help_shows_what_the_recipe_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", recipe(tmp_path / "r.toml", {"train.batch": 31}), "--help") == 0
    assert "(default: 31)" in said(capsys)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowlm.cli", "nonsense"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(flowlm.__file__).parents[1])},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("flowlm: unknown command 'nonsense'")
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------ train, distill, resume


def test_overrides_reach_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path / "r.toml")
    out = tmp_path / "run"
    overrides = ("--train.steps", "2", "--optim.lr=0.25", "--model.tied-head", "--train.seed", "9")
    assert command("train", path, "--out", out, *overrides) == 0
    saved = load_recipe(out / "config.toml")
    assert (saved.train.steps, saved.optim.lr, saved.train.seed) == (2, 0.25, 9)
    assert saved.model.tied_head
    assert saved.train.batch == 8  # from the recipe
    text = said(capsys)
    assert "parameters" in text
    assert f"done: step 2, held-out loss {metrics(out)[-1]['held_out']:.4f} nats a token" in text
    assert f"the model is in {out}" in text


def test_out_defaults_to_the_recipes_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path / "mine.toml", {"train.steps": 1})
    assert command("train", "mine.toml") == 0
    assert (tmp_path / "runs" / "mine" / "config.json").exists()


def test_force_replaces_a_run(tmp_path: Path) -> None:
    path, out = recipe(tmp_path / "r.toml", {"train.steps": 1}), tmp_path / "run"
    assert command("train", path, "--out", out) == 0
    (out / "samples" / "old.txt").write_text("")
    assert command("train", path, "--out", out, "--force", "--train.seed", "1") == 0
    assert not (out / "samples" / "old.txt").exists()
    assert load_recipe(out / "config.toml").train.seed == 1


def test_ctrl_c_then_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    from flowlm.training.loop import Trainer

    whole = trained(tmp_path / "whole", settings({"recipe": "r"}))
    path, out = recipe(tmp_path / "r.toml"), tmp_path / "run"
    update = Trainer.update

    def pressed(self: Trainer) -> Any:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", pressed)
        assert command("train", path, "--out", out) == 130
    assert f"interrupted at step 3; everything is saved. Continue with: flowlm train --resume {out}" in said(
        capsys
    )
    assert command("train", "--resume", out) == 0
    assert f"resumed {out} at step 3 of 8" in said(capsys)
    for name in ("model.safetensors", "ema.safetensors", "config.toml", "metrics.jsonl"):
        assert content(out)[name] == content(whole)[name], name


def test_ctrl_c_before_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowlm.training import loop

    def pressed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "load_corpus", pressed)
    assert command("train", recipe(tmp_path / "r.toml"), "--out", tmp_path / "run") == 130
    assert said(capsys).endswith("flowlm: interrupted ")
    assert not (tmp_path / "run").exists()


def test_a_resume_takes_nothing_else_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("--train.steps", "50"), ("--force",), ("--out", "x"), ("--device", "cpu")):
        assert command("train", "--resume", flm(), *more) == 1
        assert (
            "--resume continues a run as it was: beside it may stand --train.micro-batch, --train.shard, and"
            in said(capsys)
        )
    assert command("train", recipe(tmp_path / "r.toml"), "--resume", flm()) == 1
    assert f"--resume continues {flm()} by its own recipe: leave" in said(capsys)


def unfinished(source: Path, run: Path) -> Path:
    """A copy of a run without its last checkpoint."""
    shutil.copytree(source, run)
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    return run


def test_a_resume_is_told_where_things_are_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, teacher = shutil.copy(corpus(), tmp_path / "text.txt"), shutil.copytree(flm(), tmp_path / "flm")
    run = trained(tmp_path / "run", map_settings(teacher, {"data.path": str(text)}))
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    Path(text).rename(tmp_path / "moved.txt")
    assert command("train", "--resume", run) == 1
    assert f"needs {text}, which is not there" in said(capsys)
    (tmp_path / "other.txt").write_text("\n".join(LINES[:-1]))
    assert command("train", "--resume", run, "--data.path", tmp_path / "other.txt") == 1
    assert "has changed (sha256 was" in said(capsys)
    assert str(text) in (run / "config.toml").read_text()
    teacher.rename(tmp_path / "flm2")
    moved = ("--data.path", tmp_path / "moved.txt", "--teacher", tmp_path / "flm2")
    assert command("distill", "--resume", run, *moved) == 0
    assert str(tmp_path / "moved.txt") in (run / "config.toml").read_text()


def test_a_resume_may_take_smaller_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an error about memory advises, and it stays so."""
    run = unfinished(flm(), tmp_path / "run")
    assert command("train", "--resume", run, "--train.micro-batch", "3") == 0
    assert "micro_batch = 3" in (run / "config.toml").read_text()
    start = tensors(run / "checkpoints" / f"step-{28:08d}" / "model.safetensors")
    before, after = tensors(flm() / "model.safetensors"), tensors(run / "model.safetensors")
    for name, value in before.items():
        assert (after[name] - value).norm() <= 0.1 * (value - start[name]).norm() + 1e-6, name


def test_device_and_dtype_in_short(tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.toml", {"train.steps": 1})
    assert command("train", file, "--out", tmp_path / "run", "--device", "cpu", "--dtype", "float32") == 0
    text = (tmp_path / "run" / "config.toml").read_text()
    assert 'device = "cpu"' in text
    assert 'dtype = "float32"' in text


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_out_of_memory_when_sampling(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    run = flm()  # its training makes samples too
    monkeypatch.setattr("flowlm.flows.sample", full)
    assert command(name, run, "--num", "2") == 1
    assert "flowlm: out of memory: this model and its passages do not fit" in said(capsys)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> None:
        raise RuntimeError("shapes do not match")

    run = flm()
    monkeypatch.setattr("flowlm.flows.sample", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["generate", str(run), "--num", "2"])


@pytest.mark.parametrize("tokenizer", ["words", "bpe"])
def test_a_text_file_end_to_end(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """train, distill, generate, evaluate: on words, and on byte-level pieces."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus(), "mine.txt")
    over: dict[str, Any] = {"data.path": "mine.txt", "data.tokenizer": tokenizer, "train.steps": 3}
    if tokenizer == "bpe":
        over |= {"data.vocab_size": 280, "model.length": 24}
    recipe(tmp_path / "text.toml", over)
    (tmp_path / "map.toml").write_text(
        "[train]\nsteps = 2\nbatch = 8\nsample_steps = 1\n[optim]\nwarmup = 0\n"
    )
    assert command("train", "text.toml") == 0
    assert command("distill", "map.toml", "--teacher", "runs/text", "--flow-map.boundary", "0.5") == 0
    student, teacher = FlowLM.from_pretrained("runs/map"), FlowLM.from_pretrained("runs/text")
    assert student.denoiser.config.two_times
    assert not teacher.denoiser.config.two_times
    assert student.tokenizer.sha256 == teacher.tokenizer.sha256
    assert student.tokenizer.kind == tokenizer
    assert load_recipe("runs/map/config.toml").data == load_recipe("runs/text/config.toml").data
    assert load_recipe("runs/map/config.toml").objective == "flow-map"
    capsys.readouterr()
    assert command("generate", "runs/map", "--num", "3", "--dtype", "float32") == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(text + "\n\n" for text in student.generate(3))
    assert "3 passages, 1 network call each" in captured.err
    assert command("evaluate", "runs/map", "--steps", "1,2", "--num", "5", "--json", "rows.json") == 0
    rows = json.loads(Path("rows.json").read_text())
    assert [(row["model"], row["nfe"], row["num"]) for row in rows] == [
        ("FMLM", 1, 5),
        ("FMLM", 2, 5),
        ("held-out", 0, 5),
        ("5-gram", 0, 5),
    ]
    assert all(row["perplexity"] > 1 and row["known"] is not None for row in rows)
    assert all(row["law"] is None and row["valid"] is None and row["entropy"] >= 0 for row in rows)


def test_a_distillation_learns_on_its_own_data_when_told(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(LINES[:40]))
    path = tmp_path / "map.toml"
    path.write_text(f'[data]\npath = "{other}"\n[train]\nsteps = 1\nbatch = 4\ndevice = "cpu"\n')
    assert command("distill", path, "--teacher", flm(), "--out", tmp_path / "run") == 0
    data = load_recipe(tmp_path / "run" / "config.toml").data
    assert (data.path, data.corpus, data.held_out) == (str(other), "text", 10)


def test_init_from_the_command_line(tmp_path: Path) -> None:
    path = recipe(tmp_path / "r.toml", {"train.steps": 1})
    assert command("train", path, "--init", flm(), "--out", tmp_path / "run") == 0
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(flm())[0]["loss"] - 0.1


# -------------------------------------------------------------------------------------------------------- generate


def test_generate_json_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "samples.jsonl"
    args = ("--num", "4", "--steps", "3", "--seed", "6", "--gamma", "0.5", "--dtype", "float32")
    assert command("generate", flm(), *args, "--json", "--out", out) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(line) for line in lines] == [["id", "text", "tokens", "nfe", "seed"]] * 4
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    assert {(line["nfe"], line["seed"]) for line in lines} == {(3, 6)}
    model = FlowLM.from_pretrained(flm())
    assert [line["text"] for line in lines] == model.generate(4, 3, seed=6, gamma=0.5)
    assert all(model.tokenizer.decode(line["tokens"]) == line["text"] for line in lines)
    header, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records == lines
    assert header["format"] == "flowlm-samples/1"
    assert (header["model"], header["recipe"], header["nfe"], header["seed"]) == ("FLM", "flm", 3, 6)
    assert header["dtype"] == "float32"
    assert header["sampler"] == {"gamma": 0.5, "prior_scale": 1.0, "temperature": 1.0, "last": "argmax"}
    assert header["tokenizer"] == model.tokenizer.sha256
    assert header["seconds"] >= 0
    assert read_samples(out)[0].nfe == 3
    assert f"written to {out}" in captured.err


def test_generate_twice_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert command("generate", flm(), "--num", "3", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_from_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FlowLM.from_pretrained(fmlm()).save_pretrained(tmp_path / "model")
    assert command("generate", tmp_path / "model", "--num", "2", "--dtype", "float32") == 0
    assert capsys.readouterr().out == "".join(t + "\n\n" for t in FlowLM.from_pretrained(fmlm()).generate(2))


def test_a_saved_model_of_the_grammar_is_judged_by_the_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FlowLM.from_pretrained(grammar_flm())
    assert model.data["law_sha256"] == Grammar().hash
    model.save_pretrained(tmp_path / "model")
    args = ("--num", "4", "--steps", "1", "--json", tmp_path / "rows.json")
    assert command("evaluate", tmp_path / "model", *args) == 0
    assert json.loads((tmp_path / "rows.json").read_text())[0]["law"] == Grammar().hash


# -------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_a_run_on_the_grammar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(grammar_flm(), run)
    rows_file = tmp_path / "rows.json"
    args = ("--steps", "1,3", "--num", "20", "--seed", "4", "--dtype", "float32")
    assert command("evaluate", run, *args, "--json", rows_file) == 0
    rows = json.loads(rows_file.read_text())
    assert [(row["model"], row["nfe"]) for row in rows] == [("FLM", 1), ("FLM", 3), ("law", 0)]
    for row in rows:
        assert set(ROW) <= row.keys()
        assert list(row)[: len(ROW)] == list(ROW)
        assert row["num"] == 20
        assert row["law"] == Grammar().hash
        assert 0 <= row["valid"] <= 1
    for row in rows[:2]:
        assert (row["seed"], row["dtype"]) == (4, "float32")
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(20 * 64 / row["seconds"])
        assert sum(row["broken"].values()) > 0
        assert (row["slot_tv"] is None) == (row["parsed"] == 0)  # measured on those that parse
        assert (row["pair_tv"] is None) == (row["parsed"] == 0)
        assert 0 < row["unique"] <= 1
        assert row["commit"]
    assert rows[2]["valid"] == 1.0
    assert rows[2]["broken"] == {} or not any(rows[2]["broken"].values())
    assert rows[2]["nll_per_token"] > 0
    assert 0 < rows[2]["slot_tv"] < 1
    assert 0 < rows[2]["pair_tv"] < 1
    assert "valid" in said(capsys)
    # the samples are kept, and score alike by themselves
    for k, row in zip((1, 3), rows):
        path = run / "samples" / f"nfe-{k:04d}-seed-4.jsonl"
        assert command("evaluate", path, "--json", tmp_path / f"one-{k}.json") == 0
        again = json.loads((tmp_path / f"one-{k}.json").read_text())
        assert again[0] == row
        assert again[1]["model"] == "law"


def test_evaluate_writes_a_report(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "report"
    shutil.copytree(flm(), run)
    assert command("evaluate", run, "--steps", "1,2", "--num", "12", "--report", folder) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == f"flowlm evaluate {run} --steps 1,2 --num 12 --report {folder}"
    assert [row["nfe"] for row in report["rows"]] == [1, 2, 0, 0]
    assert [step for step, _ in report["held_out"]] == [30]
    assert report["data"]["corpus"] == "text"
    text = (folder / "README.md").read_text()
    for k in (1, 2):
        samples = read_samples(run / "samples" / f"nfe-{k:04d}-seed-0.jsonl")[1][:10]
        assert report["samples"][str(k)] == [record.text for record in samples]
        assert numbered([record.text for record in samples]) in text
    page = (folder / "report.html").read_text()
    for part in (f"<h1>{run.name}</h1>", "In 2 network calls", "data:image/png;base64,", "perplexity"):
        assert part in page
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    # another command's report is not written over
    assert command("evaluate", run / "samples" / "nfe-0001-seed-0.jsonl", "--report", folder) == 1


def test_evaluate_writes_a_report_of_a_file(tmp_path: Path) -> None:
    """Of whoever wrote it: with the text it is judged by, and what it says of itself."""
    path, folder = tmp_path / "foreign.jsonl", tmp_path / "report"
    path.write_text('{"text": "a cat saw a hen"}\n{"text": "a <b>cat</b> saw a fox"}\n')
    assert command("evaluate", path, "--data.path", corpus(), "--report", folder) == 0
    report = json.loads((folder / "report.json").read_text())
    assert (report["file"], len(report["sha256"])) == ("foreign.jsonl", 64)
    assert [row["model"] for row in report["rows"]][1:] == ["held-out", "5-gram"]
    assert report["samples"] == {"0": ["a cat saw a hen", "a <b>cat</b> saw a fox"]}
    page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert "1. a cat saw a hen" in card
    assert "a &lt;b&gt;cat" in page
    assert report["sha256"][:12] in card
    assert command("evaluate", path, "--data.path", corpus(), "--report", folder) == 0  # its own is replaced
    ours = tmp_path / "ours"
    assert (
        command("generate", grammar_flm(), "--num", "3", "--steps", "2", "--out", tmp_path / "s.jsonl") == 0
    )
    assert command("evaluate", tmp_path / "s.jsonl", "--report", ours) == 0
    assert list(json.loads((ours / "report.json").read_text())["samples"]) == ["2"]
    assert "In 2 network calls" in (ours / "report.html").read_text()


def test_evaluate_a_foreign_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text('{"text": "a cat saw a hen"}\n{"text": "a cat saw a fox"}\n')
    assert command("evaluate", path, "--json", tmp_path / "rows.json") == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["num"], row["unique"], row["nfe"], row["law"]) == (2, 1.0, None, None)
    assert "unknown" in said(capsys)


def test_evaluate_refuses_samples_of_another_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    assert command("generate", grammar_flm(), "--num", "2", "--out", path) == 0
    path.write_text(path.read_text().replace(Grammar().hash, "0" * 64))
    assert command("evaluate", path) == 1
    assert "was written for the law 000000000000…, this version's is" in said(capsys)


def test_step_lists() -> None:
    assert parse_steps("1,2, 8") == [1, 2, 8]
    for text, message in (
        ("", "give whole numbers separated by commas"),
        ("1,,2", "give whole numbers separated by commas"),
        ("1.5", "give whole numbers separated by commas"),
        ("4,0", "at least one network call"),
        ("-1", "at least one network call"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_steps(text)


# ------------------------------------------------------------------------------------------------------------ info


def test_info_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("info", fmlm()) == 0
    text = capsys.readouterr().out
    size = sum(p.numel() for p in FlowLM.from_pretrained(fmlm()).denoiser.parameters())
    assert text.startswith(f"{fmlm()}: FMLM (flow map, two times)\n{size:,} parameters")
    assert "V = 17, L = 12, d = 32" in text
    assert "checkpoints: 4, 8" in text
    assert "data corpus: text" in text
    assert 'objective = "flow-map"' in text


def test_info_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("info", recipe(tmp_path / "r.toml")) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "again.toml") == settings()
    assert command("info", "grammar") == 0
    assert 'corpus = "grammar"' in capsys.readouterr().out


def test_info_of_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FlowLM.from_pretrained(flm()).save_pretrained(tmp_path / "model")
    assert command("info", tmp_path / "model") == 0
    assert "FLM (flow, one time)" in capsys.readouterr().out


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWLM_DEBUG", "1")
    with pytest.raises(ValueError, match="no run at"):
        main(["generate", "nowhere"])


def test_the_tiny_recipe_is_complete() -> None:
    """The other tests vary what it says: a typing mistake there must not go unnoticed."""
    assert values({"train.steps": 3})["train"]["steps"] == 3
    assert values()["train"]["steps"] == 8


def test_options_of_samples_that_are_made_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "three.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert command("evaluate", path, "--gamma", "0.5", "--report", tmp_path / "r") == 1
    assert "is scored as it is: --gamma would change nothing" in said(capsys)
    assert not (tmp_path / "r").exists()
