"""Training compute, counted the same way for every objective: the products of matrices of a whole optimizer step.

A step is run under torch's own counter, so that whatever an objective computes is in the count: teachers, rollouts,
targets, what a checkpoint computes twice, and the optimizer's own products. An addition and a multiplication are two.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flowlm.config import RunConfig
from flowlm.data.corpora import Corpus
from flowlm.training.loop import Trainer

__all__ = ["counter", "flops_of_step"]

#: Steps of the run that is counted, and those of them at which it is: objectives change in the course of a run.
RUN = 800
AT = range(50, RUN, 100)


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


#: The fused attention of CPUs, which torch's counter passes over.
_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counter() -> FlopCounterMode:
    """Of all that is computed while it is entered; `get_total_flops` says how much."""
    return FlopCounterMode(display=False, custom_mapping=_ON_CPU)


def flops_of_step(
    config: RunConfig, *, corpus: Corpus | None = None, teacher: nn.Module | None = None
) -> float:
    """Floating-point operations of one optimizer step, the mean over a run.

    Args:
        config: of the run; its steps, device and dtype do not matter.
        corpus, teacher: as of `Trainer`.

    Raises:
        ValueError: as `Trainer`.
    """
    train = dataclasses.replace(config.train, steps=RUN, compile=False, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            dataclasses.replace(config, train=train),
            Path(folder) / "run",
            say=lambda line: None,
            corpus=corpus,
            teacher=teacher,
        )
    total = 0
    for trainer.step in AT:
        with counter() as counted:
            trainer.optimize()
        total += counted.get_total_flops()
    return total / len(AT)
