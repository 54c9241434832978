"""The examples run, show what they claim, and write only where they are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, tmp_path: Path, *args: str) -> str:
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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
