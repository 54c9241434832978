"""Frontiers: where curves pass an entropy, and a whole sweep of a run, interrupted and gone on with."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlm.denoiser import DenoiserConfig
from flowlm.evaluation import runs
from flowlm.evaluation.diversity import unigram_entropy
from flowlm.evaluation.frontier import Texts, best, passing, passing_interval, settings
from flowlm.evaluation.metrics import words
from flowlm.evaluation.report import views
from flowlm.evaluation.runs import evaluate_run
from flowlm.evaluation.samples import read_samples, write_samples
from flowlm.families import NAMES, family
from helpers import command, flm, grammar_flm, said, trained
from helpers import settings as run_settings


def crossing(curve: list[tuple[float, float]], entropy: float) -> float | None:
    """The perplexity alone."""
    found = passing(curve, entropy)
    return None if found is None else found.perplexity


def test_other_numbers_are_those_of_the_same_place() -> None:
    curve = [(3.0, 10.0), (4.0, 40.0), (3.0, 90.0)]
    found = passing(curve, 3.25)
    assert found is not None
    assert found[1:] == (0, 0.25)
    assert found.between([0.4, 0.8, 7.0]) == pytest.approx(0.5)
    last = passing(curve[1:], 3.0)
    assert last is not None
    assert last.between([0.8, 0.7]) == 0.7


def test_settings_are_in_order() -> None:
    assert settings(1.0, (0.8, 1.0)) == [0.8, 1.0]
    assert settings(0.9, (0.8, 1.0)) == [0.8, 0.9, 1.0]
    assert settings("argmax", ("categorical", "argmax")) == ["categorical", "argmax"]


def test_a_crossing_is_linear_in_log_perplexity() -> None:
    curve = [(3.0, 10.0), (4.0, 40.0)]
    assert crossing(curve, 3.5) == pytest.approx(20.0)
    assert crossing(curve[::-1], 3.25) == pytest.approx(10 * 4**0.25)
    assert crossing(curve, 3.0) == 10.0
    assert crossing(curve, 4.0) == 40.0


def test_nothing_is_extrapolated() -> None:
    assert crossing([(3.0, 10.0), (4.0, 40.0)], 4.001) is None
    assert crossing([(3.0, 10.0), (4.0, 40.0)], 2.999) is None
    assert crossing([], 3.0) is None
    assert crossing([(3.0, 10.0)], 3.1) is None
    assert crossing([(3.0, 10.0)], 3.0) == 10.0
    with pytest.raises(ValueError, match="perplexities are positive, got 0"):
        crossing([(3.0, 0.0), (4.0, 1.0)], 3.5)


def test_only_neighbours_are_joined() -> None:
    """A curve that goes back: the least of its passages; the chord from its first to its last point is no part."""
    curve = [(3.0, 10.0), (4.0, 40.0), (3.0, 90.0)]
    assert crossing(curve, 3.5) == pytest.approx(20.0)
    assert crossing([(3.0, 10.0), (2.0, 40.0), (3.2, 90.0)], 3.1) == pytest.approx(
        math.exp(math.log(40) + 1.1 / 1.2 * math.log(90 / 40))
    )


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(1, 1e3)), min_size=1, max_size=6),
    st.floats(0, 5),
)
def test_a_crossing_lies_between_its_points(curve: list[tuple[float, float]], entropy: float) -> None:
    found = crossing(curve, entropy)
    entropies, perplexities = zip(*curve)
    assert (found is not None) == (min(entropies) <= entropy <= max(entropies))
    if found is not None:
        assert min(perplexities) * (1 - 1e-9) <= found <= max(perplexities) * (1 + 1e-9)


def test_the_best_curve_is_named() -> None:
    curves = {"a": [(3.0, 10.0), (4.0, 40.0)], "b": [(3.5, 15.0)], "c": [(5.0, 1.0)]}
    assert best(curves, 3.5) == ("b", (15.0, 0, 0.0))
    assert best(curves, 3.25) == ("a", (pytest.approx(10 * 4**0.25), 0, 0.25))
    assert best(curves, 6.0) is None
    assert best({}, 3.0) is None


def drawn(source: np.random.Generator, nats: float, entropy: float, count: int) -> Texts:
    """Texts of 10 tokens."""
    each = source.gamma(4.0, 10 * nats / 4.0, count)
    return Texts(each.tolist(), [10] * count, source.normal(entropy, 0.2, count).tolist())


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    source = np.random.Generator(np.random.Philox(3))
    truth = math.exp(1.25)
    found = [
        passing_interval([drawn(source, 1.0, 3.0, 150), drawn(source, 2.0, 4.0, 150)], 3.25)
        for _ in range(60)
    ]
    assert 53 <= sum(own is not None and own[0] <= truth <= own[1] for own in found) <= 60
    widths = [math.log(own[1] / own[0]) for own in found if own is not None]
    # three quarters of the one and a quarter of the other, means of 150 of half their size, and where the entropy is
    assert statistics.fmean(widths) == pytest.approx(3.92 * 0.039, rel=0.1)


def test_an_interval_needs_a_curve_that_reaches() -> None:
    source = np.random.Generator(np.random.Philox(3))
    low, high = drawn(source, 1.0, 3.0, 100), drawn(source, 2.0, 4.0, 100)
    assert passing_interval([low, high], 4.5) is None
    assert passing_interval([low, high], 4.01) is None  # half of the draws end before
    assert passing_interval([low], 3.0) is None
    assert passing_interval([], 3.0) is None
    assert passing_interval([Texts([1.0], [2], [3.0])] * 2, 3.0) is None
    one = Texts([2.0] * 9, [2] * 9, [3.0] * 9)
    assert passing_interval([one], 3.0) == pytest.approx([math.e, math.e])
    with pytest.raises(ValueError, match=r"points of \[9, 100\] texts"):
        passing_interval([low, one], 3.5)
    silent = Texts([0.0] * 100, [0] * 100, [3.0] * 100)  # too short to judge: no point
    assert passing_interval([silent, silent], 3.0) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_a_family_sweeps_are_options_of_its_sampler(name: str) -> None:
    own = family(name)
    assert own.sweep.keys() <= own.options.keys()
    for knob, values in own.sweep.items():
        assert own.options[knob] in values
        assert len(set(values)) == len(values) > 1
        own.check_options(dict.fromkeys([knob], values[0]))


def test_a_knob_that_turns_nothing_is_left_alone() -> None:
    flow, ar = family("flow"), family("ar")
    plain = dict(flow.options)
    assert set(runs._curves(flow, DenoiserConfig(), 1, plain)) == {"prior_scale", "last"}
    assert set(runs._curves(flow, DenoiserConfig(), 1, plain | {"last": "categorical"})) == {
        "temperature",
        "prior_scale",
        "last",
    }
    assert set(runs._curves(flow, DenoiserConfig(), 2, plain)) == set(flow.sweep)
    assert set(runs._curves(ar, DenoiserConfig(), 8, dict(ar.options))) == {"temperature", "top_p"}
    assert runs._curves(ar, DenoiserConfig(), 8, dict(ar.options) | {"last": "argmax"}) == {}
    # a regression has no probabilities to sharpen or to draw from
    assert set(runs._curves(flow, DenoiserConfig(output="linear"), 2, plain)) == {"prior_scale", "gamma"}
    masked = family("sdtt")
    own = dict(masked.options)
    assert set(runs._curves(masked, DenoiserConfig(), 1, own)) == {"temperature", "last"}
    assert set(runs._curves(masked, DenoiserConfig(), 1, own | {"last": "argmax"})) == {"last"}
    assert set(runs._curves(masked, DenoiserConfig(), 2, own | {"last": "argmax"})) == {"temperature", "last"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(flm(), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = {
        "temperature": (0.5, 1.0),
        "prior_scale": (0.3, 1.0, 1.5),
        "gamma": (0.0, 1.0),
        "last": ("argmax", "categorical"),
    }
    monkeypatch.setattr("flowlm.flows.FLM.sweep", sweep)


def test_a_frontier_of_a_run(
    run: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    args = ("--steps", "1,2", "--num", "40", "--dtype", "float32", "--frontier", "--report", folder)
    assert command("evaluate", run, *args) == 0
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [(r["model"], r["nfe"]) for r in rows] == [("FLM", 1), ("FLM", 2), ("held-out", 0), ("5-gram", 0)]
    held_out = rows[2]
    assert held_out["perplexity_at_data_entropy"] == held_out["perplexity"]
    assert rows[3]["perplexity_at_data_entropy"] is None
    assert set(rows[0]["frontier"]["curves"]) == {"prior_scale", "last"}
    assert set(rows[1]["frontier"]["curves"]) == {"temperature", "prior_scale", "gamma", "last"}
    for own in rows[:2]:
        frontier = own["frontier"]
        assert frontier["entropy"] == held_out["entropy"]
        points = {k: [(p["entropy"], p["perplexity"]) for p in c] for k, c in frontier["curves"].items()}
        found = best(points, held_out["entropy"])
        at_data = [own[f"{name}_at_data_entropy"] for name in ("perplexity", "self_bleu")]
        if found is None:
            assert (frontier["knob"], *at_data) == (None, None, None)
        else:
            alike = [point["self_bleu"] for point in frontier["curves"][found[0]]]
            assert frontier["knob"] == found[0]
            assert at_data == pytest.approx([found[1].perplexity, found[1].between(alike)])
            within = own["intervals"]["perplexity_at_data_entropy"]
            assert within is None or within[0] < found[1].perplexity < within[1]
        # the row itself is a point of every curve
        for curve in points.values():
            assert any((h, p) == (own["entropy"], pytest.approx(own["perplexity"])) for h, p in curve)
    # a point is what its file says
    (point,) = (p for p in rows[1]["frontier"]["curves"]["gamma"] if p["value"] == 1.0)
    header, records = read_samples(run / "samples" / "nfe-0002-seed-0-gamma-1.0.jsonl")
    assert header.sampler == family("flow").options | {"gamma": 1.0}
    assert point["entropy"] == pytest.approx(unigram_entropy([words(r.text) for r in records]))
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text()
    assert "(frontier.png)" in text
    assert "perplexity at data entropy" in text
    assert "10 settings of the sampler, 0 of them sampled before" in said(capsys)


def test_an_interrupted_sweep_goes_on(run: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, written, told = runs.write_run_samples, [], []

    def write(*args: Any, **options: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(args[2])
        whole(*args, **options)

    def sweep(**options: Any) -> list[dict[str, Any]]:
        given = {"frontier": [2], "device": "cpu", "dtype": "float32", "say": told.append} | options
        return evaluate_run(run, [2], 20, **given)

    monkeypatch.setattr(runs, "write_run_samples", write)
    with pytest.raises(KeyboardInterrupt):
        sweep()
    assert "the same command goes on from there" in told[-1]
    assert sorted((run / "samples").glob("nfe-*")) == sorted(written)
    first = [path.read_bytes() for path in written]
    again: list[Path] = []

    def count(*args: Any, **options: Any) -> None:
        again.append(args[2])
        whole(*args, **options)

    monkeypatch.setattr(runs, "write_run_samples", count)
    rows = sweep()
    assert len(again) == 6 - 3
    assert not {*again} & {*written}
    assert [path.read_bytes() for path in written] == first
    assert "6 settings of the sampler, 3 of them sampled before" in told
    again.clear()
    assert sweep() == rows
    assert again == []
    # nothing of other settings, other weights, another number, or damaged is taken for the same
    sweep(seed=1)
    assert len(again) == 6
    path = written[0]
    header, records = read_samples(path)
    for broken in (
        lambda: write_samples(path, header, records[:-1]),
        lambda: write_samples(
            path, type(header)(**vars(header) | {"extra": header.extra | {"weights": "x"}}), records
        ),
        lambda: write_samples(path, type(header)(**vars(header) | {"sampler": {}}), records),
        lambda: path.write_text("{"),
    ):
        again.clear()
        broken()
        assert sweep() == rows or again == [path]
        assert again == [path]


def test_a_frontier_needs_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.toml").unlink()
    assert command("evaluate", run, "--steps", "1", "--num", "4", "--frontier") == 1
    assert "a frontier is measured at the entropy of held-out text" in said(capsys)
    assert not (run / "samples" / "nfe-0001-seed-0.jsonl").exists()


def test_a_frontier_of_a_language_with_a_law(small: None, tmp_path: Path) -> None:
    """Judged by the law, and by the stories it learned from: two tables, one of them ranked."""
    run = tmp_path / "run"
    shutil.copytree(grammar_flm(), run)
    rows = evaluate_run(run, [1], 10, frontier=[1], device="cpu", dtype="float32")
    assert [row["model"] for row in rows] == ["FLM", "held-out", "5-gram"]
    assert all(row["law"] for row in rows)
    assert rows[0]["frontier"]["entropy"] == rows[1]["entropy"]
    by_law, by_text = views(rows)
    assert "perplexity_at_data_entropy" not in by_law[0]
    assert "frontier" in by_text[0]


@pytest.mark.parametrize("name", ["ar", "mdlm", "sedd"])
def test_a_frontier_of_another_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("flowlm.discrete.ar.AR", "flowlm.discrete.mdlm.MDLM", "flowlm.discrete.sedd.SEDD"):
        monkeypatch.setattr(f"{kind}.sweep", {"temperature": (0.5, 1.0)})
    over = {"objective": name, "train.steps": 4, "train.eval_every": 0}
    run = trained(tmp_path / "run", run_settings(over))
    rows = evaluate_run(run, [2], 10, frontier=[2], device="cpu", dtype="float32")
    curves = rows[0]["frontier"]["curves"]
    assert {k: [p["value"] for p in c] for k, c in curves.items()} == {"temperature": [0.5, 1.0]}
