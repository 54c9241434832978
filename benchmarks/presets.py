"""Steps of the presets as they are, at their full width: random tokens; on a CPU, one passage in a forward pass.

What `flowlm info` says of their memory stands beside what was measured. Each runs in a process of its own, since the
peak of a process is one number.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import CPU, Row, memory_of, report_memory

from flowlm.config import RunConfig, from_dict, load_recipe, merge, nested, to_dict
from flowlm.cost import Cost, cost_of, models_of
from flowlm.data.corpora import Corpus
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import DenoiserConfig
from flowlm.families import family_of
from flowlm.training.loop import Trainer

#: One each of a flow at either length, and of a flow map.
PRESETS = ("lm1b-flm", "lm1b-fmlm", "owt-flm")
#: In place of the presets' own shape, to see whether all works.
TINY = {"vocab_size": 512, "length": 16, "backbone": {"width": 32, "depth": 1, "heads": 2}}


@dataclass(frozen=True)
class Case:
    """Some steps of a preset."""

    recipe: str
    steps: int = 20
    batch: int = 2
    micro_batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    model: dict[str, Any] = field(default_factory=dict)
    """What of the model is not as the recipe says."""

    def changed(self, model: DenoiserConfig) -> DenoiserConfig:
        """A model of the recipe's as this case has it."""
        return from_dict(DenoiserConfig, merge(to_dict(model), self.model))

    @property
    def models(self) -> tuple[DenoiserConfig, DenoiserConfig | None]:
        """The model that is trained, and its teacher."""
        model, teacher = models_of(load_recipe(self.recipe))
        return self.changed(model), teacher and self.changed(teacher)

    @property
    def config(self) -> RunConfig:
        """The run's. Its teacher is given beside it."""
        over = {
            "teacher": "",
            "model": to_dict(self.models[0]),
            **nested(
                {
                    "train.steps": self.steps,
                    "train.batch": self.batch,
                    "train.micro_batch": self.micro_batch,
                    "train.dtype": self.dtype,
                    "train.device": self.device,
                }
            ),
        }
        return from_dict(RunConfig, merge(to_dict(load_recipe(self.recipe)), over))


def cases(quick: bool, dtype: torch.dtype, device: torch.device = CPU) -> list[Case]:
    """The three presets; on a GPU with as many passages in a forward pass as they say, and no more in a step."""
    given: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    if quick:
        return [Case(recipe, steps=3, model=TINY, **given) for recipe in PRESETS]
    if device.type == "cpu":
        return [Case(recipe, **given) for recipe in PRESETS]
    rows = {recipe: load_recipe(recipe).train.micro_batch for recipe in PRESETS}
    return [Case(recipe, batch=n, micro_batch=n, **given) for recipe, n in rows.items()]


def expected(case: Case) -> Cost:
    """What it costs by `flowlm.cost`."""
    return cost_of(case.config, getattr(torch, case.dtype), torch.device(case.device).type, case.models)


def make_trainer(case: Case) -> Trainer:
    """The run, with weights, averaged weights, teacher and random tokens."""
    torch.manual_seed(0)
    model, described = case.models
    teacher = None
    if described is not None:
        teacher = family_of(described).network(described).requires_grad_(False).eval().to(case.device)
        # Logits of the order of one, as in `generation`.
        torch.nn.init.normal_(teacher.get_parameter("head.weight"), std=described.backbone.width**-0.5)
    tokens = torch.randint(model.vocab_size, (64, model.length)).numpy()
    words = Tokenizer.train_words((), vocab=[f"w{i}" for i in range(model.vocab_size - 2)])
    return Trainer(
        case.config,
        "no folder is made",
        say=lambda line: None,
        corpus=Corpus(tokens, tokens, words, {}),
        teacher=teacher,
    )


def work(trainer: Trainer, steps: int) -> list[float]:
    """Take the steps; seconds of each."""
    seconds = []
    for trainer.step in range(steps):
        start = time.perf_counter()
        trainer.optimize()
        seconds.append(time.perf_counter() - start)
    return seconds


def run(case: Case) -> Row:
    """Seconds and memory of a case, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "seconds.json"
        described = json.dumps(dataclasses.asdict(case))
        peak = memory_of(Path(__file__), described, str(torch.get_num_threads()), str(written))
        seconds = json.loads(written.read_text(encoding="utf-8"))
    cost, model = expected(case), case.models[0]
    timed = seconds[1:]  # the first one also makes the optimizer's moments
    return {
        "arm": case.recipe,
        "parameters": cost.parameters,
        "vocab": model.vocab_size,
        "length": model.length,
        "batch": case.batch,
        "micro_batch": case.micro_batch,
        "seconds": timed,
        "calls": 1,
        "median": statistics.median(timed),
        "tokens_per_second": case.batch * model.length / statistics.median(timed),
        "flops_per_second": cost.step_flops / statistics.median(timed),
        "peak_bytes": peak.peak,
        "step_bytes": peak.own,
        # What there is before the first step is no part of it.
        "expected_bytes": cost.memory.gradients + cost.memory.moments + cost.memory.activations,
    }


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each preset."""
    rows = []
    for case in cases(quick, dtype, device):
        say(f"presets: {case.steps} steps of {case.recipe}")
        rows.append(run(case))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    asked = Case(**json.loads(sys.argv[1]))
    report_memory(
        lambda: make_trainer(asked),
        lambda trainer: Path(sys.argv[3]).write_text(
            json.dumps(work(trainer, asked.steps)), encoding="utf-8"
        ),
        asked.device,
    )
