"""The judge of texts without a law: held-out text does well, copies are seen, nonsense is not known."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest

from flowlm.data.corpora import Corpus, DataConfig, load_corpus
from flowlm.data.grammar import Grammar
from flowlm.evaluation import judge as module
from flowlm.evaluation.judge import TextJudge
from flowlm.evaluation.metrics import ROW
from flowlm.evaluation.runs import judge_of
from flowlm.model import FlowLM
from helpers import LINES as LINES_OF_RUNS
from helpers import flm

WORDS = {
    "det": ["the", "a", "this", "my", "your"],
    "adj": ["big", "old", "red", "sad", "kind", "small"],
    "noun": ["cat", "dog", "hen", "fox", "cow", "pig", "bird"],
    "verb": ["saw", "met", "heard", "found"],
}
LINES = [
    " ".join(words) + "."
    for words in itertools.product(*(WORDS[k] for k in ("det", "adj", "noun", "verb", "det", "noun")))
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("judge") / "a.txt"
    path.write_text("\n".join(random.Random(0).sample(LINES, 3000)))
    return load_corpus(DataConfig(corpus="text", path=str(path), held_out=300), 12)


def test_what_each_kind_of_text_scores(corpus: Corpus) -> None:
    judge = TextJudge(corpus)
    decode = corpus.tokenizer.decode
    train, held_out = ([decode(row) for row in rows[:200]] for rows in (corpus.train, corpus.held_out))
    shuffled = [" ".join(random.Random(i).sample(t.split(), 6)) for i, t in enumerate(held_out)]
    texts = {
        "train": train,
        "held out": held_out,
        "shuffled": shuffled,
        "nonsense": [f"zork {i} blarg, plonk!" for i in range(200)],
        "one": train[:1] * 200,
    }
    found = {name: judge.measure(own) for name, own in texts.items()}
    assert (
        found["train"]["perplexity"] < found["held out"]["perplexity"] < 5 < found["shuffled"]["perplexity"]
    )
    assert found["held out"]["known"] == found["train"]["known"] == 1
    assert found["nonsense"]["known"] == 0
    assert found["train"]["copied"] == 1
    assert found["held out"]["copied"] == found["nonsense"]["copied"] == 0
    assert found["train"]["longest_copy"] == 7
    assert 3 < found["held out"]["longest_copy"] < 7
    assert found["one"]["self_bleu"] == pytest.approx(1)
    assert found["held out"]["self_bleu"] < 0.9
    assert found["train"]["scorer"].startswith("Kneser-Ney 5-gram, ")
    low, high = found["held out"]["intervals"]["perplexity"]
    assert low < found["held out"]["perplexity"] < high < 1.3 * low
    assert found["one"]["intervals"]["perplexity"] == pytest.approx([found["one"]["perplexity"]] * 2)


def test_reference_rows(corpus: Corpus) -> None:
    judge = TextJudge(corpus)
    held_out, ngram = judge.reference_rows(250, seed=3)
    assert (held_out["model"], ngram["model"]) == ("held-out", "5-gram")
    assert [row["num"] for row in (held_out, ngram)] == [250, 250]
    assert set(ROW) <= set(held_out)
    assert held_out["nfe"] == ngram["nfe"] == 0
    assert ngram["perplexity"] == pytest.approx(held_out["perplexity"], rel=0.3)
    assert ngram["known"] == 1
    assert judge.reference_rows(250, seed=3)[1] == ngram
    assert judge.reference_rows(250, seed=4)[1] != ngram
    assert judge.reference_rows(10_000, seed=3)[0]["num"] == 300  # there are no more


def test_the_reference_is_written_as_texts_are() -> None:
    """Stories of the n-gram model have the frame that five words reach to, if their spacing is that of stories."""
    grammar = Grammar()
    judge = TextJudge(load_corpus(DataConfig(corpus="grammar", num=20_000, held_out=200), 64))
    held_out, ngram = judge.reference_rows(200, 3, grammar)
    assert held_out["valid"] == 1
    assert ngram["parsed"] > 0.5
    assert ngram["valid"] < 0.5


def test_a_large_text_is_read_in_part_and_it_is_said(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WORDS", 1000)
    monkeypatch.setattr(module, "_ROWS", 100)
    said: list[str] = []
    judge = TextJudge(corpus, said.append)
    assert judge.passages == 200
    assert said == [
        "the scorer reads the first 1,400 words of the training text: copies of the rest are not seen"
    ]


def test_judged_by_the_text_of_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    model = FlowLM.from_pretrained(flm())
    assert judge_of(flm(), model, said.append) is not None
    assert not said
    run = tmp_path / "run"
    shutil.copytree(flm(), run)
    text = tmp_path / "own.txt"
    text.write_text("another text\nin its place\nfor three lines\n")
    config = (run / "config.toml").read_text()
    old = next(line for line in config.splitlines() if line.startswith("path = "))
    for path, reason in ((text, "not in the vocabulary"), (tmp_path / "gone.txt", "does not exist")):
        (run / "config.toml").write_text(config.replace(old, f'path = "{path}"'))
        assert judge_of(run, model, said.append) is None
        assert reason in said[-1]
        assert said[-1].endswith("no perplexity, known words and copies are measured")
    text.write_text("\n".join(LINES_OF_RUNS[:50]))
    (run / "config.toml").write_text(config.replace(old, f'path = "{text}"'))
    assert judge_of(run, model, said.append) is None
    assert "the text has changed since" in said[-1]
    (run / "config.toml").unlink()
    assert judge_of(run, model, said.append) is None
    assert "does not say what text it was trained on" in said[-1]


def test_wrapped_rows_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(random.Random(1).sample(LINES, 2000)))
    corpus = load_corpus(DataConfig(corpus="text", path=str(path), held_out=200, rows="wrap"), 30)
    judge = TextJudge(corpus)
    assert judge.scorer.num_items == corpus.meta["tokens"] - (corpus.train == corpus.tokenizer.eos_id).sum()
    rows = ["\n".join(corpus.tokenizer.decode_all(row)) for row in corpus.train[:50]]
    assert judge.measure(rows)["copied"] == 1


def test_what_is_unknown_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"the word{i} saw me." for i in range(200)) + "\n" + "\n".join(LINES[:200]))
    corpus = load_corpus(DataConfig(corpus="text", path=str(path), vocab_size=12), 12)
    judge = TextJudge(corpus)
    found = judge.measure(["[UNK] [UNK] [UNK].", "the [UNK] saw me."])
    assert found["known"] == pytest.approx(3 / 7)
    assert found["copied"] == 0


def test_held_out_text_is_taken_from_all_over(corpus: Corpus) -> None:
    judge = TextJudge(corpus)
    some = judge._order(seed=0)[:100]
    assert len(set(some.tolist())) == 100
    assert some.max() > 200
    assert some.min() < 100
    assert judge._order(seed=1)[:100].tolist() != some.tolist()


def test_two_sets_of_held_out_text_share_nothing(corpus: Corpus) -> None:
    judge = TextJudge(corpus)
    for num, count in ((50, 50), (150, 150), (1000, 150)):
        first, second = judge.halves(num, seed=0)
        assert len(first) == len(second) == count
        assert not {*first} & {*second}  # all lines of this text are different
