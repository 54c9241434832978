"""Configuration: TOML and overrides, strict names and types, a round trip, and every field explained."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowlm import cli
from flowlm.config import (
    OptimConfig,
    RunConfig,
    default_run_folder,
    dump_toml,
    from_dict,
    load_recipe,
    merge,
    nearest,
    read_toml,
    recipe_path,
    to_dict,
)
from flowlm.data.corpora import DataConfig
from helpers import settings

RECIPES = [
    path
    for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
    if not path.stem.startswith("compare-")  # several runs each
]


def _sections(kind: type) -> Iterator[type]:
    """A dataclass and those that it is made of."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from _sections(hint)  # type: ignore[arg-type]


def _flat(config: dict[str, Any], where: str = "") -> dict[str, Any]:
    out = {}
    for key, value in config.items():
        out |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return out


SECTIONS = list(_sections(RunConfig))
KINDS = [*SECTIONS, cli.GenerateOptions, cli.EvaluateOptions, cli.DemoOptions]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_is(kind: type) -> None:
    """These become the help of the command line."""
    assert inspect.getdoc(kind)
    lines: list[ast.stmt] = []
    for declaring in kind.__mro__[:-1]:
        body = ast.parse(inspect.cleandoc(inspect.getsource(declaring))).body[0]
        assert isinstance(body, ast.ClassDef)
        lines += body.body
    explained = set()
    for node, after in itertools.pairwise(lines):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            assert isinstance(node.target, ast.Name)
            explained.add(node.target.id)
    hints = typing.get_type_hints(kind)
    assert {
        f.name for f in dataclasses.fields(kind) if not dataclasses.is_dataclass(hints[f.name])
    } == explained


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_dataclasses_are_frozen_with_defaults(kind: type) -> None:
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(kind)[0].name, 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_come_back_from_what_is_saved(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path)
    saved = tmp_path / "config.toml"
    saved.write_text(dump_toml(config))
    assert load_recipe(saved) == config
    assert to_dict(config) == tomllib.loads(dump_toml(config))


def test_defaults_are_what_the_grammar_recipe_uses() -> None:
    """A field that the recipe does not name has one value, with or without the recipe."""
    path = recipe_path("grammar")
    named, used, default = (
        _flat(read_toml(path)),
        _flat(to_dict(load_recipe("grammar"))),
        _flat(to_dict(RunConfig())),
    )
    assert named.keys() <= used.keys() == default.keys()
    assert {key: value for key, value in used.items() if value != default[key]}.keys() <= named.keys()
    assert {key: used[key] for key in named} == named


def test_a_corpus_in_place_of_a_recipes_own() -> None:
    own = load_recipe("owt-flm")
    other = load_recipe("owt-flm", "lm1b-unwrapped")
    assert other.data == DataConfig(corpus="lm1b-unwrapped")
    assert (own.model.length, own.model.vocab_size) == (1024, 50258)
    assert (other.model.length, other.model.vocab_size) == (128, 0)  # V is the tokenizer's
    assert dataclasses.replace(other, data=own.data, model=own.model) == own
    assert load_recipe("owt-flm", "openwebtext") == own == load_recipe("owt-flm", "text")


def test_merge() -> None:
    one = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(one, {"a": {"c": 4}, "e": 5}) == {"a": {"b": 1, "c": 4}, "d": 3, "e": 5}
    assert one == {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


def test_dashes_are_underscores() -> None:
    assert from_dict(RunConfig, {"train": {"micro-batch": 4}}).train.micro_batch == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nsteps = 3", "unknown key 'trian': did you mean 'train'?"),
        ("[train]\nstep = 3", "unknown key 'train.step': did you mean 'steps'?"),
        ("[model.backbone]\nwidht = 3", "unknown key 'model.backbone.widht': did you mean 'width'?"),
        ("[optim]\nqqq = 3", "unknown key 'optim.qqq': known: lr, muon_lr,"),
        ("train = 3", "train is a section: expected a table, got 3"),
        ("[train]\nsteps = 3.5", "train.steps must be int, got float 3.5"),
        ("[train]\nsteps = true", "train.steps must be int, got bool True"),
        ("[train]\nsteps = '3'", "train.steps must be int, got str '3'"),
        ("[optim]\nlr = 'fast'", "optim.lr must be float, got str 'fast'"),
        ("[optim]\nlr = true", "optim.lr must be float, got bool True"),
        ("[train]\ncompile = 1", "train.compile must be bool, got int 1"),
        ("objective = 3", "objective must be str, got int 3"),
        ("objective = 'flwo'", "objective = 'flwo': use 'flow', 'flow-map', 'ar'"),
        ("teacher = 'runs/x'", "teacher is set but the objective is 'flow'"),
        ("[train]\nsteps = 0", "train.steps must be at least 1, got 0"),
        ("[train]\nsteps = -3", "train.steps must be at least 1, got -3"),
        ("[train]\nmicro_batch = -3", "train.micro_batch cannot be negative, got -3"),
        ("[train]\nema = 1.0", r"train.ema must lie in [0, 1), got 1.0"),
        ("[train]\nchoose = 'first'", "train.choose = 'first': use 'last' or 'best'"),
        (
            "[optim]\nschedule = 'linear'",
            "optim.schedule = 'linear': use 'constant', 'cosine' or 'trapezoid'",
        ),
        ("[optim]\nlr = 0", "optim.lr must be positive, got 0.0"),
        ("[optim]\nclip = -1.0", "optim.clip cannot be negative, got -1.0"),
        ("[clock]\nkind = 'slow'", "clock.kind = 'slow': use 'fixed' or 'adaptive'"),
        ("[clock]\nrefit_every = 0", "clock.refit_every must be at least 1, got 0"),
        ("[flow_map]\ndiagonal = 2.0", "flow_map.diagonal is a share of rows in [0, 1], got 2.0"),
        ("[model.backbone]\nwidth = 30\nheads = 4", "width 30 over 4 heads must be a whole, even head width"),
        ("[model.backbone]\nnorm = 'batch'", "model.backbone.norm = 'batch' is not one of layer, rms"),
        (
            "[data]\ncorpus = 'grammer'",
            "data.corpus = 'grammer' is unknown: the nearest known name is 'grammar'",
        ),
        ("[data\n", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe at .*nowhere\.toml: give the path of a \.toml file"):
        read_toml(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"is a folder: a recipe is a \.toml file"):
        read_toml(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.toml is not valid TOML"):
        read_toml(tmp_path / "b.toml")


def test_recipes_by_name() -> None:
    assert recipe_path("grammar").name == "grammar.toml"
    assert recipe_path("grammar").exists()
    assert recipe_path("my/own.toml") == Path("my/own.toml")
    with pytest.raises(ValueError, match=r"no recipe named 'gramar': did you mean 'grammar(-fmlm)?'"):
        recipe_path("gramar")


def test_nearest() -> None:
    assert nearest("lenght", ["width", "length"]) == "did you mean 'length'?"
    assert nearest("zzz", ["width", "length"]) == "known: width, length"


def test_run_folders_are_named_after_recipes() -> None:
    assert default_run_folder("recipes/grammar.toml") == Path("runs/grammar")
    assert default_run_folder("grammar") == Path("runs/grammar")


def test_an_override_of_a_section_keeps_the_rest() -> None:
    assert settings({"optim.lr": 0.1}).optim == OptimConfig(lr=0.1, warmup=2)
