"""One training step with the state y = xE that the package carries, against the one-hot state x it stands for.

The dense step draws z (B, L, V), makes x_t = (1-t) z + t·onehot, and reads it through the product y = x_t E, by which
the gradient reaches E. Network, local posterior, loss and optimizer are the same objects in both.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Memory, Row, compare, memory_of, report_memory
from torch import Tensor

from flowlm import rng
from flowlm.backbone import BackboneConfig
from flowlm.config import OptimConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.device import precision
from flowlm.objectives import FlowObjective
from flowlm.training.optim import Optimizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One size at which the states are compared."""

    vocab: int
    batch: int = 32
    length: int = 64
    width: int = 256
    depth: int = 4
    local_posterior: bool = True
    dtype: str = "float32"
    """Compute dtype of the network; the state stays float32, as in the package."""


def cases(quick: bool, dtype: torch.dtype) -> list[Case]:
    """V = 512 lies at 2d, where the package draws z itself; the local posterior is on, as by default, and off."""
    name = str(dtype).removeprefix("torch.")
    if quick:
        return [Case(4096, 8, 64, 32, 1, True, name)]
    return [Case(v, local_posterior=on, dtype=name) for v in (512, 8192, 50257) for on in (True, False)]


class Workplace:
    """A denoiser, its optimizer with its moments, and one batch of random tokens."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        shape = BackboneConfig(width=case.width, depth=case.depth)
        self.case = case
        self.model = Denoiser(
            DenoiserConfig(
                vocab_size=case.vocab,
                length=case.length,
                local_posterior=case.local_posterior,
                backbone=shape,
            )
        )
        self.objective = FlowObjective(self.model.clock)
        self.optimizer = Optimizer(self.model, OptimConfig(), steps=1000)
        # Moments come with a parameter's first gradient; they outlive the step and are not its own memory. One
        # parameter at a time, so that no gradients pile up.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step(0)
        self.tokens = torch.randint(case.vocab, (case.batch, case.length))
        self.count = 0

    def _times(self) -> Tensor:
        return self.objective.draw(self.case.batch, rng.generator(0, "draw", self.count))["t"]

    def _normals(self, width: int) -> Tensor:
        rows = [(0, "noise", self.count, i) for i in range(self.case.batch)]
        return rng.normal_rows(rows, (self.case.length, width), CPU)

    def low_rank_loss(self) -> Tensor:
        """The package's own path."""
        self.objective.prepare(self.model)
        xi = self._normals(self.objective.noise_width)
        with self._network():
            return self.objective.losses(self.model, self.tokens, xi, {"t": self._times()}).mean()

    def dense_loss(self) -> Tensor:
        """The formulas as they stand."""
        t, z = self._times(), self._normals(self.case.vocab)
        onehot = torch.zeros_like(z).scatter_(-1, self.tokens[..., None], 1.0)
        return self._read((1 - t[:, None, None]) * z + t[:, None, None] * onehot, t)

    def dense_in_place_loss(self) -> Tensor:
        """The same x in the memory of z, and no one-hot: as thrifty as a dense state can be."""
        t, x = self._times(), self._normals(self.case.vocab)
        x.mul_(1 - t[:, None, None])
        x.scatter_add_(-1, self.tokens[..., None], t[:, None, None].expand(*self.tokens.shape, 1))
        return self._read(x, t)

    def _read(self, x: Tensor, t: Tensor) -> Tensor:
        with self._network():
            # In float32, as the package makes its states: autocast would round the noise.
            with torch.autocast("cpu", enabled=False):
                y = x @ self.model.embedding
            return self.model(y, t).cross_entropy(self.tokens).mean()

    def _network(self) -> AbstractContextManager[Any]:
        return precision(CPU, getattr(torch, self.case.dtype))

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Forward, backward and optimizer."""
        value = loss()
        value.backward()
        self.optimizer.step(self.count)
        self.count += 1
        return float(value.detach())

    def arms(self) -> dict[str, Callable[[], float]]:
        """A training step with each state; the package's first."""
        return {
            "low-rank": lambda: self.step(self.low_rank_loss),
            "dense": lambda: self.step(self.dense_loss),
            "dense, in place": lambda: self.step(self.dense_in_place_loss),
        }


#: Steps in the process whose memory is taken: the second begins with what the first left.
STEPS = 2


def work(place: Workplace, arm: str) -> None:
    """What a process does whose memory is taken, everything being built."""
    for _ in range(STEPS):
        place.arms()[arm]()


def memory(case: Case) -> dict[str, Memory]:
    """Peaks of a process that takes steps, by arm."""
    described = json.dumps(dataclasses.asdict(case))
    threads = str(torch.get_num_threads())
    arms = ("low-rank", "dense", "dense, in place")
    return {arm: memory_of(Path(__file__), described, arm, threads) for arm in arms}


def measure(quick: bool, dtype: torch.dtype, say: Callable[[str], None]) -> list[Row]:
    """A row for each state in each case."""
    rows: list[Row] = []
    todo = cases(quick, dtype)
    peaks = []
    # All of them first: the peak of a process counts in that of the one which started it.
    for case in todo:
        say(f"state: memory of a step at V = {case.vocab:,}, local posterior {_on(case)}")
        peaks.append(memory(case))
    for case, peak in zip(todo, peaks, strict=True):
        say(f"state: seconds of a step at V = {case.vocab:,}, local posterior {_on(case)}")
        arms = compare(Workplace(case).arms(), repeats=2 if quick else 5)
        for row in arms:
            rows.append(
                dataclasses.asdict(case)
                | {
                    "local_posterior": _on(case),
                    "tokens_per_second": case.batch * case.length / row["median"],
                }
                | row
                | {
                    "peak_bytes": peak[row["arm"]].peak,
                    "step_bytes": peak[row["arm"]].own,
                    "peak_ratio": peak[row["arm"]].peak / peak["low-rank"].peak,
                    "step_ratio": peak[row["arm"]].own / peak["low-rank"].own,
                }
            )
    return rows


def _on(case: Case) -> str:
    return "on" if case.local_posterior else "off"


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    report_memory(lambda: Workplace(Case(**json.loads(sys.argv[1]))), lambda place: work(place, sys.argv[2]))
