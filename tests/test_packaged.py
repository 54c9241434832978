"""The model that comes with the package: small, described in full, and able to write what its card says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flowlm import FlowLM
from flowlm.data.grammar import Grammar
from flowlm.evaluation.metrics import evaluate_texts, words
from flowlm.model import PACKAGED
from helpers import command

CARD = (PACKAGED / "README.md").read_text(encoding="utf-8")
ABOUT: dict[str, Any] = json.loads((PACKAGED / "about.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> FlowLM:
    return FlowLM.from_pretrained()


def section(title: str) -> str:
    """A part of the card."""
    found = re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", CARD, re.M | re.S)
    assert found, f"the card has no part {title!r}"
    return found[1]


def tables() -> list[list[dict[str, str]]]:
    """The tables of its quality, a dictionary for each row."""
    out: list[list[dict[str, str]]] = []
    lines = section("How good it is").splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\| :?--", line):
            cells = [
                [cell.strip() for cell in row.strip("|").split("|")]
                for row in (lines[i - 1], *lines[i + 1 :])
            ]
            end = next((n for n, row in enumerate(cells) if len(row) < 2), len(cells))
            out.append([dict(zip(cells[0], row, strict=True)) for row in cells[1:end]])
    return out


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= 12_000_000
    assert {path.name for path in PACKAGED.iterdir()} == {
        *("README.md", "about.json", "clock.json", "config.json", "config.toml", "data.json"),
        *("model.safetensors", "tokenizer.json"),
    }


def test_the_card_says_what_it_is(model: FlowLM) -> None:
    assert "license: apache-2.0\n" in CARD
    assert f"{sum(p.numel() for p in model.denoiser.parameters()):,} parameters" in CARD
    data = section("Data")
    assert model.data["law_sha256"] in data
    assert f"{model.data['train']:,} training" in data
    made = section("How it was made")
    for run in ABOUT["runs"]:
        assert run["command"] in made
        assert f"{run['steps']:,} steps" in made
        assert run["seconds"] > 60
    assert [run["objective"] for run in ABOUT["runs"]] == ["flow", "flow-map"]
    assert not re.search(r"(?<![\w.])/(?:tmp|home|work|root)\b", CARD), (
        "no path of the machine it was made on"
    )


def test_the_card_says_how_good_it_is() -> None:
    by_law, by_text = tables()
    steps = ["1", "2", "4", "8", "64"]
    assert [row["steps"] for row in by_law if row["model"] == "FMLM"] == steps
    assert [row["steps"] for row in by_text if row["model"] == "FMLM"] == steps
    assert [row["model"] for row in by_text if row["model"] != "FMLM"] == ["held-out", "5-gram"]
    for row in by_text:
        for column in ("perplexity", "known words", "entropy", "self-BLEU", "copied", "longest copy"):
            assert re.match(r"[\d.<>]+", row[column]), f"{row['model']} has no {column}"
        assert float(row["known words"].strip("<> %")) >= 98
    for row in by_law:
        for column in ("valid", "slot TV", "pair TV", "entropy", "unique"):
            assert re.match(r"[\d.<>–]+", row[column])


def test_its_configuration_is_what_its_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training command of the teacher is one that this version takes, up to the first step."""
    monkeypatch.chdir(tmp_path)
    teacher = ABOUT["runs"][0]["command"].split()[1:]
    small = ["--train.steps", "1", "--train.eval-every", "0", "--train.no-compile", "--data.num", "200"]
    assert command(*teacher, *small, "--train.batch", "2", "--device", "cpu") == 0


def test_one_call_writes_english(model: FlowLM) -> None:
    texts = model.generate(200, steps=1, seed=5, dtype="float32")
    known = set(Grammar().vocabulary)
    own = [word for text in texts for word in words(text) if any(map(str.isalpha, word))]
    assert sum(word in known for word in own) / len(own) >= 0.98
    assert len(set(texts)) == len(texts)
    assert 40 < len(own) / len(texts) < 70
    # the card's figures were measured on a thousand passages of another seed
    said = float(tables()[0][0]["valid"].split()[0]) / 100
    valid = evaluate_texts(texts, Grammar())["valid"]
    assert abs(valid - said) < 4 * (said * (1 - said) / 200 + 1 / 200**2) ** 0.5


def test_more_calls_write_better(model: FlowLM) -> None:
    one, four = (evaluate_texts(model.generate(100, steps=k, seed=6), Grammar())["valid"] for k in (1, 4))
    assert four > one


def test_without_a_run_it_is_taken(capsys: pytest.CaptureFixture[str], model: FlowLM) -> None:
    assert command("generate", "--num", "2", "--dtype", "float32") == 0
    assert capsys.readouterr().out == "".join(text + "\n\n" for text in model.generate(2, dtype="float32"))


def test_the_readme_says_the_same(model: FlowLM) -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    by_law, by_text = tables()
    shares = [row["valid"].split()[0] for row in by_law if row["model"] == "FMLM"]
    steps = [row["steps"] for row in by_law if row["model"] == "FMLM"]
    known = by_text[0]["known words"]
    for said in (
        f"{', '.join(shares[:-1])} and {shares[-1]} % of its stories",
        f"in {', '.join(steps[:-1])} and {steps[-1]} calls",
        f"Of its words in one call {known}",
        f"has {sum(path.stat().st_size for path in PACKAGED.iterdir()) / 1e6:.1f} MB",
    ):
        assert said in " ".join(readme.split())
