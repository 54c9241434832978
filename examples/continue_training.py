"""Go on training: a model that has learned one kind of sentence learns another, from its own weights.

The first text says "Mia has a tame owl.", the second "That tame owl is called Mia." A run whose `init` names a finished
run starts from that run's weights, with its shape and its tokenizer, so the new text must be spelled in tokens the
tokenizer has: byte-level pieces spell anything. Beside it a fresh model gets the same few steps on the second text.
On the command line:  flowlm train RECIPE --init RUN --data.path second.txt --out NEW

    python examples/continue_training.py [FOLDER]      FOLDER: where texts and runs go; a temporary one when left out
"""

import itertools
import sys
import tempfile
from pathlib import Path

from flowlm import FlowLM
from flowlm.config import RunConfig, from_dict
from flowlm.training.loop import Trainer

NAMES = ("Mia", "Leo", "Ivy", "Sam", "Ann", "Tom", "Zoe", "Ben")
KINDS = ("tame", "wild", "old", "shy", "red", "kind")
ANIMALS = ("owl", "cat", "hen", "fox", "dog", "cow")
WORDS = list(itertools.product(NAMES, KINDS, ANIMALS))
TEXTS = {
    "first": {f"{name} has a {kind} {animal}." for name, kind, animal in WORDS},
    "second": {f"That {kind} {animal} is called {name}." for name, kind, animal in WORDS},
}

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
for text, lines in TEXTS.items():
    (folder / f"{text}.txt").write_text("\n".join(sorted(lines)), encoding="utf-8")


def train(run: str, text: str, steps: int, init: str = "") -> None:
    values = {
        "init": init,  # the folder of a finished run, or "" for fresh weights
        "data": {
            "corpus": "text",
            "path": str(folder / f"{text}.txt"),
            "tokenizer": "bpe",
            "vocab_size": 320,
        },
        "train": {"steps": steps, "batch": 32, "ema": 0.98, "eval_every": 0, "device": "cpu"},
    }
    if not init:  # shape is chosen once: a continued run has that of its source
        values["model"] = {"length": 24, "backbone": {"width": 64, "depth": 2, "heads": 2}}
    trainer = Trainer(from_dict(RunConfig, values), folder / run, say=lambda line: None)
    trainer.start(force=True)  # replaces what an earlier call left in the folder
    loss = trainer.train().held_out
    texts = FlowLM.from_pretrained(folder / run).generate(200, steps=16, seed=0)
    shares = ", ".join(f"{sum(t in TEXTS[k] for t in texts) / 2:4.1f} % of the {k} kind" for k in TEXTS)
    print(f"{run:9} {steps:3} steps on the {text:6} text, loss {loss:.3f}: {shares}   {texts[0]!r}")


train("source", "first", steps=250)
train("continued", "second", steps=60, init=str(folder / "source"))
train("fresh", "second", steps=60)
