"""Bad input: one clear message (what, why, the fix), an exit status, no traceback, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tomli_w
import torch

from flowlm import flows as flows_module
from flowlm.data.tokens import Tokenizer
from flowlm.model import FlowLM
from flowlm.samplers import Sample
from helpers import command, content, flm, fmlm, map_values, recipe, said, tensors


def _saved(case: Case) -> Path:
    """A model without its run."""
    path = case.folder.with_name(case.folder.name + "-saved")
    FlowLM.from_pretrained(flm()).save_pretrained(path)
    return path


class Case:
    """A folder of its own, with what the cases use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"

    def recipe(self, text: str | None = None, /, **over: Any) -> Path:
        """A recipe: the tiny one with overrides (sections by __), or any text."""
        path = self.folder / "recipe.toml"
        if text is not None:
            path.write_text(text)
            return path
        return recipe(path, {name.replace("__", "."): value for name, value in over.items()})

    def text(self, data: str | bytes) -> Path:
        """A corpus."""
        path = self.folder / "text.txt"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def named(self, name: str, data: str) -> Path:
        """A file."""
        path = self.folder / name
        path.write_text(data)
        return path

    def distillation(self, teacher: Path | str, **sections: Any) -> Path:
        """A distillation's recipe."""
        path = self.folder / "map.toml"
        path.write_text(tomli_w.dumps(map_values(Path(teacher)) | sections))
        return path

    def run(self, source: Callable[[], Path] = flm) -> Path:
        """A copy of a run, to be spoilt."""
        path = self.folder / "run"
        if not path.exists():
            shutil.copytree(source(), path)
        return path

    def spoilt(self, name: str, data: str | bytes | None, source: Callable[[], Path] = flm) -> Path:
        """A run in which a file is replaced, or missing."""
        path = self.run(source) / name
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return self.run()


Args = Callable[[Case], list[Any]]


def _train(make: Callable[[Case], Path], *more: str) -> Args:
    return lambda case: ["train", make(case), "--out", case.out, *more]


def _on(data: str | bytes, **over: Any) -> Args:
    """Training on a text."""
    return _train(lambda case: case.recipe(data__path=str(case.text(data)), **over))


def _on_file(name: str, data: str) -> Args:
    """Training on a text in a file of its own kind."""
    return _train(lambda case: case.recipe(data__path=str(case.named(name, data))))


def _endless() -> str:
    """A tokenizer.json without a token for the end of a text."""
    import tokenizers

    model = tokenizers.models.WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]")
    return str(tokenizers.Tokenizer(model).to_str())


def _cut_rows(case: Case) -> Path:
    """Prepared rows of which the half is missing."""
    folder = case.folder / "rows"
    assert command("prepare", case.recipe(), "--out", folder) == 0
    rows = max(folder.iterdir(), key=lambda path: path.stat().st_size if path.suffix != ".json" else 0)
    os.truncate(rows, rows.stat().st_size // 2)
    return folder


def _with(*more: str) -> Args:
    """Training by the tiny recipe with options."""
    return _train(lambda case: case.recipe(), *more)


def _distill(teacher: Callable[[Case], Path]) -> Args:
    return lambda case: ["distill", case.distillation(teacher(case)), "--out", case.out]


def _generate(*more: str) -> Args:
    return lambda case: ["generate", flm(), *more]


def _from(name: str, data: str | bytes | None) -> Args:
    """Generating from a run in which a file is spoilt."""
    return lambda case: ["generate", case.spoilt(name, data)]


def _resume(name: str, data: str | bytes | None) -> Args:
    """Resuming a run in which a file is spoilt."""
    return lambda case: ["train", "--resume", case.spoilt(name, data)]


def _other_vocabulary(case: Case) -> Path:
    run = case.run()
    Tokenizer.train_words(["three words here"]).save(run)
    return run


def _without_checkpoints(case: Case) -> Path:
    run = case.run()
    shutil.rmtree(run / "checkpoints")
    return run


def _cut(name: str) -> Callable[[Case], Path]:
    def make(case: Case) -> Path:
        run = case.run()
        os.truncate(run / name, 200)
        return run

    return make


NEWEST = "checkpoints/step-00000030"
CASES: dict[str, tuple[Args, tuple[str, ...]]] = {
    # -- commands
    "unknown command": (lambda case: ["trian"], ("unknown command 'trian'", "did you mean 'train'?")),
    "no recipe": (
        lambda case: ["train"],
        ("give a recipe, such as flowlm train recipes/grammar.toml", "--resume"),
    ),
    "missing recipe": (
        lambda case: ["train", "none.toml"],
        ("no recipe at none.toml", "give the path of a .toml"),
    ),
    "unknown recipe": (
        lambda case: ["train", "gramar"],
        ("no recipe named 'gramar'", "did you mean 'grammar"),
    ),
    "a folder as recipe": (lambda case: ["train", case.folder], ("is a folder: a recipe is a .toml file",)),
    "no run to export": (lambda case: ["export"], ("give first a run directory", "see --help")),
    "options first": (lambda case: ["export", "--out", "x"], ("give first a run directory", "see --help")),
    "no folder to export to": (
        lambda case: ["export", case.run()],
        ("give the folder to write: --out FOLDER",),
    ),
    "export over the run": (
        lambda case: ["export", (run := case.run()), "--out", run],
        ("is the run itself: give another folder",),
    ),
    "export in halves": (
        lambda case: ["export", case.run(), "--out", "x", "--dtype", "float16"],
        ("dtype = 'float16': weights are stored as 'float32', 'bfloat16', 'int8'",),
    ),
    "a card of what was not exported": (
        lambda case: ["evaluate", case.run(), "--steps", "1", "--num", "2", "--card"],
        ("has no card to write to: --card is for a folder that flowlm export made",),
    ),
    "missing run": (lambda case: ["generate", "nowhere"], ("no run at nowhere: give a run directory",)),
    "missing run to evaluate": (lambda case: ["evaluate", "nowhere"], ("no run at nowhere",)),
    "missing run to resume": (
        lambda case: ["train", "--resume", "nowhere"],
        ("nowhere holds no config.toml: it is not a run directory",),
    ),
    "info of nothing": (lambda case: ["info", "nowhere"], ("no recipe named 'nowhere'", "or give the path")),
    # -- the recipe
    "unknown key": (
        _train(lambda case: case.recipe("[train]\nstps = 3\n")),
        ("recipe.toml: unknown key 'train.stps'", "did you mean 'steps'?"),
    ),
    "wrong type": (
        _train(lambda case: case.recipe('[train]\nsteps = "many"\n')),
        ("recipe.toml: train.steps must be int, got str 'many'",),
    ),
    "not TOML": (_train(lambda case: case.recipe("steps == 3")), ("recipe.toml is not valid TOML",)),
    "unknown option": (_with("--train.stpes", "3"), ("Unrecognized options: --train.stpes", "--train.steps")),
    "wrong type of an option": (
        _with("--train.steps", "many"),
        ("--train.steps", "invalid literal", "'many'"),
    ),
    "an option's value refused": (
        _with("--train.choose", "first"),
        ("train.choose = 'first'", "'last' or 'best'"),
    ),
    "steps 0": (_with("--train.steps", "0"), ("train.steps must be at least 1, got 0",)),
    "steps negative": (_with("--train.steps", "-5"), ("train.steps must be at least 1, got -5",)),
    "rate not a number": (_with("--optim.lr", "nan"), ("optim.lr must be positive, got nan",)),
    "rate infinite": (_with("--optim.muon-lr", "inf"), ("optim.muon_lr cannot be negative", "got inf")),
    "decay of 1": (_with("--optim.beta2", "1.0"), ("optim.beta2 must lie in [0, 1), got 1.0",)),
    "cool-down too long": (
        _with("--optim.cooldown", "3"),
        ("optim.cooldown is a share of the steps in [0, 1]",),
    ),
    "clock floor 0": (_with("--clock.floor", "0"), ("clock.floor must lie in (0, 1], got 0",)),
    "unknown clock": (
        _with("--model.clock", "sun"),
        ("unknown clock 'sun'", "'decoding-error' or 'uniform'"),
    ),
    "vocabulary by hand": (
        _with("--model.vocab-size", "5"),
        (
            "model.vocab_size = 5, but the data's tokenizer has 17 tokens: leave it out",
            "name with data.tokenizer",
        ),
    ),
    "dropout above 1": (_with("--model.backbone.dropout", "1.5"), ("dropout", "must lie in [0, 1)", "1.5")),
    "no such device": (
        _with("--train.device", "cuda"),
        ("torch sees no CUDA device: use cpu or auto",),
    ),
    "no such device, in short": (_with("--device", "cuda"), ("torch sees no CUDA device: use cpu or auto",)),
    "unknown device": (_with("--train.device", "tpu"), ("unknown device 'tpu'", "auto, cpu, cuda or mps")),
    "unknown dtype": (_with("--train.dtype", "half"), ("unknown dtype 'half'", "auto, bfloat16 or float32")),
    "init from nowhere": (_with("--init", "nowhere"), ("no run at nowhere",)),
    # -- the corpus
    "no corpus": (_with("--data.path", ""), ("data.path is empty", "needs a file or folder of text")),
    "missing corpus": (
        _with("--data.path", "none.txt"),
        ("data.path = 'none.txt' does not exist", "say with --data.path where it is"),
    ),
    "a folder without text": (
        _with("--data.path", "."),
        ("holds no text files (1 .toml): known are .txt, .jsonl", "plain or in .gz"),
    ),
    "empty corpus": (_on(""), ("text.txt' holds no text (0 bytes): give a file with passages",)),
    "blank corpus": (_on(" \n \n"), ("holds no text",)),
    "one token": (_on("word"), ("is a single line", "break the text into lines")),
    "one token again and again": (_on("word\n" * 20), ("all 20 passages are the same",)),
    "V = 1": (_on("word word\nword\n"), ("a model has nothing to choose", "at least two different")),
    "unknown field": (
        _on_file("t.jsonl", '{"body": "a b"}\n'),
        ("line 1 has no field 'text'", "body"),
    ),
    "unknown column": (
        _on_file("t.csv", "body,n\na b,1\n"),
        ("t.csv has no field 'text': set data.field to one of 'body', 'n'",),
    ),
    "corrupt archive": (
        _on_file("t.txt.gz", "no gzip"),
        ("t.txt.gz is damaged or cut short (Not a gzipped file", "fetch it again"),
    ),
    "tokens without an end": (
        _train(lambda case: case.recipe(data__tokenizer=str(case.named("tokenizer.json", _endless())))),
        ("tokenizer.json: there is no end token, none of [EOS], <|endoftext|>", "name one with data.eos"),
    ),
    "prepared rows cut short": (
        _train(lambda case: case.recipe(data__path=str(_cut_rows(case)))),
        ("cut short",),
    ),
    "not UTF-8": (
        _on(b"good line\nbad \xff line\n"),
        ("is not UTF-8: byte 0xff at offset 14, line 2", "iconv"),
    ),
    "L = 1": (_with("--model.length", "1"), ("length is 1: a passage needs room for a token and [EOS]",)),
    "L = 0": (_with("--model.length", "0"), ("length is 0",)),
    "L too short for the grammar": (
        _with("--data.corpus", "grammar", "--data.path", ""),
        ("length is 12: the grammar's stories have up to", "give at least"),
    ),
    "bpe without a size": (_with("--data.tokenizer", "bpe"), ("needs data.vocab_size", "at least 258")),
    # -- distillation
    "no teacher": (
        lambda case: ["distill", case.recipe("[train]\nsteps = 1\n")],
        ("distill needs its teacher: --teacher RUN",),
    ),
    "missing teacher": (_distill(lambda case: case.folder / "none"), ("no run at", "none")),
    "a teacher whose data nobody knows": (
        lambda case: ["distill", case.recipe("[train]\nsteps = 1\n"), "--teacher", _saved(case)],
        ("has no config.toml that names its data", "add --data.corpus grammar"),
    ),
    "a model section": (
        lambda case: ["distill", case.recipe(), "--teacher", flm()],
        ("a distillation has no [model] of its own, the student is made like its teacher",),
    ),
    "a teacher of two times": (
        _distill(lambda case: fmlm()),
        ("is a flow map already: distil from the FLM it came from",),
    ),
    "a start that is not made like the teacher": (
        lambda case: [
            "distill",
            case.distillation(flm()),
            *("--init", fmlm(), "--flow-map.head-start", "0.5", "--out", case.out),
        ],
        ("flow_map.head_start is 0.5, but", "was distilled with"),
    ),
    "a teacher of another vocabulary": (
        _distill(_other_vocabulary),
        ("the tokenizer has 5 tokens and the model 17: this is the tokenizer of another run",),
    ),
    "a teacher of another text": (
        lambda case: [
            "distill",
            case.distillation(
                flm(), data={"corpus": "text", "path": str(case.text("new words\nhere they are"))}
            ),
            "--out",
            case.out,
        ],
        ("are not in the vocabulary of 17", "use the text that the tokenizer was made for"),
    ),
    "a teacher for a flow": (
        _with("--teacher", "runs/x"),
        ("which learns from data alone: use 'flow-map', 'sdtt', 'duo-dcd'",),
    ),
    "a teacher's rollout without one": (
        _with("--objective", "flow-map", "--flow-map.boundary-target", "teacher"),
        ("flow_map.boundary_target = 'teacher' needs a teacher",),
    ),
    # -- generating and evaluating
    "0 network calls": (_generate("--steps", "0"), ("steps must be at least 1, got 0",)),
    "negative network calls": (_generate("--steps", "-1"), ("steps must be at least 1, got -1",)),
    "0 passages": (_generate("--num", "0"), ("num must be at least 1, got 0",)),
    "gamma above 1": (_generate("--gamma", "1.5"), ("gamma must lie in [0, 1], got 1.5",)),
    "gamma below 0": (_generate("--gamma", "-0.5"), ("gamma must lie in [0, 1], got -0.5",)),
    "prior scale 0": (_generate("--prior-scale", "0"), ("prior_scale must be positive, got 0",)),
    "temperature 0": (_generate("--temperature", "0"), ("temperature must be positive, got 0",)),
    "unknown last rule": (_generate("--last", "beam"), ("last = 'beam'", "'argmax' or 'categorical'")),
    "generate on no such device": (_generate("--device", "cuda"), ("torch sees no CUDA device",)),
    "generate in an unknown dtype": (_generate("--dtype", "half"), ("unknown dtype 'half'",)),
    "generate with an unknown option": (
        _generate("--stepz", "3"),
        ("Unrecognized options: --stepz", "--steps"),
    ),
    "evaluate with no steps": (
        lambda case: ["evaluate", flm(), "--steps", "one"],
        ("--steps 'one': give whole numbers separated by commas",),
    ),
    "evaluate 0 steps": (lambda case: ["evaluate", flm(), "--steps", "4,0"], ("at least one network call",)),
    "evaluate an empty file": (
        lambda case: ["evaluate", case.text("")],
        ("text.txt is empty: a samples file",),
    ),
    "evaluate some other file": (lambda case: ["evaluate", case.text("words")], ("line 1: not JSON",)),
    # -- the demo
    "too little time": (
        lambda case: ["demo", "--minutes", "0.5"],
        ("--minutes 0.5: the demo needs at least 1",),
    ),
    "no stories": (lambda case: ["demo", "--num", "0"], ("--num 0: measure at least one story",)),
    # -- run directories
    "half-written": (
        _from("config.json", None),
        ("holds no config.json", "first checkpoint was never finished"),
    ),
    "half-written config": (_from("config.json", '{"format"'), ("config.json is damaged",)),
    "half-written clock": (
        _from("clock.json", "{"),
        ("clock.json is damaged", "restore it from a checkpoint"),
    ),
    "half-written data": (_from("data.json", '{"corpus": '), ("data.json is damaged", "remove it")),
    "half-written tokenizer": (_from("tokenizer.json", "{"), ("tokenizer.json",)),
    "weights cut short": (
        lambda case: ["generate", _cut("ema.safetensors")(case)],
        ("ema.safetensors is damaged or cut short", "use a checkpoint of the run instead"),
    ),
    "weights that are something else": (
        _from("ema.safetensors", b"PK\x03\x04"),
        ("ema.safetensors is damaged",),
    ),
    "another version": (
        _from("config.json", '{"format": "flowlm/99", "model": {}}'),
        ("has format 'flowlm/99', this version of flowlm reads 'flowlm/1'", "written by another version"),
    ),
    "another program": (_from("config.json", '{"model_type": "gpt2"}'), ("has format None",)),
    "another tokenizer": (
        lambda case: ["generate", _other_vocabulary(case)],
        ("this is the tokenizer of another run",),
    ),
    "resume without checkpoints": (
        lambda case: ["train", "--resume", _without_checkpoints(case)],
        ("has no checkpoint to resume from: start the run again with --force",),
    ),
    "resume a checkpoint of another version": (
        _resume(f"{NEWEST}/state.json", '{"format": "flowlm-checkpoint/99"}'),
        ("has format 'flowlm-checkpoint/99'", "resume with the version of flowlm that wrote it"),
    ),
    "resume a damaged checkpoint": (
        lambda case: ["train", "--resume", _cut(f"{NEWEST}/optimizer.safetensors")(case)],
        ("step-00000030/optimizer.safetensors is damaged or cut short",),
    ),
    "resume a config of another version": (
        _resume("config.toml", "[train]\nwarp = 9\n"),
        ("config.toml: unknown key 'train.warp'",),
    ),
    "resume with another tokenizer": (
        lambda case: ["train", "--resume", _other_vocabulary(case)],
        ("are not in the vocabulary of 5",),
    ),
    "an existing run": (
        lambda case: ["train", case.recipe(), "--out", case.run()],
        ("already holds a run: continue it with --resume, replace it with --force", "choose another folder"),
    ),
    "an existing model": (
        lambda case: ["train", case.recipe(), "--out", case.spoilt("config.toml", None)],
        ("already holds a run",),
    ),
    "a run over its own teacher": (
        lambda case: ["distill", case.distillation(case.run()), "--out", case.run(), "--force"],
        ("is this run's own teacher: choose another folder with --out",),
    ),
    "a file as run": (
        lambda case: ["train", case.recipe(), "--out", case.text("x")],
        ("text.txt is a file: choose a folder for the run with --out",),
    ),
    "a file in the way": (
        lambda case: ["train", case.recipe(), "--out", case.text("x") / "run"],
        ("cannot write", "text.txt/run", "choose another folder with --out"),
    ),
    "a run over a file of something else": (
        lambda case: ["train", case.recipe(), "--out", case.named("tokenizer.json", "{}").parent],
        ("holds tokenizer.json of no run, which a run would write over: choose another folder with --out",),
    ),
    "samples over a file": (
        lambda case: ["generate", flm(), "--out", case.text("x")],
        ("text.txt is there already: name another file with --out, or replace it with --force",),
    ),
    "rows over a file": (
        lambda case: ["evaluate", case.run(), "--steps", "1", "--json", case.text("x")],
        ("text.txt is there already: name another file with --json",),
    ),
    "rows into a folder": (
        lambda case: ["evaluate", case.run(), "--steps", "1", "--json", case.folder],
        ("is a folder: name a file",),
    ),
    "rows under a file": (
        lambda case: ["evaluate", case.run(), "--steps", "1", "--json", case.text("x") / "rows.json"],
        ("nothing can be written in", "text.txt; name a file elsewhere"),
    ),
    "the text of another run": (
        lambda case: ["evaluate", case.run(), "--steps", "1", "--data.path", case.text("x\ny\nz\nw\n")],
        ("text",),
    ),
    "an export over a run": (
        lambda case: ["export", flm(), "--out", case.run(), "--force"],
        ("run is a run with checkpoints, and its weights would be replaced: give another folder",),
    ),
    "an export among other files": (
        lambda case: ["export", flm(), "--out", case.named("README.md", "precious").parent],
        (
            "holds what no export made (README.md)",
            "choose another folder with --out, or write into it with --force",
        ),
    ),
    "an export over another program's model": (
        lambda case: ["export", flm(), "--out", case.named("config.json", "{}").parent, "--force"],
        ("config.json has format None",),
    ),
    "an export into a file": (
        lambda case: ["export", flm(), "--out", case.text("x")],
        ("text.txt is a file: give a folder",),
    ),
    "an export of a damaged history": (
        lambda case: [
            *("export", case.spoilt("metrics.jsonl", '{"step": 1}\n{"step"\n{"step": 2}\n')),
            *("--out", case.out),
        ],
        ("metrics.jsonl, line 2 is damaged", "remove that line"),
    ),
    "a report of a damaged history": (
        lambda case: [
            *("evaluate", case.spoilt("metrics.jsonl", "[1]\n"), "--steps", "1"),
            *("--report", case.folder / "report"),
        ],
        ("metrics.jsonl, line 1 is damaged",),
    ),
    "a card of a damaged description": (
        lambda case: ["evaluate", case.spoilt("about.json", "[]"), "--steps", "1", "--card"],
        ("about.json is damaged: it lacks title",),
    ),
    "a teacher that is a file": (
        lambda case: ["distill", "text-fmlm", "--teacher", case.text("x"), "--out", case.out],
        ("text.txt is a file: name the run directory of a trained model",),
    ),
    "options for a run that is told of": (
        lambda case: ["info", flm(), "--train.batch", "16"],
        ("--train.batch 16: of a run all is told that there is",),
    ),
    "a temperature that is no number": (
        _generate("--temperature", "nan"),
        ("temperature must be positive, got nan",),
    ),
    "a prior without end": (_generate("--prior-scale", "inf"), ("prior_scale must be positive, got inf",)),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = Case(tmp_path)
    monkeypatch.chdir(tmp_path)
    make, messages = CASES[name]
    args = make(case)
    before = content(tmp_path)
    assert command(*args) in (1, 2)
    text = said(capsys)
    for message in messages:
        assert message in text
    assert "Traceback" not in text
    assert "flowlm: " in text or "full helptext" in text
    # nothing that was there is changed, nothing half-made is left
    after = content(tmp_path)
    assert {path: after[path] for path in before if path in after} == before
    assert not [path for path in after if path.endswith(".tmp")]
    assert not [path for path in after.keys() - before.keys() if path.endswith(".safetensors")]


# ---------------------------------------------------------------------------- what is said, and then goes on


def test_long_lines_are_cut_or_split_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["a b c d e f g h i j k l m n"] * 2 + [f"{w} a b c" for w in "defghijklmn"]))
    over = {"data.path": str(path), "model.length": 6, "train.steps": 1}
    for rows, message in (
        ("cut", "2 of 13 passages are longer than 5 tokens and [EOS]: cut"),
        ("split", ": split into rows"),
    ):
        out = tmp_path / rows
        file = recipe(tmp_path / "r.toml", over | {"data.rows": rows})
        assert command("train", file, "--out", out) == 0
        assert message in said(capsys)
        meta = json.loads((out / "data.json").read_text())
        assert meta[rows] == 2


def test_any_number_of_passages_is_made_in_bounded_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def recorded(denoiser: Any, num: int, length: int, *args: Any, **options: Any) -> Sample:
        calls.append(num)
        return Sample(torch.zeros(num, length, dtype=torch.long), 1)

    monkeypatch.setattr(flows_module, "sample", recorded)
    assert command("generate", flm(), "--num", "2000", "--out", tmp_path / "s.jsonl") == 0
    assert sum(calls) == 2000
    assert max(calls) <= 256
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2001


# ---------------------------------------------------------------------------------------------- a failing machine


def test_a_full_disk_while_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, save = 0, safetensors.torch.save_file

    def full(flat: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(flat, path)

    file, run = recipe(tmp_path / "r.toml"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        assert command("train", file, "--out", run) == 1
    text = said(capsys)
    assert "flowlm: could not save the checkpoint of step 8: cannot write" in text
    assert "No space left on device" in text
    assert "free some space" in text
    assert f"the last good checkpoint is {run}/checkpoints/step-00000004" in text
    assert "Traceback" not in text
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    for name in ("model.safetensors", "ema.safetensors"):
        assert tensors(run / "checkpoints" / "step-00000004" / name).keys() == tensors(flm() / name).keys()
    assert command("train", "--resume", run) == 0


@pytest.mark.parametrize("where", ["run", "samples"])
def test_no_permission_to_write(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = os.mkdir

    def refuse(path: Any, *args: Any, **options: Any) -> None:
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    target = tmp_path / "locked" / "x"
    if where == "run":
        assert command("train", recipe(tmp_path / "r.toml"), "--out", target) == 1
    else:
        assert command("generate", flm(), "--num", "1", "--out", target) == 1
    text = said(capsys)
    assert f"cannot write {target}: Permission denied; nothing was written" in text
    assert "choose another folder with --out or change its permissions" in text
    assert "Traceback" not in text


def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.suffix == ".txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *args, **options)

    file = recipe(tmp_path / "r.toml", {"data.path": str(text := tmp_path / "own.txt")})
    text.write_text("a b\nb c\n")
    monkeypatch.setattr(Path, "open", refuse)
    assert command("train", file, "--out", tmp_path / "run") == 1
    assert "cannot be read (Permission denied): check its permissions" in said(capsys)


@pytest.mark.parametrize(
    ("error", "messages"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            (
                "out of memory at step 0",
                "--train.micro-batch 4 (accumulating 2 of them",
                "No checkpoint yet.",
            ),
        ),
        (None, ("the loss became nan", "the batch is in", "No checkpoint yet.", "--optim.lr")),
    ],
)
def test_a_run_that_must_stop(
    error: Exception | None,
    messages: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from flowlm.objectives import FlowObjective

    losses = FlowObjective.losses

    def broken(self: FlowObjective, *args: Any) -> dict[str, torch.Tensor]:
        if error is not None:
            raise error
        return losses(self, *args) * torch.nan

    monkeypatch.setattr(FlowObjective, "losses", broken)
    assert command("train", recipe(tmp_path / "r.toml"), "--out", tmp_path / "run") == 1
    text = said(capsys)
    for message in messages:
        assert message in text
    assert "Traceback" not in text


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The update of the last step breaks them, which no loss has shown yet."""
    file = recipe(tmp_path / "r.toml", {"train.steps": 1, "optim.warmup": 0})
    run = tmp_path / "run"
    assert command("train", file, "--out", run, "--optim.lr", "1e39") == 1
    assert "the weights are no longer finite after step 1: they were not saved. No checkpoint yet." in said(
        capsys
    )
    assert list((run / "checkpoints").iterdir()) == []


def test_a_corpus_smaller_than_a_batch_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.txt"
    path.write_text("the cat saw me\nthe dog saw you\nmy hen saw him\n")
    file = recipe(tmp_path / "r.toml", {"data.path": str(path), "train.steps": 2, "train.batch": 8})
    assert command("train", file, "--out", tmp_path / "run") == 0
    assert "the corpus has 2 rows, fewer than a batch of 8: every batch holds some of them twice" in said(
        capsys
    )
