"""Scorers: likelihoods as written, texts cut and counted as their names say, kept by content."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from flowlm.discrete import ar
from flowlm.evaluation import scorers
from flowlm.evaluation.frechet import frechet_distance
from flowlm.evaluation.report import markdown
from flowlm.evaluation.scorers import (
    BATCH,
    ARScorer,
    HFScorer,
    Scores,
    distance,
    feature_texts,
    open_scorer,
    score_texts,
)
from helpers import LINES, command, flm, fmlm, grammar_flm, said, settings, trained

TEXTS = [LINES[5], LINES[40], LINES[7] + " " + LINES[8], "the cat saw.", ""]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("ar") / "run",
        settings({"objective": "ar", "train.steps": 40, "train.eval_every": 0}),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_our_own(run: Path) -> None:
    """-log p of each token given those before it, the end's too."""
    scorer = ARScorer(run, device="cpu")
    found = scorer.judge(TEXTS)
    model = scorer._model
    for text, nats, count in zip(TEXTS, found.nats, found.tokens, strict=True):
        (ids,) = model.tokenizer.encode([text])
        ids = [*ids, model.tokenizer.eos_id][: model.length]
        assert count == len(ids)
        tokens = torch.tensor([ids])
        log_probs = model.denoiser(ar.shifted(tokens, model.tokenizer.vocab_size)).log_probs()
        want = -log_probs.gather(-1, tokens[..., None]).sum().item()
        assert nats == pytest.approx(want, rel=1e-4)
    assert "cut at 12 tokens" in scorer.name
    assert found.tokens[2] == 12  # of two lines, fourteen words
    assert found.cut == 1
    own = scorer.judge(LINES[:30]).perplexity
    shuffled = scorer.judge([" ".join(reversed(line.split())) for line in LINES[:30]]).perplexity
    assert own is not None
    assert shuffled is not None
    assert own < 0.5 * shuffled


@torch.no_grad()
def test_our_own_features(run: Path) -> None:
    """The mean over a text's tokens, its end counted, of the state from which each is predicted."""
    scorer = ARScorer(run, device="cpu")
    model = scorer._model
    features = scorer.features(TEXTS)
    assert (features.shape, features.dtype) == ((len(TEXTS), 32), "float64")
    for text, row in zip(TEXTS, features, strict=True):
        (ids,) = model.tokenizer.encode([text])
        tokens = torch.tensor([[*ids, model.tokenizer.eos_id][: model.length]])
        hidden = model.denoiser(ar.shifted(tokens, model.tokenizer.vocab_size)).hidden[0]
        assert row == pytest.approx(hidden.double().mean(0).numpy(), abs=1e-5)


def test_features_in_the_order_of_the_texts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ARScorer(run, device="cpu")
    whole = scorer.features(TEXTS)
    monkeypatch.setattr(scorers, "BATCH", 2)
    assert feature_texts(scorer, TEXTS) == pytest.approx(whole, abs=1e-6)
    with pytest.raises(ValueError, match="texts is empty"):
        feature_texts(scorer, [])


def test_distances_are_between_as_many(run: Path) -> None:
    scorer = ARScorer(run, device="cpu")
    reference = feature_texts(scorer, LINES[:40])
    own = distance(scorer, LINES[40:], reference)
    assert own["frechet_num"] == 40
    assert own["frechet"] == pytest.approx(frechet_distance(feature_texts(scorer, LINES[40:80]), reference))
    shuffled = [" ".join(reversed(line.split())) for line in LINES[40:80]]
    assert distance(scorer, shuffled, reference)["frechet"] > 3 * own["frechet"]
    assert distance(scorer, LINES[:40], reference)["frechet"] == pytest.approx(0, abs=1e-9)
    assert distance(scorer, LINES[:1], reference) == {"frechet": None}


def test_filling_inside_a_passage_is_unlikely(run: Path) -> None:
    scorer = ARScorer(run, device="cpu")
    model = scorer._model
    first, second = LINES[5].split(" ", 1)
    whole, broken = (scorer.judge([text]) for text in (LINES[5], f"{first} [PAD] {second}"))
    assert broken.tokens[0] == whole.tokens[0] + 1
    assert broken.nats[0] > whole.nats[0] + 2
    (ids,) = model.tokenizer.encode([LINES[5]])
    tokens = torch.tensor([[ids[0], model.tokenizer.pad_id, *ids[1:], model.tokenizer.eos_id]])
    assert broken.nats[0] == pytest.approx(ar.losses(model.denoiser, tokens).sum().item(), rel=1e-4)


def test_only_an_autoregressive_run_scores(run: Path) -> None:
    with pytest.raises(ValueError, match="is of the family FLM, which has no exact likelihood"):
        ARScorer(flm())
    with pytest.raises(ValueError, match="the scorer cannot read the samples"):
        ARScorer(run, device="cpu").judge(["zork blarg"])


def test_perplexity_is_over_all_tokens() -> None:
    assert Scores((2.0, 4.0), (1, 3)).perplexity == pytest.approx(math.exp(1.5))
    assert Scores((0.0,), (0,)).perplexity is None


class Counting:
    """Says of each text its length, and counts how often it is asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def judge(self, texts: Any) -> Scores:
        self.asked.append(list(texts))
        cut = sum(len(t) > 4 for t in texts)
        return Scores(tuple(float(len(t)) for t in texts), tuple(len(t) for t in texts), cut)


def test_scores_are_kept_by_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "BATCH", 4)
    scorer = Counting()
    texts = ["ccc", "a", "bb", "eeeee", "dddd", "ffffff"]
    found = score_texts(scorer, texts)
    assert found.tokens == tuple(map(len, texts))
    assert found.cut == 2
    # like lengths together
    assert scorer.asked == [["a", "bb", "ccc", "dddd"], ["eeeee", "ffffff"]]
    assert score_texts(scorer, texts) == found
    assert len(scorer.asked) == 2
    score_texts(scorer, texts[:-1])
    other = Counting()
    other.name = "other"
    score_texts(other, texts)
    assert other.asked
    for path in (cache / "scores").iterdir():
        path.write_text("{")
    assert score_texts(scorer, texts) == found
    assert all(json.loads(p.read_text()) for p in (cache / "scores").iterdir() if p.read_text() != "{")


def test_an_interrupted_scoring_goes_on(cache: Path) -> None:
    """An hour of a large model is not lost to a key."""

    class Slow:
        name = "slow"

        def __init__(self, stop: int):
            self.stop, self.asked = stop, 0

        def judge(self, texts: Sequence[str]) -> Scores:
            if self.asked == self.stop:
                raise KeyboardInterrupt
            self.asked += 1
            return Scores(tuple(float(len(t)) for t in texts), (1,) * len(texts), len(texts) % 2)

        def features(self, texts: Sequence[str]) -> Any:
            raise AssertionError

    texts = ["x" * (1 + 7 * i % 101) for i in range(5 * BATCH - 3)]
    with pytest.raises(KeyboardInterrupt):
        score_texts(Slow(3), texts)
    rest = Slow(9)
    found = score_texts(rest, texts)
    assert rest.asked == 2
    assert found.nats == tuple(float(len(t)) for t in texts)
    assert found.cut == 1
    assert len([*(cache / "scores").iterdir()]) == 1
    (kept,) = (cache / "scores").iterdir()
    kept.rename(kept.with_suffix(".part.json"))  # cut short, or of another version: all is done anew
    again = Slow(9)
    assert score_texts(again, texts) == found
    assert again.asked == 5


def test_scores_that_cannot_be_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of scoring is not lost for a folder that may not be written to."""
    cache.write_text("a file in its place")
    told: list[str] = []
    assert score_texts(Counting(), ["a", "bb"], told.append).nats == (1.0, 2.0)
    assert "the scores are not kept for another time: cannot write" in told[-1]
    assert score_texts(Counting(), ["a", "bb"]).nats == (1.0, 2.0)
    assert "the scores are not kept for another time" in capsys.readouterr().out


def test_texts_that_have_no_score(cache: Path) -> None:
    class Overflowing(Counting):
        def judge(self, texts: Any) -> Scores:
            found = super().judge(texts)
            return Scores(tuple(math.nan if x == 3 else x for x in found.nats), found.tokens, found.cut)

    with pytest.raises(
        ValueError, match=r"counting gives text 1, 'ccc', a likelihood of nan nats: it cannot"
    ):
        score_texts(Overflowing(), ["a", "ccc", "bb"])
    assert not cache.exists()
    with pytest.raises(ValueError, match=r"text 1, 'b\\ud83d', holds half of a pair of UTF-16"):
        score_texts(Counting(), ["a", "b\ud83d"])


# -- Hugging Face's --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of a few thousand parameters, with random weights, and byte-level pieces."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: it comes with .[dev]"
    )
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers, trainers

    raw = Raw(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"]))
    folder = tmp_path_factory.mktemp("hf") / "tiny-gpt2"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_causal_model_of_others(gpt2: Path, tmp_path: Path) -> None:
    """As papers do: tokens after the first, cut at the context; text by text it says the same."""
    scorer = HFScorer(str(gpt2), device="cpu")
    texts = [*LINES[:3], " ".join(LINES[:6]), "a", ""]
    found = scorer.judge(texts)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    for text, nats, count in zip(texts, found.nats, found.tokens, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:16]
        assert count == max(len(ids) - 1, 0)
        if count:
            row = torch.tensor([ids])
            log_probs = model(row).logits[0, :-1].log_softmax(-1)
            want = -log_probs[torch.arange(count), row[0, 1:]].sum().item()
            assert nats == pytest.approx(want, rel=1e-4)
    assert found.cut == 1
    # of the last state, those from which the judged tokens are predicted
    features = scorer.features(texts)
    assert (features.shape, features.dtype) == ((len(texts), 16), "float64")
    for text, row, count in zip(texts, features, found.tokens, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:16]
        if count:
            hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0, :-1]
            assert row == pytest.approx(hidden.double().mean(0).numpy(), abs=1e-5)
        else:
            assert not row.any()
    assert re.match(r"tiny-gpt2 [0-9a-f]{8}, float32", scorer.name)
    # a model of other weights in a folder of the same name is another one, also for what is kept of its scores
    copy = tmp_path / "tiny-gpt2"
    shutil.copytree(gpt2, copy)
    assert HFScorer(str(copy), device="cpu").name == scorer.name
    other = AutoModelForCausalLM.from_pretrained(gpt2)
    torch.nn.init.zeros_(other.transformer.wte.weight)
    other.save_pretrained(copy)
    assert HFScorer(str(copy), device="cpu").name != scorer.name
    assert "cut at 16 tokens" in scorer.name
    assert HFScorer(str(gpt2), context=8, device="cpu").judge(texts).tokens[3] == 7


def test_logits_of_few_texts_are_held_at_once(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = HFScorer(str(gpt2), device="cpu")
    whole = scorer.judge(TEXTS)
    read, rows = scorer._read, []

    def counted(part: torch.Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(part))
        return read(part, *args, **options)

    monkeypatch.setattr(scorer, "_read", counted)
    monkeypatch.setattr(scorers, "LOGITS", 1)
    found = scorer.judge(TEXTS)
    assert rows == [1] * len(TEXTS)
    assert found.nats == pytest.approx(whole.nats, rel=1e-5)
    assert (found.tokens, found.cut) == (whole.tokens, whole.cut)


def test_what_is_no_scorer(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reads 16 tokens, and 64 were asked for"):
        HFScorer(str(gpt2), context=64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_scorer(str(tmp_path / "empty"))
    for name in (str(tmp_path / "none"), "./none", "runs/none/ar"):
        with pytest.raises(ValueError, match=f"there is no scorer at {name}: give a run of objective = 'ar'"):
            open_scorer(name)


def test_a_scorer_of_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"cannot be reached.*somebody/gpt2-typo.*: give a run of objective = 'ar'"
    ):
        open_scorer("somebody/gpt2-typo@v1")


def test_a_scorer_by_its_name(run: Path, gpt2: Path) -> None:
    assert isinstance(open_scorer(str(run), device="cpu"), ARScorer)
    assert isinstance(open_scorer(str(gpt2), device="cpu"), HFScorer)


def test_evaluate_under_a_scorer(
    run: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of a run, of held-out text, of the n-gram model and of a sample file, all under the same scorer."""
    rows_file = tmp_path / "rows.json"
    scorer = ("--scorer", run, "--device", "cpu")
    assert command("evaluate", fmlm(), "--steps", "1,2", "--num", "20", *scorer, "--json", rows_file) == 0
    rows = json.loads(rows_file.read_text())
    assert [row["model"] for row in rows] == ["FMLM", "FMLM", "held-out", "5-gram"]
    assert {row["scorer"] for row in rows} == {ARScorer(run, device="cpu").name}
    texts = [json.loads(line)["text"] for line in sample_file(fmlm()).read_text().splitlines()[1:]]
    want = score_texts(ARScorer(run, device="cpu"), texts).perplexity
    assert rows[0]["perplexity"] == pytest.approx(want)
    assert rows[2]["perplexity"] < rows[0]["perplexity"]
    for own in rows:
        low, high = own["intervals"]["perplexity"]
        assert low < own["perplexity"] < high
        # half of the ten held-out lines against the other half: as many of the samples
        assert own["frechet_num"] == 5
    assert 0 < rows[2]["frechet"] < rows[0]["frechet"]
    assert 0.9 < rows[0]["known"] <= 1  # the training text still judges what it can
    assert command("evaluate", sample_file(fmlm()), *scorer, "--json", rows_file, "--force") == 0
    (row,) = json.loads(rows_file.read_text())
    assert row["perplexity"] == pytest.approx(want)
    assert row["frechet"] is None  # a file says nothing of held-out text
    assert command("evaluate", grammar_flm(), "--steps", "1", "--num", "4", *scorer) == 1
    assert "the scorer cannot read the samples" in said(capsys)
    with pytest.raises(ValueError, match="perplexities under different scorers do not compare"):
        markdown([rows[0], rows[1] | {"scorer": "another"}])


def sample_file(run: Path) -> Path:
    return run / "samples" / "nfe-0001-seed-0.jsonl"
