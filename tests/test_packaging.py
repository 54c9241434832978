"""What is installed: light to import, complete, and consistent with itself."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
import tomllib
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowlm
from flowlm.config import RunConfig, load_recipe, recipe_path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
#: Modules that take seconds or megabytes, and are needed by one command or another but not by all.
HEAVY = (
    "matplotlib",
    "rich",
    "tyro",
    "transformers",
    "datasets",
    "scipy",
    "pandas",
    "tokenizers",
    "huggingface_hub",
)


def python(*args: str, cwd: Path, path: Path | None = None) -> str:
    env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light(tmp_path: Path) -> None:
    code = f"import sys, flowlm; print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code, cwd=tmp_path).strip() == "[]"


def test_version_is_one(tmp_path: Path) -> None:
    assert flowlm.__version__ == PROJECT["version"]
    assert python("-m", "flowlm.cli", "--version", cwd=tmp_path).strip() == f"flowlm {flowlm.__version__}"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(flowlm.__version__)}$", citation, re.M)


def test_public_names_exist() -> None:
    for name in flowlm.__all__:
        assert hasattr(flowlm, name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_strictly(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path(path.stem).read_bytes() == path.read_bytes()
    assert isinstance(load_recipe(path), RunConfig)
    assert load_recipe(path.stem) == load_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# "), "a recipe says in its first line what it is for"


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'grammar'"):
        recipe_path("gramar")


def config_fields(cls: type) -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from config_fields(hints[f.name])
        yield cls.__name__, f.name


def test_every_config_field_is_read_somewhere() -> None:
    read = set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checks = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        read |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in checks
        }
    unread = [f"{cls}.{name}" for cls, name in config_fields(RunConfig) if name not in read]
    assert not unread, f"nothing reads {', '.join(unread)}"


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(lines, key=str.lower)
    pinned = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line)
        assert match, f"{line!r} is not name==version"
        pinned[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    required = [
        *PROJECT["dependencies"],
        *(x for extra in PROJECT["optional-dependencies"].values() for x in extra),
    ]
    for requirement in required:
        name = re.split(r"[><=~!\[; ]", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned, f"{name} has no tested version"


def test_wheel_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = (
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    )
    python(*build, str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("flowlm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/flowlm").rglob("*.py")}
    assert sources <= set(names)
    assert {"flowlm/py.typed", *(f"flowlm/recipes/{path.name}" for path in RECIPES)} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]
    code = "import flowlm.config as c; print(c.recipe_path('grammar')); print(c.load_recipe('grammar').objective)"
    shown = python("-c", code, cwd=tmp_path, path=tmp_path / "installed").split()
    assert shown == [str(tmp_path / "installed/flowlm/recipes/grammar.toml"), "flow"]
