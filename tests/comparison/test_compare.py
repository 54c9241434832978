"""A comparison: read strictly, every model at the same compute, nothing done twice, claims judged by the rows."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w

from flowlm import files
from flowlm.comparison.recipe import Claim, CompareConfig, load_comparison
from flowlm.comparison.report import (
    AT_ENTROPY,
    DISTANCES,
    NGRAM_AT_ENTROPY,
    PLAIN,
    VALID,
    Verdict,
    pivot,
    qualities,
    remarks,
    summary,
    verdicts,
)
from flowlm.comparison.runs import Interrupted, Runner, _knob, source_hash
from flowlm.config import merge, nested
from flowlm.training.checkpoint import RunDirectory
from flowlm.training.loop import DivergedError, Trainer
from helpers import command, corpus, said, silent, values

COMPARE = {
    "budgets": [0.0004, 0.0008],
    "seeds": [0, 1],
    "rates": [0.5, 1.0],
    "steps": [1, 2],
    "search_steps": [1],
    "num": 12,
    "search_num": 6,
    "frontier": [],
}
MODELS = {
    "FLM": {"objective": "flow"},
    "MDLM": {"objective": "mdlm", "samplers": [{}, {"last": "argmax"}]},
    "SDTT": {"objective": "sdtt", "base": "MDLM", "rounds": {"rounds": 2}},
    "FMLM": {"objective": "flow-map", "base": "FLM"},
}
CLAIMS = [{"better": "FMLM", "at": 1, "than": "SDTT", "than_at": 2}]


def common(over: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the models share: tiny networks on a tiny text."""
    out = merge(values(), nested({"train.eval_every": 0, **(over or {})}))
    del out["train"]["steps"]
    return out


def written(path: Path, over: dict[str, Any] | None = None) -> Path:
    """A recipe's file, with dotted overrides."""
    raw = {"title": "Tiny", "compare": COMPARE, "common": common(), "models": MODELS, "claims": CLAIMS}
    path.write_text(tomli_w.dumps(merge(raw, nested(over or {}))))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and the folder of its finished comparison."""
    folder = tmp_path_factory.mktemp("comparison")
    recipe = written(folder / "compare-tiny.toml")
    assert command("compare", recipe, "--out", folder / "out") == 0
    return recipe, folder / "out"


def work(out: Path) -> Path:
    """Where the present source's runs lie."""
    (folder,) = (out / "versions").iterdir()
    return folder


def report_of(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "report.json").read_text())
    return read


def test_every_model_has_the_same_compute(finished: tuple[Path, Path]) -> None:
    rows = report_of(finished[1])["rows"]
    assert {(r["model"], r["budget"], r["seed"], r["nfe"]) for r in rows} == {
        (model, budget, seed, nfe)
        for model in MODELS
        for budget in COMPARE["budgets"]  # type: ignore[attr-defined]
        for seed in (0, 1)
        for nfe in (1, 2)
    }
    for row in rows:
        # as many whole steps as the budget holds; of a student two kinds of them
        step = row["training_tflop"] / row["training_steps"]
        assert row["budget"] - 2 * step < row["training_tflop"] <= row["budget"]
    of = {(r["entry"], r["budget"]): r["training_steps"] for r in rows}
    assert of["MDLM", 0.0008] == pytest.approx(2 * of["MDLM", 0.0004], abs=1)
    # half of a student's budget goes to its teacher, and each of its steps takes more
    assert of["SDTT", 0.0008] < of["MDLM", 0.0008] / 2


def test_nothing_is_done_twice(
    finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, out = finished
    before = report_of(out)
    monkeypatch.setattr(Trainer, "train", lambda *args: pytest.fail("a finished model is trained again"))
    monkeypatch.setattr(
        "flowlm.comparison.runs.evaluate_run", lambda *a, **k: pytest.fail("a finished row is judged again")
    )
    monkeypatch.setattr(
        "flowlm.comparison.runs.flops_of_step", lambda *a, **k: pytest.fail("operations are counted again")
    )
    assert command("compare", recipe, "--out", out) == 0
    assert report_of(out) == before
    # What was found stands by itself, without the runs.
    (runs,) = out.glob("versions/*/runs")
    runs.rename(tmp_path / "runs")
    try:
        assert command("compare", recipe, "--out", out) == 0
    finally:
        (tmp_path / "runs").rename(runs)
    assert report_of(out) == before


def test_what_changed_is_done_again(finished: tuple[Path, Path]) -> None:
    recipe, out = finished

    def job(over: dict[str, Any] | None = None, entry: str = "SDTT") -> Any:
        comparison = load_comparison(recipe, over)
        runner = Runner(comparison, out, silent)
        runner.rates = {"MDLM": 1.0, "FLM": 1.0}
        return runner.job(comparison.entry(entry), 0.0008, 0, 1.0)

    same = job()
    assert job().hash == same.hash
    # its teacher's settings are its own
    assert job({"optim.beta1": 0.8}).hash != same.hash
    assert job({"optim.beta1": 0.8}).teacher.hash != same.teacher.hash
    # where a text lies, and on what it is computed, is not
    assert job({"train.device": "auto"}).hash == same.hash
    assert job(entry="FLM").hash != job(entry="MDLM").hash


def test_another_source_begins_anew(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = finished
    assert work(out).name == source_hash()
    monkeypatch.setattr("flowlm.comparison.runs.source_hash", lambda: "0123abc")
    assert Runner(load_comparison(recipe), out, silent).work == out / "versions" / "0123abc"
    assert not (out / "versions" / "0123abc").exists()
    told: list[str] = []
    Runner(load_comparison(recipe), out, told.append)
    assert told == [
        f"{out} holds rows of 1 other version of this package's source: they are left alone, and nothing of "
        "them is used"
    ]


def test_the_source_is_all_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(Path(files.__file__).parent, tmp_path / "flowlm")
    monkeypatch.setattr(files, "__file__", str(tmp_path / "flowlm" / "files.py"))
    same = source_hash()
    (tmp_path / "flowlm" / "notes.txt").write_text("no source")
    assert source_hash() == same
    with (tmp_path / "flowlm" / "discrete" / "mdlm.py").open("a") as file:
        file.write("# another\n")
    assert source_hash() != same


def test_rates_are_chosen_by_the_search_alone(finished: tuple[Path, Path]) -> None:
    _, out = finished
    kept = [json.loads(path.read_text()) for path in (work(out) / "rates").glob("*.json")]
    assert {k["model"]: k["chosen"] for k in kept} == report_of(out)["rates"]
    for one in kept:
        assert one["seed"] == CompareConfig().search_seed
        by = {float(rate): found for rate, found in one["by"].items()}
        assert by[one["chosen"]] == min(by.values())
    assert all(row["seed"] in (0, 1) for row in report_of(out)["rows"])


def test_the_report(finished: tuple[Path, Path]) -> None:
    recipe, out = finished
    text, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "# Tiny" in text
    assert f"flowlm compare {recipe}" in text
    for part in (
        "0.0004 TFLOP",
        "| FMLM |",
        "| held-out |",
        "| 5-gram |",
        "FMLM in 1 network call above SDTT in 2 network calls, by perplexity: holds for",
    ):
        assert part in text
        assert part.strip("| ") in page
    assert "//" not in page.split("base64,")[0], "it needs nothing but itself"
    # what a claim is about stands side by side
    shown = report_of(out)["rows"]
    assert {row["sampler"]["last"] for row in shown} <= {"argmax", "categorical"}
    for k in (1, 2):
        _, _, after = page.partition(f"{k} network call{'s' * (k > 1)}, side by side")
        assert re.findall(r'class="label">([^<]+)<', after)[:4] == ["FLM", "MDLM", "SDTT", "FMLM"]
    settings = report_of(out)["settings"]
    assert settings["source"] == source_hash()
    assert settings["compare"]["seeds"] == [0, 1]
    assert settings["models"]["SDTT"]["config"]["rounds"]["rounds"] == 2
    assert {(one["model"], len(one["by"])) for one in settings["chosen"]["rates"]} == {
        (name, 2) for name in MODELS
    }
    assert [one["model"] for one in settings["chosen"]["samplers"]] == ["MDLM"]
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"compare.seeds": [0], "compare.budgets": [0.0004], "compare.rates": [1.0]}
    raw = written(tmp_path / "one.toml", over)
    whole = Runner(load_comparison(raw), tmp_path / "whole", silent).run()
    runner = Runner(load_comparison(raw), tmp_path / "out", silent)
    train, seen = Trainer.train, []

    def stopped(self: Trainer, *args: Any) -> Any:
        seen.append(self.run.path.name)
        if len(seen) == 3:
            self.interrupt()
        return train(self, *args)

    monkeypatch.setattr(Trainer, "train", stopped)
    with pytest.raises(Interrupted):
        runner.run()
    # first of all a run of MDLM with the seed of the search, to choose its sampler
    assert len(list((work(tmp_path / "out") / "rows").iterdir())) == 1
    rows = Runner(load_comparison(raw), tmp_path / "out", silent).run()
    assert seen[3] == seen[2], "the training that was stopped goes on"
    assert len(set(seen)) == len(seen) - 1, "the others are not touched"
    timed = ("seconds", "latency", "tokens_per_second", "extra")
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole
    ]


def row(
    model: str, nfe: int, seed: int, valid: float | None, perplexity: float | None = None
) -> dict[str, Any]:
    more = {"valid": valid, "perplexity": perplexity}
    return {"model": model, "entry": model, "nfe": nfe, "seed": seed, "budget": 1.0, **more}


def test_claims_are_judged_seed_by_seed() -> None:
    claim = Claim("A", 1, "B", 8)
    pairs = {0: (0.5, 0.4), 1: (0.3, 0.3), 2: (0.2, 0.6)}
    assert Verdict(claim, 1.0, VALID, pairs).held == 1
    assert Verdict(claim, 1.0, PLAIN, pairs).held == 1
    assert str(Verdict(claim, 1.0, VALID, pairs)) == (
        "A in 1 network call above B in 8 network calls, by valid passages: holds for 1 of 3 seeds, 1 not decided, "
        "as both are equal (33.3 ± 15.3 % against 43.3 ± 15.3 %)"
    )
    # of distances the smaller is the better
    assert str(Verdict(claim, 1.0, "pair_tv_even", pairs)) == (
        "A in 1 network call above B in 8 network calls, by distance of pairs, of 100 stories that can be read: holds "
        "for 1 of 3 seeds, 1 not decided, as both are equal (0.333 ± 0.153 against 0.433 ± 0.153)"
    )
    # of equals nothing is claimed, as where neither writes a valid passage
    equal = Verdict(claim, 1.0, VALID, {0: (0.0, 0.0), 1: (0.0, 0.1), 2: (0.2, 0.1)})
    assert (equal.held, equal.tied) == (1, 1)
    assert "holds for 1 of 3 seeds, 1 not decided, as both are equal (6.7" in str(equal)
    # who does not reach the entropy of the data has nothing to show; who is alone in reaching it has won nothing
    lone = Verdict(claim, 1.0, AT_ENTROPY, {0: (None, 5.0), 1: (4.0, None), 2: (4.0, 5.0)})
    assert (lone.held, lone.undecided) == (1, {"A": 0, "B": 1})
    assert str(lone).endswith(
        "by perplexity at data entropy: holds for 1 of 3 seeds, 1 not decided, as B does not reach it "
        "(4.0 ± 0.0 (2 of 3) against 5.0 ± 0.0 (2 of 3))"
    )
    # of whom too few can be read for a distance nothing is known
    unread = Verdict(claim, 1.0, "pair_tv_even", {0: (None, 0.2), 1: (0.1, None), 2: (None, None)})
    assert (unread.held, unread.undecided) == (0, {"A": 2, "B": 1})
    assert "0 of 3 seeds, 2 not decided, as A could not be judged, 1 not decided, as B could not" in str(
        unread
    )


def test_means_and_deviations_over_seeds() -> None:
    rows = [row("A", 1, seed, valid) for seed, valid in enumerate((0.1, 0.2, 0.3))] + [row("B", 2, 0, 0.5)]
    one, two = summary(rows)
    assert one["valid"] == pytest.approx(0.2)
    assert one["valid_sd"] == pytest.approx(0.1)
    assert "valid_sd" not in two
    assert pivot(rows, 1.0, VALID) == [
        {"model": "A", "1": "20.0 ± 10.0", "2": ""},
        {"model": "B", "1": "", "2": "50.0"},
    ]


def test_distances_of_too_few_that_can_be_read_are_not_judged() -> None:
    rows = [row("A", 1, seed, 0.0) | {"slot_tv_even": tv} for seed, tv in enumerate((0.5, 0.7, None, None))]
    assert qualities(rows) == [VALID, "slot_tv_even"]
    assert pivot(rows, 1.0, "slot_tv_even") == [{"model": "A", "1": "0.600 ± 0.141 (2 of 4)"}]
    assert pivot(rows[2:], 1.0, "slot_tv_even") == [{"model": "A", "1": "not judged"}]
    (one,) = summary(rows)
    assert one["slot_tv_even"] == pytest.approx(0.6)
    assert one["slot_tv_even_sd"] == pytest.approx(0.1414, abs=1e-4)
    # of text without a law there are none, nor of reports from before they were measured
    assert qualities([row("A", 1, 0, None, 5.0)]) == [PLAIN]
    assert qualities([row("A", 1, 0, 0.5)]) == [VALID]


def test_a_law_and_a_frontier_are_two_qualities() -> None:
    """Of rows whose knobs were turned both are shown, and only there is an entropy "not reached"."""
    curve = {"frontier": {"entropy": 3.0, "knob": None, "curves": {}}}
    rows = [
        row("A", 1, 0, 0.1) | curve | {AT_ENTROPY: 4.0} | dict.fromkeys(DISTANCES, 0.2),
        row("A", 2, 0, 0.2),
        row("B", 1, 0, 0.3) | curve | {AT_ENTROPY: None},
    ]
    assert qualities(rows) == [VALID, *DISTANCES, AT_ENTROPY]
    # Where another scorer judges, the n-gram model says what it thinks beside it.
    by_two = [{**rows[0], NGRAM_AT_ENTROPY: 5.0}, *rows[1:]]
    assert qualities(by_two) == [VALID, *DISTANCES, AT_ENTROPY, NGRAM_AT_ENTROPY]
    assert pivot(by_two, 1.0, NGRAM_AT_ENTROPY)[0] == {"model": "A", "1": "5.0"}
    assert pivot(rows, 1.0, AT_ENTROPY) == [{"model": "A", "1": "4.0"}, {"model": "B", "1": "not reached"}]
    assert pivot(rows, 1.0, VALID)[0] == {"model": "A", "1": "10.0", "2": "20.0"}
    reached = {(one["model"], one["nfe"]): one.get("reached") for one in summary(rows)}
    assert reached == {("A", 1): None, ("A", 2): None, ("B", 1): 0}


def test_models_of_text_are_compared_at_its_entropy(tmp_path: Path) -> None:
    over = {
        "compare.frontier": [2],
        "compare.seeds": [0],
        "compare.budgets": [0.0008],
        "compare.rates": [1.0],
    }
    recipe = written(tmp_path / "a.toml", over | {"compare.num": 40, "claims": []})
    path = recipe.read_text()
    recipe.write_text(path[: path.index("[models.MDLM]")])  # the FLM alone
    assert command("compare", recipe, "--out", tmp_path / "out") == 0
    rows, references = report_of(tmp_path / "out")["rows"], report_of(tmp_path / "out")["references"]
    assert qualities(rows) == [AT_ENTROPY]
    for one in rows:
        assert ("frontier" in one) == (one["nfe"] == 2)
    (turned,) = (one for one in rows if one["nfe"] == 2)
    # of all held-out passages, not of as many as there are samples
    assert turned["frontier"]["entropy"] == pytest.approx(references[0]["entropy"], rel=0.2)
    # one knob, which the search's seed chose
    (kept,) = (json.loads(path.read_text()) for path in (work(tmp_path / "out") / "samplers").iterdir())
    assert kept["seed"] == CompareConfig().search_seed
    assert [*turned["frontier"]["curves"]] == [kept["calls"]["2"]["knob"]]
    assert "knob" not in kept["calls"]["1"]
    assert report_of(tmp_path / "out")["knobs"] == {"FLM": {"2": kept["calls"]["2"]["knob"]}}
    found = turned[AT_ENTROPY]
    (cells,) = pivot(rows, 0.0008, AT_ENTROPY)
    assert cells == {"model": "FLM", "2": "not reached" if found is None else f"{found:.1f}"}
    assert summary(rows)[1][AT_ENTROPY] == ("not reached" if found is None else found)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "(frontier-0.0008-tflop-2.png)" in text
    assert (tmp_path / "out" / "frontier-0.0008-tflop-2.png").read_bytes().startswith(b"\x89PNG")


def test_a_scorer_of_the_comparison_s_own(tmp_path: Path) -> None:
    over = {"compare.scorer": "AR", "compare.seeds": [0], "compare.budgets": [0.0008], "compare.rates": [1.0]}
    raw = {"compare": COMPARE | {"num": 20}, "common": common(), "models": {"AR": {"objective": "ar"}}}
    recipe = tmp_path / "a.toml"
    recipe.write_text(tomli_w.dumps(merge(raw, nested(over))))
    assert command("compare", recipe, "--out", tmp_path / "out", "--compare.scorer-budget", "0.0004") == 0
    (row,), references = report_of(tmp_path / "out")["rows"], report_of(tmp_path / "out")["references"]
    # another training of the same kind of model, with another seed
    assert {path.name.split("-")[1] for path in (work(tmp_path / "out") / "runs").iterdir()} == {"0", "1000"}
    for one in (row, *references):
        assert one["scorer"].startswith("AR ar-1000-")
        assert one["perplexity"] != one["ngram_perplexity"]
        assert one["frechet"] is not None or one["model"] != row["model"]
    # rows are of the scorer that is, not of its name
    judging = [
        Runner(load_comparison(recipe, over), tmp_path / "out", silent)._judging()
        for over in ({}, {"optim.beta1": 0.8}, {})
    ]
    assert judging[0] == judging[2] != judging[1]
    raw["compare"] |= {"scorer": "FLM"}  # type: ignore[operator]
    raw["models"] |= {"FLM": {}}  # type: ignore[operator]
    recipe.write_text(tomli_w.dumps(raw))
    with pytest.raises(ValueError, match=r"compare\.scorer = 'FLM' is a model without an exact likelihood"):
        load_comparison(recipe)


def test_samplers_are_chosen_with_the_search_s_seed(finished: tuple[Path, Path]) -> None:
    """At each number of calls, and the rows of all seeds are then of the one that was chosen."""
    _, out = finished
    (kept,) = (json.loads(path.read_text()) for path in (work(out) / "samplers").iterdir())
    assert (kept["model"], kept["seed"]) == ("MDLM", CompareConfig().search_seed)
    assert kept["samplers"] == MODELS["MDLM"]["samplers"]
    for own in kept["calls"].values():
        assert own["sampler"] == own["by"].index(min(own["by"]))
        assert len(own["by"]) == 2
    samples = list((work(out) / "runs").glob("mdlm-*/samples/*.jsonl"))
    counts = {
        (path.parents[1].name.split("-")[1], len(path.read_text().splitlines()) - 1) for path in samples
    }
    # of what is reported as many as for a row
    assert counts == {("1000", 6), ("0", 12), ("1", 12)}
    rows = [one for one in report_of(out)["rows"] if one["model"] == "MDLM"]
    assert len(rows) == 8
    for one in rows:
        chosen = kept["samplers"][kept["calls"][str(one["nfe"])]["sampler"]]
        assert one["chosen"] == chosen
        assert one["sampler"]["last"] == chosen.get("last", "categorical")


def test_a_student_s_recipe_names_no_teacher_here(tmp_path: Path) -> None:
    """Whom `lm1b-fmlm` learns from by itself is no entry of a comparison."""
    recipe = written(tmp_path / "compare-tiny.toml", {"models.FMLM.recipe": "lm1b-fmlm"})
    entry = load_comparison(recipe).entry("FMLM")
    assert "teacher" not in entry.values
    assert (entry.base, entry.values["optim"]["beta2"]) == ("FLM", 0.95)


def test_the_knob_that_comes_nearest() -> None:
    """Where no curve passes the entropy of the data, the one that comes nearest to it is turned."""
    curves = {
        "gamma": [],
        "last": [{"entropy": 1.0}, {"entropy": 2.0}],
        "temperature": [{"entropy": 0.5}, {"entropy": 2.5}],
    }
    assert _knob({"entropy": 3.0, "knob": None, "curves": curves}) == "temperature"
    assert _knob({"entropy": 3.0, "knob": "last", "curves": curves}) == "last"


def test_what_a_row_lacks(tmp_path: Path) -> None:
    """Both too bad and too much alike count, and where no story is valid there is still better and worse."""
    runner = Runner(load_comparison(written(tmp_path / "a.toml")), tmp_path / "out", silent)
    entry = runner.comparison.entries[0]
    data = {"model": "held-out", "of": runner.data(entry), "perplexity": 4.0, "entropy": 2.0}
    runner._references = [data]
    at_data = {"perplexity": 4.0, "entropy": 2.0, "unique": 1.0}
    assert runner._lack(entry, at_data) == 0
    assert runner._lack(entry, at_data | {"perplexity": 8.0}) == pytest.approx(math.log(2))
    assert runner._lack(entry, at_data | {"perplexity": 2.0, "entropy": 1.0}) == pytest.approx(
        math.log(2) + 1
    )
    assert runner._lack(entry, at_data | {"perplexity": None}) == math.inf
    # one likely passage again and again
    assert runner._lack(entry, at_data | {"unique": 0.01}) == pytest.approx(0.99)
    runner.is_lawful = lambda entry: True  # type: ignore[method-assign]
    unread = {"valid": 0.0, "parsed": 0.0}
    assert runner._lack(entry, at_data | unread) == 2
    assert runner._lack(entry, at_data | {"valid": 0.0, "parsed": 0.3}) == pytest.approx(1.7)
    assert runner._lack(entry, at_data | {"valid": 0.4, "parsed": 0.5}) == pytest.approx(1.1)
    # Of two that wrote no valid story, the one that is nearer to the data.
    near, far = (at_data | unread | {"perplexity": p} for p in (5.0, 40.0))
    assert 2 < runner._lack(entry, near) < runner._lack(entry, far)


def test_a_claim_is_judged_by_every_quality_it_was_measured_in(tmp_path: Path) -> None:
    comparison = load_comparison(
        written(tmp_path / "a.toml", {"compare.budgets": [1.0], "compare.seeds": [0]})
    )
    curve = {"frontier": {"entropy": 3.0, "knob": None, "curves": {}}}
    rows = [
        row("FMLM", 1, 0, 0.3) | curve | {AT_ENTROPY: 9.0, "slot_tv_even": None, "pair_tv_even": 0.1},
        row("SDTT", 2, 0, 0.2) | curve | {AT_ENTROPY: 8.0, "slot_tv_even": None, "pair_tv_even": 0.3},
    ]
    found = verdicts(comparison, rows)
    assert [(v.key, v.held) for v in found] == [
        (VALID, 1),
        ("slot_tv_even", 0),
        ("pair_tv_even", 1),
        (AT_ENTROPY, 0),
    ]
    assert found[0].pairs == {0: (0.3, 0.2)}
    assert found[1].pairs == {0: (None, None)}
    assert found[2].pairs == {0: (0.1, 0.3)}
    del rows[1]["frontier"]  # there no knob was turned: nothing is claimed
    assert [v.key for v in verdicts(comparison, rows)] == [VALID, *DISTANCES]


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"compare.budgets": []}, r"compare\.budgets is empty"),
        ({"compare.budgets": [-1.0]}, r"compare\.budgets = \[-1\.0\]: all must be positive"),
        ({"compare.seeds": [0, 0]}, r"compare\.seeds = \[0, 0\] names one twice"),
        ({"compare.steps": 4}, r"compare\.steps must be a list, got int 4"),
        ({"compare.steps": ["four"]}, r"compare\.steps\[0\] must be int"),
        ({"compare.share": 1.0}, r"compare\.share = 1\.0"),
        ({"compare.num": 1}, r"compare\.num = 1"),
        ({"compare.search_num": 1}, r"compare\.search_num = 1: judge at least two"),
        ({"compare.search_seed": 1}, "chosen by what they are judged by"),
        ({"compare.sead": 1}, "did you mean"),
        ({"modles": {}}, "did you mean 'models'"),
        ({"models": {"SDTT": {"base": "MDLMM"}}}, "did you mean 'MDLM'"),
        ({"models": {"SDTT": {"base": "FMLM"}}}, "models.SDTT.base = 'FMLM': FMLM is of the family 'flow'"),
        ({"models": {"FMLM": {"base": "FMLM"}}}, "models.FMLM.base = 'FMLM' comes back to 'FMLM' itself"),
        ({"models": {"SDTT": {"base": ""}}}, r"models\.SDTT: SDTT learns from a teacher"),
        ({"models": {"SDTT": {"model": {"length": 3}}}}, "a student is made like its teacher"),
        (
            {"models": {"FLM": {"train": {"steps": 3}}}},
            r"models\.FLM\.train\.steps is the comparison's to decide",
        ),
        ({"models": {"FLM": {"trian": {}}}}, r"models\.FLM: .*did you mean 'train'"),
        ({"models": {"MDLM": {"samplers": [{"gamma": 1.0}]}}}, "has no sampler option gamma"),
        ({"common": {"train": {"seed": 3}}}, r"common\.train\.seed is the comparison's to decide"),
        ({"claims": [CLAIMS[0] | {"at": 3}]}, "3 network calls, which are not among compare.steps"),
        ({"compare.frontier": [4]}, r"compare\.frontier = \[4\]: knobs are turned at some of compare\.steps"),
        (
            {"compare.frontier": [1]},
            "a claim is about SDTT at 2 network calls, where nothing is measured at the entropy of the data",
        ),
        ({"claims": [CLAIMS[0] | {"better": "FML"}]}, "did you mean 'FMLM'"),
    ],
)
def test_bad_recipes(tmp_path: Path, over: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_comparison(written(tmp_path / "bad.toml", over))


def test_no_models(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    path.write_text("title = 'none'\n")
    with pytest.raises(ValueError, match="there are no models"):
        load_comparison(path)


def test_a_budget_of_less_than_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path / "small.toml", {"compare.budgets": [1e-9]})
    assert command("compare", recipe, "--out", tmp_path / "out") == 1
    assert "a step takes" in said(capsys)


def test_another_text_is_another_comparison(tmp_path: Path, finished: tuple[Path, Path]) -> None:
    recipe, out = finished
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"a {i} b {i % 7} c" for i in range(100)))

    def job(over: dict[str, Any]) -> Any:
        comparison = load_comparison(recipe, over)
        runner = Runner(comparison, out, silent)
        runner.rates = {"FLM": 1.0}
        return runner.job(comparison.entry("FLM"), 0.0008, 0, 1.0)

    copy = tmp_path / "copy.txt"
    copy.write_bytes(corpus().read_bytes())
    assert job({"data.path": str(copy)}).hash == job({}).hash
    assert job({"data.path": str(other)}).hash != job({}).hash


def test_how_rows_are_judged_is_part_of_them(finished: tuple[Path, Path]) -> None:
    recipe, out = finished
    plain = Runner(load_comparison(recipe), out, silent)._judging()
    for over in (
        {"num": 13},
        {"frontier": [1]},
        {"steps": [1]},
    ):
        values = COMPARE | over
        other = Runner(
            dataclasses.replace(load_comparison(recipe), config=CompareConfig(**values)),  # type: ignore[arg-type]
            out,
            silent,
        )
        assert other._judging() != plain


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path / "a.toml")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("precious")
    assert command("compare", recipe, "--out", tmp_path / "out") == 1
    assert "holds something else than a comparison" in said(capsys)
    assert (tmp_path / "out" / "README.md").read_text() == "precious"


@pytest.mark.parametrize("recipe", ["compare-captions", "compare-tinystories", "compare-objectives-captions"])
def test_the_package_s_recipes_take_a_text(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("flowlm.comparison.report.report", lambda runner, typed: asked.append(runner))
    assert command("compare", recipe, "--data.path", corpus(), "--out", tmp_path / "out") == 0
    for entry in asked[0].comparison.entries:
        assert entry.values["data"]["path"] == str(corpus())
        assert entry.values["data"]["corpus"] == "text"


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    over = {"compare.seeds": [0], "compare.budgets": [0.0004], "compare.rates": [1.0, 1e30]}
    recipe = written(tmp_path / "a.toml", over | {"claims": []})
    text = recipe.read_text()
    recipe.write_text(text[: text.index("[models.MDLM]")])
    lines: list[str] = []
    runner = Runner(load_comparison(recipe), tmp_path / "out", lines.append)
    assert runner.rate(runner.comparison.entry("FLM")) == 1.0


def small(path: Path, over: dict[str, Any]) -> Path:
    """A recipe of the FLM alone, of one budget and seed."""
    one = {"compare.seeds": [0], "compare.budgets": [0.0008], "compare.rates": [1.0], "claims": []}
    recipe = written(path, one | over)
    text = recipe.read_text()
    recipe.write_text(text[: text.index("[models.MDLM]")])
    return recipe


def test_who_diverges_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    # with two samplers, of which its run with the search's seed would tell which is the better one
    wild = {"objective": "flow", "optim": {"lr": 1e30}, "samplers": [{}, {"temperature": 0.8}]}
    over: dict[str, Any] = {"models.Wild": wild, "compare.rates": [1.0]}
    over |= {"compare.seeds": [0], "compare.budgets": [0.0008], "claims": []}
    recipe, out = written(tmp_path / "a.toml", over), tmp_path / "out"
    assert command("compare", recipe, "--out", out) == 0
    rows = {(row["model"], row["nfe"]): row for row in report_of(out)["rows"]}
    assert "the loss became" in rows["Wild", 1]["diverged"]
    assert {model for model, _ in rows} == {*MODELS, "Wild"}
    assert all(rows[model, 2]["entropy"] is not None for model in MODELS)
    page = (out / "README.md").read_text()
    assert "Wild at 0.0008 TFLOP, seed 0, diverged: the loss became" in page
    before = report_of(out)
    (chosen,) = (one for one in before["settings"]["chosen"]["samplers"] if one["model"] == "Wild")
    assert "the loss became" in chosen["diverged"]
    assert chosen["calls"] == {"1": {"sampler": 0}, "2": {"sampler": 0}}
    assert command("compare", recipe, "--out", out) == 0
    assert report_of(out) == before


def test_of_whom_nothing_was_chosen_no_knob_is_turned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run that samplers are chosen by diverges, and that of the reported seed does not."""
    recipe, out = small(tmp_path / "a.toml", {"compare.frontier": [1]}), tmp_path / "out"
    train = Runner.train

    def diverging(self: Runner, job: Any, part: Any) -> Path:
        if job.config.train.seed == self.comparison.config.search_seed:
            raise DivergedError("the loss became nan")
        return train(self, job, part)

    monkeypatch.setattr(Runner, "train", diverging)
    assert command("compare", recipe, "--out", out) == 0
    rows = report_of(out)["rows"]
    assert all(row["entropy"] is not None and not row.get("frontier") for row in rows)
    page = (out / "README.md").read_text()
    assert "FLM diverged in the run that its samplers are chosen by" in page
    assert "not reached" not in page


def test_texts_of_their_own_have_no_judge_in_common(tmp_path: Path) -> None:
    recipe = written(tmp_path / "a.toml", {"models.MDLM.data": {"num": 30}, "claims": []})
    with pytest.raises(
        ValueError, match=r"each with an n-gram model of its own.*name one judge with compare\.scorer"
    ):
        Runner(load_comparison(recipe), tmp_path / "out", silent).run()


def test_a_comparison_of_which_all_diverge_has_its_report(tmp_path: Path) -> None:
    recipe, out = (
        small(tmp_path / "a.toml", {"models.FLM.optim": {"lr": 1e30, "muon_lr": 1e30}}),
        tmp_path / "out",
    )
    assert command("compare", recipe, "--out", out) == 0
    assert all("diverged" in row for row in report_of(out)["rows"])
    assert "side by side" not in (out / "README.md").read_text()


def test_a_rate_at_an_end_is_told() -> None:
    comparison = SimpleNamespace(config=SimpleNamespace(rates=(0.5, 1.0, 2.0)))
    assert remarks(comparison, [], {"A": 1.0, "B": 2.0, "C": 0.5}, {}) == [  # type: ignore[arg-type]
        "B: the largest of the learning rates was the best of those tried.",
        "C: the least of the learning rates was the best of those tried.",
    ]
    comparison.config.rates = (1.0,)
    assert remarks(comparison, [], {"A": 1.0}, {}) == []  # type: ignore[arg-type]


def test_a_scorer_that_is_not_there_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *args: pytest.fail("trained before its judge was there"))
    recipe = small(tmp_path / "a.toml", {"compare.scorer": str(tmp_path / "gone")})
    assert command("compare", recipe, "--out", tmp_path / "out") == 1
    assert "gone" in said(capsys)


def test_weights_of_an_older_checkpoint_are_not_taken_for_the_last(tmp_path: Path) -> None:
    """A kill may come after the last checkpoint and before its weights are put where they are read."""
    recipe, out = small(tmp_path / "a.toml", {"train.keep": 3}), tmp_path / "out"
    runner = Runner(load_comparison(recipe), out, silent)
    entry = runner.comparison.entries[0]
    job = runner.job(entry, 0.0008, 0, 1.0)
    folder = runner.train(job, None)
    whole = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").unlink()  # linked to the checkpoint's
    (folder / "ema.safetensors").write_bytes(whole[:-4] + bytes(4))
    assert not RunDirectory(folder).is_exported()
    assert runner.train(job, None) == folder
    assert (folder / "ema.safetensors").read_bytes() == whole
    assert RunDirectory(folder).is_exported()
    (folder / "config.json").unlink()  # written last of all
    assert not RunDirectory(folder).is_exported()
    runner.train(job, None)
    assert RunDirectory(folder).is_exported()


def test_a_text_that_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun goes on with the text where it is now."""
    text = tmp_path / "text.txt"
    text.write_bytes(corpus().read_bytes())
    recipe, out = small(tmp_path / "a.toml", {"common.data.path": str(text)}), tmp_path / "out"
    train = Trainer.train

    def stopped(self: Trainer, *args: Any) -> Any:
        self.interrupt()
        return train(self, *args)

    runner = Runner(load_comparison(recipe), out, silent)
    job = runner.job(runner.comparison.entries[0], 0.0008, 0, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stopped)
        with pytest.raises(Interrupted):
            runner.train(job, None)
    moved = text.rename(tmp_path / "moved.txt")
    small(recipe, {"common.data.path": str(moved)})
    runner = Runner(load_comparison(recipe), out, silent)
    again = runner.job(runner.comparison.entries[0], 0.0008, 0, 1.0)
    assert again.folder == job.folder
    assert RunDirectory(runner.train(again, None)).steps()[-1] == again.config.train.steps


def test_the_report_of_another_comparison_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = small(tmp_path / "a.toml", {}), tmp_path / "out"
    assert command("compare", recipe, "--out", out) == 0
    before = report_of(out)
    assert command("compare", recipe, "--out", out, "--compare.num", "13") == 1
    assert f"holds the report of `flowlm compare {recipe} --out {out}`" in said(capsys)
    assert report_of(out) == before
    assert command("compare", recipe, "--out", out, "--compare.num", "13", "--force") == 0
    assert report_of(out)["rows"][0]["num"] == 13


def test_options_hold_for_all_models(tmp_path: Path) -> None:
    path = written(tmp_path / "a.toml")
    comparison = load_comparison(path, {"train.batch": 3, "data.held_out": 7}, {"num": 50})
    assert comparison.config == dataclasses.replace(load_comparison(path).config, num=50)
    for entry in comparison.entries:
        assert entry.values["train"]["batch"] == 3
        assert entry.values["data"]["held_out"] == 7
    assert [entry.name for entry in comparison.entries] == ["FLM", "MDLM", "SDTT", "FMLM"]


def test_a_student_of_a_student(tmp_path: Path) -> None:
    """Two stages: each teacher takes its share of what is left, and all of it is counted."""
    stage = {"loss": "squared-error", "weight": "inverse", "freeze_embedding": True}
    over = {
        "models": {
            "Second": {
                "objective": "flow-map",
                "base": "First",
                "flow_map": stage | {"identity": "correction", "diagonal": 0.25},
            },
            "First": {"objective": "correction", "base": "FLM", "flow_map": stage | {"diagonal": 0.0}},
        },
        "compare.seeds": [0],
        "compare.rates": [1.0],
        "compare.budgets": [0.0008],
    }
    recipe = written(tmp_path / "compare-stages.toml", over)
    loaded = load_comparison(recipe)
    names = [entry.name for entry in loaded.entries]
    assert names.index("FLM") < names.index("First") < names.index("Second")
    runner = Runner(loaded, tmp_path / "out", silent)
    for entry in loaded.entries:
        runner.rates[entry.name] = 1.0
    job = runner.job(loaded.entry("Second"), 0.0008, 0, 1.0)
    assert job.teacher is not None
    assert job.teacher.teacher is not None
    shares = [one.flops / 1e12 / 0.0008 for one in (job, job.teacher, job.teacher.teacher)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], rel=0.2)
    assert command("compare", recipe, "--out", tmp_path / "out") == 0
    rows = {row["entry"]: row for row in report_of(tmp_path / "out")["rows"]}
    assert rows["Second"]["training_tflop"] == pytest.approx(sum(shares) * 0.0008)
    assert rows["First"]["nfe"] in (2, 4)
