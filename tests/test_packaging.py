"""What is installed: light to import, complete, consistent with itself, and enough to work."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
import torch

import flowlm
from flowlm import FlowLM
from flowlm.backbone import BackboneConfig
from flowlm.comparison.recipe import load_comparison
from flowlm.config import RunConfig, load_recipe, recipe_path
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import Denoiser, DenoiserConfig

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
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
    if path.stem.startswith("compare-"):
        assert load_comparison(path.stem).title
    else:
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


# ------------------------------------------------------------------------------------- dependencies and extras


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirement: str) -> str:
    """The distribution that a requirement asks for."""
    return canonical(re.split(r"[><=~!\[; ]", requirement)[0])


DEPENDENCIES = {named(x) for x in PROJECT["dependencies"]}


@functools.cache
def owners() -> dict[str, list[str]]:
    """The distributions that bring each module that can be imported here."""
    found = importlib.metadata.packages_distributions()
    return {module: [canonical(name) for name in names] for module, names in found.items()}


def distribution_of(module: str) -> str:
    """The distribution that brings a module; its own name where it is not installed."""
    return owners().get(module, [canonical(module)])[0]


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(lines, key=str.lower)
    pinned = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line)
        assert match, f"{line!r} is not name==version"
        pinned[canonical(match[1])] = match[2]
    for requirement in [*PROJECT["dependencies"], *(x for extra in EXTRAS.values() for x in extra)]:
        specifiers = pytest.importorskip("packaging.requirements").Requirement(requirement).specifier
        assert named(requirement) in pinned, f"{named(requirement)} has no tested version"
        assert pinned[named(requirement)] in specifiers, f"{requirement} does not allow the tested version"


@pytest.mark.parametrize(
    ("extra", "requirement"),
    [pytest.param(extra, x, id=f"{extra}-{named(x)}") for extra, xs in EXTRAS.items() for x in xs],
)
def test_extras_can_be_imported(extra: str, requirement: str) -> None:
    try:
        version = importlib.metadata.version(named(requirement))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{named(requirement)} of flowlm[{extra}] is not installed here")
    assert version in pytest.importorskip("packaging.requirements").Requirement(requirement).specifier
    modules = [m for m, by in owners().items() if named(requirement) in by and not m.startswith("_")]
    assert modules, f"{named(requirement)} brings nothing that can be imported"
    for module in modules:
        importlib.import_module(module)


def test_dev_has_every_other_extra() -> None:
    for extra, requirements in EXTRAS.items():
        assert {*requirements} <= {*EXTRAS["dev"]}, f"flowlm[dev] lacks something of flowlm[{extra}]"


#: A module of others that is imported, the source file, and the message of the error where it is missing.
Import = tuple[str, str, str]


def hints(nodes: list[ast.stmt]) -> str:
    """The texts of the import errors raised in these statements."""
    raised = [node for top in nodes for node in ast.walk(top) if isinstance(node, ast.Raise)]
    return " ".join(
        value.value
        for error in raised
        if isinstance(error.exc, ast.Call) and getattr(error.exc.func, "id", "") == "ImportError"
        for value in ast.walk(error.exc)
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    )


def imports(tree: ast.AST, file: str, hint: str = "") -> Iterator[Import]:
    """Every import of a module that is neither Python's nor ours, but for those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        inner = hint
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Try):
            inner = hints([s for handler in node.handlers for s in handler.body]) or hint
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.If):  # looked for, and asked for where it is not found
            looks = [
                n for n in ast.walk(node.test) if getattr(getattr(n, "func", n), "attr", "") == "find_spec"
            ]
            asked = [
                a.value
                for n in looks
                if isinstance(n, ast.Call)
                for a in n.args
                if isinstance(a, ast.Constant)
            ]
            yield from ((str(name), file, hints(node.body)) for name in asked if hints(node.body))
        for module in {name.partition(".")[0] for name in modules}:
            if module not in sys.stdlib_module_names and module not in ("flowlm", "__future__"):
                yield module, file, hint
        yield from imports(node, file, inner)


@functools.cache
def source_imports() -> list[Import]:
    files = sorted((ROOT / "src").rglob("*.py"))
    trees = ((ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))) for path in files)
    return [found for tree, file in trees for found in imports(tree, file)]


def test_everything_imported_is_a_dependency_or_an_extra_that_the_error_names() -> None:
    assert {"torch", "numpy", "filelock", "pyarrow", "matplotlib"} <= {
        module for module, *_ in source_imports()
    }
    for module, file, hint in source_imports():
        if distribution_of(module) in DEPENDENCIES and not hint:
            continue
        extras = re.findall(r"flowlm\[(\w+)\]", hint)
        assert extras, f"{file} imports {module}, no dependency, and does not say which extra brings it"
        for extra in extras:
            assert extra in EXTRAS, f"{file} names flowlm[{extra}], which does not exist"
            brought = {named(x) for x in EXTRAS[extra]}
            assert distribution_of(module) in brought, f"{file}: flowlm[{extra}] does not bring {module}"


def test_every_hint_was_looked_at() -> None:
    written = sorted(
        (str(path.relative_to(ROOT)), extra)
        for path in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"flowlm\[(\w+)\]", path.read_text(encoding="utf-8"))
    )
    read = {
        (file, extra) for _, file, hint in source_imports() for extra in re.findall(r"flowlm\[(\w+)\]", hint)
    }
    assert written
    assert {*written} == read


def test_nothing_is_listed_that_nothing_imports() -> None:
    used = {distribution_of(module) for module, *_ in source_imports()}
    assert used >= DEPENDENCIES, f"nothing imports {', '.join(DEPENDENCIES - used)}"
    for extra in EXTRAS.keys() - {"dev"}:
        listed = {named(x) for x in EXTRAS[extra]}
        assert listed <= used, f"flowlm[{extra}] lists {', '.join(listed - used)}, which nothing imports"


# ------------------------------------------------------------------------------------------- wheel and source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist of this checkout, and the wheel that comes of the sdist; made without an index."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: it comes with .[dev]")
    folder = tmp_path_factory.mktemp("built")
    python("-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    (sdist,) = folder.glob("flowlm-*.tar.gz")
    pip_wheel = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w")
    wheels = {}
    for name, source in (("checkout", ROOT), ("sdist", sdist)):
        python(*pip_wheel, str(folder / name), str(source), cwd=folder)
        (wheels[name],) = (folder / name).glob("flowlm-*.whl")
    return {"sdist": sdist, "wheel": wheels["checkout"], "wheel of the sdist": wheels["sdist"]}


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def package_files() -> dict[str, bytes]:
    """All that lies under src/flowlm, whatever its kind, but for Python's caches."""
    paths = (path for path in (ROOT / "src" / "flowlm").rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT / "src").as_posix(): path.read_bytes()
        for path in paths
        if "__pycache__" not in path.parts
    }


def test_wheel_is_complete(built: dict[str, Path]) -> None:
    files = content(built["wheel"])
    recipes = {f"flowlm/recipes/{path.name}": path.read_bytes() for path in RECIPES}
    about = {name for name in files if ".dist-info/" in name}
    assert {name: data for name, data in files.items() if name not in about} == package_files() | recipes
    assert "flowlm/py.typed" in files
    info = f"flowlm-{PROJECT['version']}.dist-info"
    wanted = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert about == {f"{info}/{name}" for name in wanted}
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"flowlm = flowlm.cli:main" in files[f"{info}/entry_points.txt"]
    metadata = files[f"{info}/METADATA"].decode()
    assert metadata.endswith((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {*re.findall(r"^Provides-Extra: (\S+)$", metadata, re.M)} == {*EXTRAS}


def test_sdist_gives_the_same_wheel(built: dict[str, Path]) -> None:
    ours, theirs = content(built["wheel"]), content(built["wheel of the sdist"])
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_sdist_is_the_repository(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {PurePosixPath(*PurePosixPath(m.name).parts[1:]).as_posix() for m in archive if m.isfile()}
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git, or not a checkout: there is no list of what belongs to the repository")
    git = ("git", "-C", str(ROOT), "ls-files", "-z")
    listed = [
        {
            name
            for name in subprocess.check_output([*git, *more], text=True).split("\0")
            if (ROOT / name).is_file()
        }
        for more in ((), ("--others", "--exclude-standard"))
    ]
    tracked, others = listed
    assert tracked <= names, f"not in the sdist: {', '.join(sorted(tracked - names))}"
    extra = names - tracked - others
    assert extra == {"PKG-INFO"}, f"in the sdist, but not in the repository: {', '.join(sorted(extra))}"


def release_commands() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A release")[2]
    return [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.splitlines()
        if line.strip()
    ]


def test_release_commands_name_what_exists() -> None:
    commands = release_commands()
    assert len(commands) > 15
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= {*targets}, command
        for name in re.findall(r"(?:results/[\w.]+|constraints\.txt)", command):
            assert (ROOT / name).exists(), command
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert extra in EXTRAS, command
        if words[0].endswith("flowlm"):
            assert words[1] in ("--version", "info", "train", "generate"), command
    written = next(c for c in commands if "pip freeze" in c).partition(" | ")[2].partition(" > ")[0]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    frozen = re.sub(r"^(torch==.*)$", r"\1+cpu", pinned, flags=re.M)
    done = subprocess.run(written, shell=True, input=frozen, capture_output=True, text=True)
    assert done.stdout == pinned, "the command of the release does not write constraints.txt as it is"


# ----------------------------------------------------------------------------------------- a clean environment


def closure(requirements: list[str]) -> list[importlib.metadata.Distribution]:
    """The installed distributions that these requirements bring, with all that those require themselves."""
    parse = pytest.importorskip("packaging.requirements", reason="packaging comes with .[dev]").Requirement
    found: dict[str, importlib.metadata.Distribution] = {}
    extras: dict[str, set[str]] = {}
    waiting = [parse(x) for x in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonical(wanted.name)
        if name in found and wanted.extras <= extras[name]:
            continue
        found[name] = importlib.metadata.distribution(name)
        extras[name] = extras.get(name, set()) | wanted.extras
        for inner in map(parse, found[name].requires or ()):
            if any(
                inner.marker is None or inner.marker.evaluate({"extra": extra})
                for extra in ("", *extras[name])
            ):
                waiting.append(inner)
    return list(found.values())


class CleanEnvironment:
    """A new virtual environment with the dependencies that pyproject.toml lists and nothing else, not even pip.

    Nothing is fetched: what the dependencies installed here is linked into it, file by file or folder by folder.
    """

    def __init__(self, folder: Path, wheel: Path, extra: str = ""):
        """Has the dependencies of an `extra` too, if it is named."""
        self.folder = folder / "venv"
        python("-m", "venv", "--without-pip", str(self.folder), cwd=folder)
        (self.site,) = self.folder.glob("lib/python*/site-packages")
        for distribution in closure([*PROJECT["dependencies"], *EXTRAS.get(extra, ())]):
            for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
                link, target = self.site / top, Path(str(distribution.locate_file(top)))
                if not link.exists() and target.exists():
                    link.symlink_to(target)
        self.bin = self.folder / "bin"
        install = ("-m", "pip", "--python", str(self.bin / "python"), "install", "-q")
        python(*install, "--no-deps", "--no-index", str(wheel), cwd=folder)

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "FLOWLM_TEST"))
        }
        env |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        program = [str(self.bin / command[0]), *command[1:]]
        return subprocess.run(program, cwd=cwd, env=env, capture_output=True, text=True)

    def __call__(self, *command: str, cwd: Path) -> str:
        done = self.run(*command, cwd=cwd)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def clean(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    if not sys.platform.startswith(("linux", "darwin")):
        pytest.skip("the clean environment is made of symbolic links in a POSIX layout")
    # by test_sdist_gives_the_same_wheel, also what the checkout gives
    return CleanEnvironment(tmp_path_factory.mktemp("clean"), built["wheel of the sdist"])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that has learned nothing: it writes words, in some order."""
    tokenizer = Tokenizer.train_words(["one two three four five six"])
    backbone = BackboneConfig(width=16, depth=1, heads=2, conditioning=16)
    config = DenoiserConfig(vocab_size=tokenizer.vocab_size, length=8, backbone=backbone)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    denoiser = Denoiser(config)
    # A head as it begins is 0: it would write nothing but end tokens.
    torch.nn.init.normal_(denoiser.head.weight, generator=torch.Generator().manual_seed(0))
    FlowLM(denoiser, tokenizer).save_pretrained(folder)
    return folder


def test_installed_in_a_clean_environment(clean: CleanEnvironment, tmp_path: Path) -> None:
    assert clean("flowlm", "--version", cwd=tmp_path) == f"flowlm {PROJECT['version']}\n"
    code = "import flowlm, importlib.metadata as m; print(flowlm.__file__, m.version('flowlm'))"
    assert clean("python", "-c", code, cwd=tmp_path).split() == [
        str(clean.site / "flowlm" / "__init__.py"),
        PROJECT["version"],
    ]
    # nothing of the environment that runs the tests, and nothing that is not needed
    others = ("pytest", "matplotlib", "pyarrow", "transformers", "pip")
    code = f"import importlib.util as u; print([name for name in {others} if u.find_spec(name)])"
    assert clean("python", "-c", code, cwd=tmp_path) == "[]\n"
    installed = {
        path.relative_to(clean.site).as_posix(): path.read_bytes()
        for path in (clean.site / "flowlm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"flowlm/recipes/{path.name}": path.read_bytes() for path in RECIPES}
    assert installed == package_files() | recipes


def test_the_clean_environment_describes_a_recipe(clean: CleanEnvironment, tmp_path: Path) -> None:
    shown = tomllib.loads(clean("flowlm", "info", "grammar", cwd=tmp_path))
    assert shown["objective"] == "flow"
    assert shown["data"]["corpus"] == "grammar"


def test_the_clean_environment_generates(clean: CleanEnvironment, tiny_model: Path, tmp_path: Path) -> None:
    command = (
        "flowlm",
        "generate",
        str(tiny_model),
        "--num",
        "3",
        "--steps",
        "2",
        "--seed",
        "7",
        "--device",
        "cpu",
    )
    texts = clean(*command, "--dtype", "float32", cwd=tmp_path).split("\n\n")
    here = FlowLM.from_pretrained(tiny_model, device="cpu").generate(3, steps=2, seed=7)
    assert [text.strip() for text in texts if text.strip()] == [text for text in here if text] != []


def test_the_clean_environment_writes_english(clean: CleanEnvironment, tmp_path: Path) -> None:
    """Right after installation, with the model of the package and no argument."""
    from flowlm.data.grammar import Grammar
    from flowlm.evaluation.metrics import words

    texts = [
        text for text in clean("flowlm", "generate", "--device", "cpu", cwd=tmp_path).split("\n\n") if text
    ]
    assert len(texts) == 8
    own = [word for text in texts for word in words(text) if any(map(str.isalpha, word))]
    assert len(own) > 8 * 40
    # eight stories; tests/test_packaged.py counts more of them
    assert sum(word in set(Grammar().vocabulary) for word in own) / len(own) >= 0.9
    card = clean("flowlm", "info", cwd=tmp_path)
    assert "## How it was made" in card
    assert "## How good it is" in card
    assert "\n## In 1 network call" not in card


def test_the_clean_environment_trains(clean: CleanEnvironment, tmp_path: Path) -> None:
    lines = [f"{a} of {b}" for a in ("one", "two", "three", "four") for b in ("five", "six", "seven")]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    command = "flowlm train grammar --data.corpus text --data.path text.txt --data.held-out 4 --out run --device cpu"
    shape = "--model.length 8 --model.backbone.width 32 --model.backbone.depth 1 --model.backbone.heads 2"
    loop = "--train.steps 2 --train.batch 4 --train.sample-steps 1"
    clean(*f"{command} {shape} {loop}".split(), cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_what_an_extra_brings_is_asked_for_in_the_clean_environment(
    clean: CleanEnvironment, tmp_path: Path
) -> None:
    (tmp_path / "text.parquet").write_bytes(b"PAR1 and no more")
    for command, hint in (
        ("flowlm demo --minutes 1 --device cpu", 'pip install "flowlm[plot]"'),
        (
            "flowlm prepare --data.corpus text --data.path text.parquet --out rows",
            "pip install 'flowlm[data]'",
        ),
    ):
        done = clean.run(*command.split(), cwd=tmp_path)
        assert done.returncode == 1, command
        assert hint in done.stderr, command
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def with_extra(
    built: dict[str, Path], clean: CleanEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], CleanEnvironment]:
    """A clean environment with one extra, which is skipped where the extra is not installed here."""

    def make(extra: str) -> CleanEnvironment:
        for requirement in EXTRAS[extra]:
            pytest.importorskip(named(requirement), reason=f"flowlm[{extra}] is not installed here")
        return CleanEnvironment(tmp_path_factory.mktemp(extra), built["wheel of the sdist"], extra)

    return make


def test_the_extra_data_reads_parquet(with_extra: Callable[[str], CleanEnvironment], tmp_path: Path) -> None:
    clean = with_extra("data")
    code = """
import pyarrow as pa, pyarrow.parquet as parquet
parquet.write_table(pa.table({"body": [f"{a} of {b}" for a in "abcd" for b in "efgh"]}), "text.parquet")
"""
    clean("python", "-c", code, cwd=tmp_path)
    command = "flowlm prepare --data.corpus text --data.path text.parquet --data.field body --data.held-out 4"
    clean(*command.split(), "--out", "rows", cwd=tmp_path)
    meta = json.loads((tmp_path / "rows" / "meta.json").read_text(encoding="utf-8"))
    assert (meta["passages"], meta["held_out"]) == (16, 1)


def test_the_extra_eval_scores_with_a_model_of_hugging_face(
    with_extra: Callable[[str], CleanEnvironment], tiny_model: Path, tmp_path: Path
) -> None:
    clean = with_extra("eval")
    code = """
import tokenizers, transformers
from tokenizers import models, pre_tokenizers
words = ["<|endoftext|>", "one", "two", "three", "four", "five", "six", "?"]
model = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
model.pre_tokenizer = pre_tokenizers.Whitespace()
wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=words[0], unk_token="?")
wrapped.save_pretrained("gpt")
shape = dict(n_positions=16, n_embd=16, n_layer=1, n_head=2)
config = transformers.GPT2Config(vocab_size=len(words), **shape, bos_token_id=0, eos_token_id=0)
transformers.GPT2LMHeadModel(config).save_pretrained("gpt")
"""
    clean("python", "-c", code, cwd=tmp_path)
    clean(*f"flowlm generate {tiny_model} --num 8 --device cpu --out samples.jsonl".split(), cwd=tmp_path)
    command = "flowlm evaluate samples.jsonl --scorer ./gpt --device cpu --json rows.json"
    clean(*command.split(), cwd=tmp_path)
    (row,) = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert row["num"] == 8
    assert "gpt" in row["scorer"]
    assert row["perplexity"] > 1


def test_the_extra_plot_draws(with_extra: Callable[[str], CleanEnvironment], tmp_path: Path) -> None:
    clean = with_extra("plot")
    code = """
from flowlm.evaluation.plots import Panel, plot_panels
lines = {"FMLM": [(1, 0.3, 0.2, 0.4), (8, 0.5, 0.4, 0.6)]}
plot_panels([[Panel("valid", "calls", lines, share=True)]], "plot.png")
"""
    clean("python", "-c", code, cwd=tmp_path)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------- without an environment of one's own


def one_line_runs() -> list[str]:
    """The README's commands that make an environment for themselves."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    return re.findall(r"`((?:uvx|pipx run) [^`]+)`", text)


def test_the_readme_has_a_line_for_each_runner() -> None:
    assert [line.split()[0] for line in one_line_runs()] == ["uvx", "pipx"]


@pytest.mark.slow
@pytest.mark.parametrize("line", one_line_runs(), ids=lambda line: line.split()[0])
def test_a_line_that_makes_its_own_environment(line: str) -> None:
    if shutil.which(line.split()[0]) is None:
        pytest.skip(f"{line.split()[0]} is not installed here")
    done = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["data"]["corpus"] == "grammar"
