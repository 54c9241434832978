"""One training step at the published sizes: the flow against masked diffusion, the dense state and the flow map.

Networks, objectives and optimizers are those of the presets, of 12 blocks × 768; all tokens of a step are in one
forward pass: 4,096 on a CPU, and as many as in one of the presets on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import presets
import torch
from measure import CPU, Memory, Row, compare, memory_of_arm, report_memory
from torch import Tensor
from training_step import DenseFlow, DenseFlowInPlace, TrainingStep, clock_of, optimizer_of

from flowlm.device import moved
from flowlm.discrete import mdlm
from flowlm.discrete.base import SCHEDULE, DiscreteObjective
from flowlm.discrete.network import TokenNetwork
from flowlm.objectives import FlowObjective


class BlocksAlone(FlowObjective):
    """What the blocks alone take: of noise that is there already, to a mean of what they say."""

    def prepare(self, model: Any, step: int | None = None) -> None:
        self._width = model.embedding.shape[1]

    @property
    def noise_width(self) -> int:
        return self._width

    def losses(self, model: Any, tokens: Tensor, xi: Tensor, draws: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = model(xi, moved(draws["t"], xi.device)).hidden
        return hidden.float().mean(-1)


def masked_alone(net: TokenNetwork, tokens: Tensor, noise: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """MDLM's losses with the head on masked positions only, whose losses are the others' zeros."""
    mask, t = net.config.vocab_size, moved(draws["t"], tokens.device)
    x = mdlm.corrupt(tokens, t, noise[0], mask, SCHEDULE)
    chosen = x == mask
    found = net(x).at(chosen).cross_entropy(tokens[chosen])
    weight = SCHEDULE.weight(t)[:, None].expand(tokens.shape)[chosen].float()
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(chosen, weight * found)


BLOCKS = "blocks alone"
#: Of which family's preset an arm is, and its objective where that is another.
ARMS: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "FLM": ("flm", None),
    "MDLM": ("mdlm", None),
    "MDLM, head on masks alone": ("mdlm", lambda model: DiscreteObjective(masked_alone, 1, timed=True)),
    "FLM, dense state": ("flm", lambda model: DenseFlow(clock_of(model))),
    "FLM, dense state in place": ("flm", lambda model: DenseFlowInPlace(clock_of(model))),
    "FMLM, semigroup": ("fmlm", None),
    BLOCKS: ("flm", lambda model: BlocksAlone(clock_of(model))),
}


@dataclass(frozen=True)
class Case:
    """One of the published corpora's sizes."""

    corpus: str
    batch: int
    dtype: str = "float32"
    quick: bool = False
    device: str = "cpu"

    def preset(self, name: str) -> presets.Case:
        """The preset of a family at this size."""
        model = presets.TINY if self.quick else {}
        recipe, rows = f"{self.corpus}-{name}", self.batch
        return presets.Case(recipe, 1000, rows, rows, self.dtype, self.device, model)


def cases(quick: bool, dtype: torch.dtype, device: torch.device = CPU) -> list[Case]:
    """At either size, 4,096 tokens a step on a CPU, and on a GPU 16,384 and 32,768."""
    name, where = str(dtype).removeprefix("torch."), str(device)
    if quick:
        return [Case("lm1b", 4, name, True, where)]
    rows = {"lm1b": 32, "owt": 4} if device.type == "cpu" else {"lm1b": 128, "owt": 32}
    return [Case(corpus, batch, name, device=where) for corpus, batch in rows.items()]


def steps_of(case: Case, arms: tuple[str, ...] = tuple(ARMS)) -> dict[str, TrainingStep]:
    """A training step of each arm; arms of one preset share its network and optimizer."""
    made: dict[str, tuple[Any, Any, Any, Tensor]] = {}
    steps = {}
    for arm in arms:
        name, objective = ARMS[arm]
        if name not in made:
            trainer = presets.make_trainer(case.preset(name))
            optimizer = optimizer_of(trainer.model, trainer.config.optim)
            shape = trainer.config.model
            tokens = torch.randint(shape.vocab_size, (case.batch, shape.length)).to(case.device)
            made[name] = trainer.model, trainer.objective, optimizer, tokens
        model, own, optimizer, tokens = made[name]
        steps[arm] = TrainingStep(
            model, objective(model) if objective else own, optimizer, tokens, case.dtype
        )
    return steps


def outside(model: torch.nn.Module) -> int:
    """Bytes of the gradients that the blocks alone do not have: of embedding and head."""
    return sum(
        4 * p.numel() for name, p in model.named_parameters() if name.startswith(("embedding", "head."))
    )


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each arm in each case."""
    rows: list[Row] = []
    todo = cases(quick, dtype, device)
    peaks: dict[tuple[Case, str], Memory] = {}
    # All of them first: the peak of a process counts in that of the one which started it.
    for case in todo:
        say(f"steps: memory of a step of {case.corpus}")
        peaks |= {(case, arm): memory_of_arm(Path(__file__), case, arm) for arm in ARMS}
    for case in todo:
        say(f"steps: seconds of a step of {case.corpus}")
        steps = steps_of(case)
        model = steps["FLM"].model
        shape = {"vocab": model.config.vocab_size, "length": model.config.length, "batch": case.batch}
        blocks = peaks[case, BLOCKS].own
        own = {
            arm: max(0, peaks[case, arm].own - blocks - (outside(model) if arm != BLOCKS else 0))
            for arm in ARMS
        }
        for row in compare(steps, repeats=2 if quick else 5, device=device):
            name, objective = ARMS[row["arm"]]
            preset = case.preset(name)
            flops = presets.expected(preset).step_flops
            rows.append(
                {"corpus": case.corpus, "dtype": case.dtype}
                | shape
                | row
                | {
                    "tokens_per_second": shape["batch"] * shape["length"] / row["median"],
                    # Of the presets as they are: the other arms do more, or less.
                    "flops_per_second": flops / row["median"] if objective is None else None,
                    "step_bytes": peaks[case, row["arm"]].own,
                    "outside_bytes": own[row["arm"]],
                    "outside_ratio": own[row["arm"]] / max(own["FLM"], 1),
                }
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    asked = Case(**json.loads(sys.argv[1]))
    report_memory(
        lambda: steps_of(asked, (sys.argv[2],))[sys.argv[2]],
        lambda step: [step() for _ in range(2)],
        asked.device,
    )
