"""The model that comes with the package: small, described in full, and able to write what its card says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from flowlm import FlowLM
from flowlm.config import RunConfig, dotted, dump_toml, read_run_config, resolved
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
        assert run["origin"]["commit"] in made
        assert run["origin"]["machine"] in made
    assert ABOUT["export"] in made
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
            if not (row["model"] == "5-gram" and column == "nats/token"):  # it has no valid story
                assert re.match(r"[\d.<>]+", row[column])


def test_its_commands_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's recipes with the options of the card's commands are the configurations it was trained with."""
    monkeypatch.chdir(tmp_path)
    asked: list[RunConfig] = []

    class Stopped(ValueError):
        pass

    def caught(config: RunConfig, folder: str, **rest: Any) -> None:
        asked.append(config)
        raise Stopped

    monkeypatch.setattr("flowlm.training.loop.Trainer", caught)
    shipped = read_run_config(PACKAGED)
    train, distill = (run["command"].split()[1:] for run in ABOUT["runs"])
    assert command(*train) == 1
    teacher = asked[0]
    assert teacher.model.backbone == shipped.model.backbone
    assert teacher.model.length == shipped.model.length
    assert teacher.data == shipped.data
    for run, config in zip(ABOUT["runs"], (teacher, shipped), strict=True):
        assert (config.train.steps, config.train.batch, config.train.seed) == (
            *(run["steps"], run["batch"], run["seed"]),
        )
    (tmp_path / "runs" / "flm").mkdir(parents=True)
    (tmp_path / "runs" / "flm" / "config.toml").write_text(dump_toml(teacher))
    assert command(*distill) == 1
    # a student's model is its teacher's, which is read where there is one
    assert dataclasses.replace(asked[1], model=shipped.model) == shipped
    plain = dotted(resolved(RunConfig()))
    then = {"flow_map.diagonal_target": "teacher"}
    for run, config in zip(ABOUT["runs"], asked, strict=True):
        recorded, now = dotted(run["config"]), dotted(resolved(config))
        # A student's model is its teacher's, and a flow has no flow map.
        none = "flow_map." if run["objective"] == "flow" else "model."
        other = tuple(name for name in now if name.startswith(none))
        # The semigroup takes no rate: how one would be taken, and what of, is nothing to it.
        assert now["flow_map.identity"] == "psd"
        other = (*other, "flow_map.derivative", "flow_map.log_floor")
        # What the data tell is not asked for.
        told = ("model.vocab_size", "model.vocabulary")
        assert all(now[name] in (recorded.get(name), 0, "") for name in told)
        other = (*other, *told)
        # what has become a choice since then is as it was
        assert {k: v for k, v in now.items() if k not in other} == {
            k: recorded.get(k, (plain | then)[k]) for k in now if k not in other
        }


def whole(texts: list[str]) -> float:
    """Share of texts without filling in them."""
    return sum("[PAD]" not in text for text in texts) / len(texts)


def test_one_call_writes_english(model: FlowLM) -> None:
    texts = model.generate(200, steps=1, seed=5, dtype="float32")
    assert len(set(texts)) == len(texts)
    known = set(Grammar().vocabulary)
    # a word of three that follow each other is no chance
    triples = {
        tuple(story[i : i + 3]) for story in map(words, Grammar().sample(4000, 1)) for i in range(len(story))
    }
    own = [words(text) for text in texts]
    assert sum(word in known for text in own for word in text if word.isalpha()) >= 0.98 * sum(
        word.isalpha() for text in own for word in text
    )
    runs = [tuple(text[i : i + 3]) in triples for text in own for i in range(len(text) - 2)]
    assert sum(runs) / len(runs) > 0.75
    assert whole(texts) > 0.8


def test_more_calls_write_better(model: FlowLM) -> None:
    """As the card says, within what 200 stories leave to chance."""
    said = {
        row["steps"]: float(row["valid"].split()[0]) / 100 for row in tables()[0] if row["model"] == "FMLM"
    }
    for steps in (2, 4):
        found = evaluate_texts(model.generate(200, steps=steps, seed=6, dtype="float32"), Grammar())["valid"]
        share = said[str(steps)]
        assert abs(found - share) < 4 * (share * (1 - share) / 200) ** 0.5


def test_without_a_run_it_is_taken(capsys: pytest.CaptureFixture[str], model: FlowLM) -> None:
    assert command("generate", "--num", "2", "--dtype", "float32") == 0
    assert capsys.readouterr().out == "".join(text + "\n\n" for text in model.generate(2, dtype="float32"))


def test_the_readme_says_the_same(model: FlowLM) -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    by_law, _ = tables()
    shares = [row["valid"].split()[0] for row in by_law if row["model"] == "FMLM"]
    steps = [row["steps"] for row in by_law if row["model"] == "FMLM"]
    for said in (
        f"{', '.join(shares[:-1])} and {shares[-1]} % of its stories",
        f"in {', '.join(steps[:-1])} and {steps[-1]} calls",
        f"has {sum(path.stat().st_size for path in PACKAGED.iterdir()) / 1e6:.1f} MB",
    ):
        assert said in " ".join(readme.split())
