"""How the seconds of a training step and of one-step generation grow with vocabulary, length and batch.

One of the three is changed at a time, about one size, and a line is fitted to what was measured:

    seconds = a + b x,  by least squares of the relative errors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from generation import make_model
from measure import CPU, Row, compare
from training_step import TrainingStep, clock_of, optimizer_of

from flowlm.backbone import BackboneConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.objectives import FlowObjective


@dataclass(frozen=True)
class Size:
    """Of a model and a batch."""

    vocab: int = 8192
    length: int = 64
    batch: int = 16
    width: int = 256
    depth: int = 4


#: What is changed, to what.
VARIED: dict[str, tuple[int, ...]] = {
    "vocab": (2048, 4096, 8192, 16384, 32768),
    "length": (32, 64, 128, 256, 512),
    "batch": (4, 8, 16, 32, 64),
}
QUICK: dict[str, tuple[int, ...]] = {"vocab": (128, 256, 512), "length": (4, 8, 16), "batch": (2, 4, 8)}


def line(x: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """The line through the measured points, by least squares of (a + b x)/seconds - 1.

    Returns:
        "fixed", a; "each", b; "worst", the largest |(a + b x)/seconds - 1|; "power", the slope of log seconds over
        log x, between the last two points: 1 where growth is linear and the fixed part small.
    """
    places, taken = np.asarray(x, dtype=float), np.asarray(seconds, dtype=float)
    columns = np.stack([1 / taken, places / taken], -1)
    (fixed, each), *_ = np.linalg.lstsq(columns, np.ones(len(places)), rcond=None)
    worst = np.abs(columns @ (fixed, each) - 1).max()
    power = np.log(taken[-1] / taken[-2]) / np.log(places[-1] / places[-2])
    return {"fixed": float(fixed), "each": float(each), "worst": float(worst), "power": float(power)}


def training(size: Size, dtype: str, device: torch.device = CPU) -> Callable[[], object]:
    """A training step of the flow."""
    torch.manual_seed(0)
    shape = BackboneConfig(width=size.width, depth=size.depth)
    model = Denoiser(DenoiserConfig(vocab_size=size.vocab, length=size.length, backbone=shape)).to(device)
    tokens = torch.randint(size.vocab, (size.batch, size.length)).to(device)
    return TrainingStep(model, FlowObjective(clock_of(model)), optimizer_of(model), tokens, dtype)


def generation(size: Size, dtype: str, device: torch.device = CPU) -> Callable[[], object]:
    """One network call of the flow map, from noise to text."""
    model = make_model(size.vocab, size.length, size.width, size.depth, device)
    return lambda: model.generate(size.batch, steps=1, dtype=dtype)


WORKS = {"training step": training, "one-step generation": generation}


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each work and each of what is changed, its points in turns."""
    name = str(dtype).removeprefix("torch.")
    about, varied = (Size(64, 8, 2, 32, 1), QUICK) if quick else (Size(), VARIED)
    rows: list[Row] = []
    for work, make in WORKS.items():
        for what, points in varied.items():
            say(f"growth: {work} with {what}")
            sizes: list[Any] = [replace(about, **{what: x}) for x in points]
            measured = compare(
                {str(getattr(size, what)): make(size, name, device) for size in sizes},
                repeats=2 if quick else 5,
                device=device,
            )
            medians = [row["median"] for row in measured]
            rows.append(
                {
                    "arm": work,
                    "varied": what,
                    "points": list(points),
                    "medians": medians,
                    # Of every turn, those of all points.
                    "seconds": list(zip(*(row["seconds"] for row in measured), strict=True)),
                    "about": vars(about),
                }
                | line(points, medians)
            )
    return rows
