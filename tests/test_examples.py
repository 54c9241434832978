"""The examples run, show what they claim, and write only where they are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str | Path, tmp_path: Path, *args: str) -> str:
    """The output of an example, run in an empty folder which it leaves empty."""
    here = tmp_path / "here"
    here.mkdir()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args], cwd=here, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir())
    return done.stdout


def test_each_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert [name for name in files if f'"{name}"' not in text] == []


def test_clock(tmp_path: Path) -> None:
    out = run("clock.py", tmp_path, str(tmp_path / "plots"))
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in out.splitlines()[3:8]}
    # t at τ = .01 … .99 by quadrature of another kind, rounded; the printed values are rounded too.
    assert rows["27"] == pytest.approx(
        [0.106, 0.313, 0.426, 0.568, 0.669, 0.734, 0.775, 0.794, 0.823], abs=1.6e-3
    )
    assert rows["50,258"] == pytest.approx(
        [0.646, 0.717, 0.744, 0.779, 0.809, 0.831, 0.848, 0.856, 0.870], abs=1.6e-3
    )
    assert (tmp_path / "plots" / "clock.png").stat().st_size > 1000


def test_flow_on_three_tokens(tmp_path: Path) -> None:
    out = run("flow_on_three_tokens.py", tmp_path)  # no folder given: a temporary one
    shares = {
        int(steps): [float(x) for x in numbers.split()]
        for steps, numbers in re.findall(r"(\d+) steps: shares \[([\d. ]+)\]", out)
    }
    assert shares[1] == [1, 0, 0]
    assert shares[128] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    picture = Path(out.split("written to ")[1].strip())
    assert picture.is_relative_to(tmp_path)
    assert picture.stat().st_size > 1000


def test_one_step(tmp_path: Path) -> None:
    out = run("one_step.py", tmp_path)
    share = {
        (name, int(k)): float(x) for name, k, x in re.findall(r"(flow|map) +(\d+) steps: +([\d.]+) %", out)
    }
    assert share["flow", 1] < 5
    assert share["flow", 32] > 99
    assert share["map", 1] > 45
    assert share["map", 4] > share["map", 1]


@pytest.mark.slow
def test_continue_training(tmp_path: Path) -> None:
    out = run("continue_training.py", tmp_path, str(tmp_path / "runs"))
    found = {
        name: (float(loss), float(first), float(second))
        for name, loss, first, second in re.findall(
            r"^(\w+) .*loss ([\d.]+): +([\d.]+) % of the first kind, +([\d.]+) % of the second kind",
            out,
            re.M,
        )
    }
    assert list(found) == ["source", "continued", "fresh"]
    assert found["source"][1] > 80
    assert found["source"][2] == 0
    # The same steps on the second text take the trained model much further.
    assert found["continued"][0] < 0.5 * found["fresh"][0]
    assert found["continued"][2] > found["fresh"][2] + 20
    assert found["continued"][1] < 20
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "continued",
        "first.txt",
        "fresh",
        "second.txt",
        "source",
    ]


NOTEBOOK = EXAMPLES / "two_minutes.ipynb"


def script_of(notebook: Path) -> str:
    """The code cells of a notebook in their order, as one program."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_notebook_is_well_formed() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in ids)
    for cell in book["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert not cell.get("outputs"), "clear the outputs before committing"
        assert cell.get("execution_count") is None
        # Lines of a source keep their ends, all but the last.
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert all(kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code" and i > 1), (
        "prose comes before code"
    )


def test_the_notebook_needs_no_notebook() -> None:
    for line in script_of(NOTEBOOK).splitlines():
        assert not line.lstrip().startswith(("%", "!", "?")), f"only notebooks understand {line!r}"
    compile(script_of(NOTEBOOK), NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_two_minutes(tmp_path: Path) -> None:
    program, long = script_of(NOTEBOOK), "FLOW_STEPS, MAP_STEPS = 300, 200"
    assert program.count(long) == 1
    script = tmp_path / "two_minutes.py"
    script.write_text(program.replace(long, "FLOW_STEPS, MAP_STEPS = 150, 80"), encoding="utf-8")
    out = run(script, tmp_path)
    found = {
        (name, int(calls)): (float(right), int(new))
        for name, calls, right, new in re.findall(r"^(flm|fmlm) +(\d) +([\d.]+) % +(\d+) ", out, re.M)
    }
    assert list(found) == [(name, calls) for name in ("flm", "fmlm") for calls in (1, 2, 4, 8)]
    assert found["flm", 1][0] < 30
    assert found["flm", 8][0] > 65
    assert found["fmlm", 1][0] > found["flm", 1][0] + 20
    assert found["fmlm", 8][0] > found["fmlm", 1][0]
    # A tenth of the sentences was never shown: of about 400 right ones, some 40.
    assert 15 < found["flm", 8][1] < 80
    sure = [int(n) for n in re.findall(r"^t = [\d.]+   sure of +(\d+) of 16   \w", out, re.M)]
    assert len(sure) == 8
    assert sure[0] < 11
    assert sure[-1] > sure[0] + 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_your_own_text(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(
        "\n".join(f"the {a} {b} runs." for a in ("big", "old", "red") for b in ("cat", "dog", "hen", "fox"))
    )
    out = run("your_own_text.py", tmp_path, str(text), str(tmp_path / "runs"), "4")
    assert "11 + 1 rows of 64 tokens" in out
    assert (tmp_path / "runs" / "fmlm" / "model.safetensors").exists()
    assert len(out.splitlines()[-5:]) == 5
