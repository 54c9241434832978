"""The README is true: its commands run, its code runs, what it names exists."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from flowlm import runs
from flowlm.cli import main
from flowlm.config import recipe_path
from flowlm.data.grammar import Grammar
from flowlm.data.registry import CORPORA

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "docs/objectives.md",
    "docs/scaling.md",
)

LOOP = "--train.steps 4 --train.save-every 2 --train.eval-every 0 --train.batch 4 --train.device cpu --data.num 200"
DATA = "--data.held-out 20"
SHAPE = "--model.backbone.width 32 --model.backbone.heads 2 --model.backbone.depth 1"
#: What is appended to a command so that it takes a second and not minutes.
SHRINK = {
    "prepare": DATA,
    "export": "",
    "train": f"{LOOP} {DATA} {SHAPE}",
    "distill": f"{LOOP} {DATA} --flow-map.rollout-steps 2",
    "generate": "--device cpu",
    "evaluate": "--device cpu --num 20",
    "info": "",
    "compare": (
        "--compare.budgets 0.001 --compare.seeds 0 --compare.rates 1 --compare.steps 1 8 64 --compare.num 10 "
        "--compare.frontier 1 --data.num 200 --train.batch 4 --train.device cpu --rounds.rounds 2 "
        f"--flow-map.rollout-steps 2 {SHAPE}"
    ),
}

#: Corpora whose text no test has; `tinystories` is also a recipe, for one's own.
NAMED = {*CORPORA} - {"tinystories"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def flowlm(command: str) -> None:
    """Run a flowlm command, shrunk, and expect success."""
    words = shlex.split(command)
    whole = "--resume" in words or any(word.endswith(".jsonl") for word in words[1:2])  # taken as they are
    extra = [] if whole else shlex.split(SHRINK[words[0]])
    assert main(words + extra) == 0, f"flowlm {shlex.join(words + extra)} failed"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with what the README assumes: the demo's runs, much smaller, and a text file."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        Path("my.txt").write_text("\n".join(Grammar().sample(200, seed=5)), encoding="utf-8")
        flowlm("train grammar --out runs/demo/flm")
        flowlm("distill grammar-fmlm --teacher runs/demo/flm --out runs/demo/fmlm")
        yield folder


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        # The recipes are printed, not run: this very test is one of them.
        shown = subprocess.run(["make", "-n", "-B", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert '-c constraints.txt -e ".[dev]"' in shown.stdout
    elif words[0] == "python3.11":
        assert words[1:] == ["-m", "venv", ".venv"]
    elif words[0] == ".venv/bin/python":
        assert words[1:] in (shlex.split('-m pip install -c constraints.txt -e ".[dev]"'), ["-m", "pytest"])
    elif words[:2] == ["python", "benchmarks/run.py"]:
        # Their own tests run them; here the options must exist.
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        importlib.import_module("run").parse(words[2:])
    elif words[1] == "prepare" and (words[2] in NAMED or words[2] == "--data.corpus"):
        prepared: list[Any] = []
        monkeypatch.setattr(
            "flowlm.data.corpora.prepare_corpus",
            lambda *args, **options: prepared.append(args) or Path("rows"),
        )
        assert main(words[1:]) == 0
        config, length = prepared[0][:2]
        named = words[2 + (words[2] == "--data.corpus")]
        assert (config.corpus, length) == (named, CORPORA[named].length)
    elif words[1] == "demo":
        asked: dict[str, Any] = {}
        monkeypatch.setattr("flowlm.demo.run_demo", lambda out, **options: asked.update(options, out=out))
        assert main(words[1:]) == 0
        assert asked["out"] == Path("runs/demo")
        assert 1 <= asked["minutes"] <= 15
    else:
        assert words[0] == "flowlm", f"this test does not know the command {line!r}"
        if words[1:3] == ["train", "--resume"]:
            shutil.rmtree(Path(words[3]) / "checkpoints" / "step-00000004")  # as if it had been killed
        flowlm(shlex.join(words[1:]))


COMMANDS = [block for name in DOCUMENTS for block in blocks((ROOT / name).read_text(encoding="utf-8"), "sh")]


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.splitlines()[0])
def test_shell_commands_run(block: str, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in block.splitlines():
        run_line(line, monkeypatch)


def test_commands_leave_what_the_text_says(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flowlm("generate runs/demo/fmlm --num 3 --out three.jsonl")
    assert "3 passages, 1 network call each" in capsys.readouterr().err
    flowlm("evaluate three.jsonl --json rows.json")
    model, law = json.loads(Path("rows.json").read_text(encoding="utf-8"))
    assert law["model"] == "law"
    assert law["valid"] == 1.0
    assert 0 <= model["valid"] <= 1
    for name in ("config.toml", "config.json", "model.safetensors", "ema.safetensors", "metrics.jsonl"):
        assert (workshop / "runs/demo/fmlm" / name).is_file()


def test_python_blocks_run(
    workshop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs._run
    tiny = {"train.steps": 2, "train.eval_every": 0, "train.batch": 4, "flow_map.rollout_steps": 2}
    shape = {f"model.backbone.{name}": n for name, n in (("width", 32), ("depth", 1), ("heads", 2))}

    def shrunk(values: dict[str, Any], out: str, options: dict[str, Any], *args: Any) -> Any:
        return whole(values, out, options | tiny | ({} if values.get("teacher") else shape), *args)

    monkeypatch.setattr(runs, "_run", shrunk)
    namespace: dict[str, Any] = {}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.count("call ") == 4
    # of the story that was written: whether it is valid, what it breaks, how likely it is
    valid, likelihood = re.findall(r"^(True|False) \(.*?\) (-?inf|-?[\d.]+)$", printed, re.M)[-1]
    assert (valid == "False") == (likelihood == "-inf")


def test_results_were_made_by_the_commands_beside_them() -> None:
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    made = re.findall(r"^ +(flowlm (train|distill|evaluate) (\S+) .*)$", text, re.M)
    assert len(made) >= 16
    reports = {
        line: json.loads((ROOT / line.split("--report ")[1] / "report.json").read_text(encoding="utf-8"))
        for line, command, _ in made
        if command == "evaluate"
    }
    runs = {
        run["command"].split("--out ")[1].split()[0]: run["command"]
        for report in reports.values()
        for run in report.get("runs", ())
    }
    assert len(runs) >= 6
    for line, command, what in made:
        if command == "evaluate":
            assert reports[line]["command"] == line
        else:
            assert recipe_path(what).exists()
            # Paths of texts were another machine's, and reports of before kept no runs.
            words, typed = (
                set(re.sub(r"--data\.path \S+", "", text).split())
                for text in (line, runs.get(line.split("--out ")[1].split()[0], line))
            )
            assert words == typed


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    usage = capsys.readouterr().out
    for command in set(re.findall(r"^  flowlm (\w+)", usage, re.M)):
        assert f"| `flowlm {command}` |" in README


def test_equation_table_names_what_exists() -> None:
    rows = re.findall(r"^\| .* \| `(flowlm\.[\w.]+)` \|$", README, re.M)
    assert len(rows) >= 12
    for path in rows:
        parts = path.split(".")
        depth = next(n for n in range(len(parts), 0, -1) if _importable(".".join(parts[:n])))
        found = reduce(getattr, parts[depth:], importlib.import_module(".".join(parts[:depth])))
        assert found.__doc__, f"{path} has no docstring"
        assert found.__module__ == ".".join(parts[:depth]), f"{path} is defined in {found.__module__}"


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}, which is not there"


def test_layout_names_what_exists() -> None:
    (layout,) = blocks(README, "text")
    for line in layout.splitlines()[1:]:
        name = line.split()[0]
        folder = ROOT / "src/flowlm" if line.startswith("  ") else ROOT
        assert (folder / name).exists(), f"the layout names {name}"
    for module in (ROOT / "src/flowlm").glob("[a-z]*.py"):
        assert f"\n  {module.name} " in layout, f"the layout leaves out {module.name}"


def test_sample_stories_are_of_the_language() -> None:
    stories = [re.sub(r"\n?> ?", " ", quote).strip() for quote in re.findall(r"(?:^> .*\n)+", README, re.M)]
    assert len(stories) == 2
    for story in stories:
        assert Grammar().judge(story).valid, story


def test_facts_about_the_language() -> None:
    law = Grammar()
    facts = re.search(
        r"(\d+) words and marks,\s+stories of (\d+) to (\d+) tokens,\s+and ([\d.]+) nats", README
    )
    assert facts is not None
    assert [int(facts[i]) for i in (1, 2, 3)] == [len(law.vocabulary), law.min_tokens, law.max_tokens]
    assert float(facts[4]) == pytest.approx(law.entropy, abs=0.005)


def test_the_measured_section_can_be_filled() -> None:
    section = README.index("## Measured")
    for name in _measured().DOCUMENTS["README.md"]:
        begin, end = (f"<!-- {name}:{at} -->" for at in ("begin", "end"))
        assert README.count(begin) == README.count(end) == 1
        assert section < README.index(begin) < README.index(end)


def test_extras_and_versions_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\.\[(\w+)\]", README):
        assert extra in project["optional-dependencies"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _measured() -> Any:
    spec = importlib.util.spec_from_file_location("measured", ROOT / "results" / "measured.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_measured_figures_are_the_reports() -> None:
    script = _measured()
    assert "README.md" in script.DOCUMENTS
    for name in script.DOCUMENTS:
        assert script.filled(name) == (ROOT / name).read_text(encoding="utf-8"), (
            "run python results/measured.py"
        )
    assert script.COMPARED.exists() == script.REPORT.exists()
    if script.REPORT.exists():
        shown = json.loads(script.COMPARED.read_text(encoding="utf-8"))
        assert shown == script.compared(script.families_report()), "run python results/measured.py"


def test_what_the_demo_shows_of_a_comparison_is_of_its_largest_budget() -> None:
    script = _measured()
    row = {"model": "FMLM", "entry": "FMLM", "nfe": 1, "num": 10, "dtype": "float32", "parsed": 0.5}
    rows = [
        row | {"budget": budget, "seed": seed, "valid": valid}
        for budget, seed, valid in [(1.0, 0, 0.1), (4.0, 0, 0.2), (4.0, 1, 0.4)]
    ]
    claims = [
        {"claim": "A above B", "budget": budget, "by": by, "held": 1, "tied": 1, "seeds": 2, "against": text}
        for budget, by, text in [
            (1.0, "valid", "1 against 2"),
            (4.0, "valid", "3 against 4"),
            (4.0, "perplexity", "5"),
        ]
    ]
    report = {"command": "flowlm compare c", "commit": "abc", "machine": "m", "torch": "2", "rows": rows}
    shown = script.compared(report)
    assert [table["rows"] for table in shown["tables"]] == [
        [{"model": "FMLM", "1": "30.0 ± 14.1"}],
        [{"model": "FMLM", "1": "50.0 ± 0.0"}],
    ]
    assert "4 TFLOP of training each" in shown["about"]
    assert "seeds 0, 1, 10 passages" in shown["about"]
    text = script.families(report | {"claims": claims})
    assert "| A above B | 1 of 2, 1 equal (3 against 4) | 1 of 2, 1 equal (5) |" in text
    assert "1 against 2" not in text


def test_means_over_seeds() -> None:
    script = _measured()
    row = {"model": "FMLM", "nfe": 1, "num": 10, "entropy": 3.5, "unique": 1.0, "parsed": 0.5}
    one = {"rows": [row | {"valid": 0.1, "slot_tv": None, "pair_tv": 0.2}]}
    two = {"rows": [row | {"valid": 0.4, "slot_tv": 0.3, "pair_tv": 0.4}]}
    (mean,) = script.mean_rows([one, two])
    assert mean["valid"] == pytest.approx(0.25)
    assert (mean["slot_tv"], mean["pair_tv"], mean["each seed"]) == (None, pytest.approx(0.3), "10.0 / 40.0")
