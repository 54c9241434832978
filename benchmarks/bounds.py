"""What bounds a training step: where its time goes, and how near each part is to what the machine can do at all.

A step of a preset is profiled, operation by operation. Beside it stand this machine's roofs, measured in the same
process: a product of matrices as large as those of the blocks, one as large as those of the head, and the copy of a
tensor too large for any cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import CPU, Row, compare, wait
from presets import expected
from steps import Case, cases, steps_of
from torch.profiler import ProfilerActivity, profile

from flowlm import posterior
from flowlm.data.loader import Loader
from flowlm.device import describe

#: FLOP/s of a GPU in dense bfloat16 by its maker, by what its name holds.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

#: Kinds of operations, by what torch calls them; the rest is "other". A product moves little for what it computes, the
#: others compute little for what they move.
KINDS: dict[str, tuple[str, ...]] = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "softmax and cross-entropy": ("softmax", "nll_loss", "logsumexp"),
    "optimizer": ("_fused_adamw", "_foreach_norm", "aten::linalg_vector_norm"),
    "embedding": ("aten::embedding", "aten::embedding_dense_backward", "aten::index"),
    "normals": ("aten::normal_", "aten::bernoulli_"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "pointwise and sums": (
        "aten::mul",
        "aten::add",
        "aten::sub",
        "aten::div",
        "aten::sum",
        "aten::mean",
        "aten::tanh",
        "aten::gelu",
        "aten::silu",
        "layer_norm",
        "rms_norm",
        "aten::pow",
        "aten::rsqrt",
        "aten::exp",
        "aten::neg",
        "aten::where",
        "masked",
        "tanh_backward",
        "gelu_backward",
    ),
}


def peak_of(device: torch.device) -> float | None:
    """FLOP/s that the maker of a GPU states, if it is one of those that are known here."""
    name = describe(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def kind_of(name: str) -> str:
    """The kind of an operation."""
    for kind, names in KINDS.items():
        # The kinds of products are exact, for "aten::mm" begins nothing else.
        if any(name == part or (part in name and kind != "products") for part in names):
            return kind
    return "other"


def shares(step: Callable[[], object], device: torch.device = CPU) -> dict[str, float]:
    """Share of a step's time by kind of operation, the time of an operation being its own; on a GPU, that of the
    kernels that it starts, and nothing where the system does not let them be watched."""
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        step()
        wait(device)
    taken: dict[str, float] = {}
    for event in profiled.key_averages():
        if event.key.startswith("ProfilerStep"):
            continue
        if device.type == "cuda" and not event.key.startswith("aten::"):
            continue  # a kernel by itself, counted with what starts it
        kind = kind_of(event.key)
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        taken[kind] = taken.get(kind, 0.0) + own
    whole = sum(taken.values()) or 1.0
    return {kind: time / whole for kind, time in sorted(taken.items(), key=lambda item: -item[1]) if time}


def roofs(
    rows: int, width: int, vocab: int, dtype: torch.dtype, quick: bool, device: torch.device = CPU
) -> dict[str, float]:
    """What this machine reaches: FLOP/s of two products, bytes a second of a copy, read and written."""
    hidden, block, head = (
        torch.randn(*shape).to(device, dtype) for shape in ((rows, width), (width, 4 * width), (width, vocab))
    )
    part = hidden[: max(1, posterior.CHUNK_ELEMENTS // vocab)]
    source = torch.ones(2**20 if quick else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Of a GPU one is over before the next is started, and starting would be timed: many go together.
    times = 50 if device.type == "cuda" else 1
    works = {
        "block": lambda: hidden @ block,
        "head": lambda: part @ head,
        "copy": lambda: target.copy_(source),
    }
    timed = compare(
        {name: lambda work=work: [work() for _ in range(times)] for name, work in works.items()},
        repeats=2 if quick else 9,
        device=device,
    )
    best = {row["arm"]: min(row["seconds"]) / times for row in timed}
    return {
        "block_flops": 2 * rows * width * 4 * width / best["block"],
        "head_flops": 2 * len(part) * width * vocab / best["head"],
        "copied_bytes": 2 * source.numel() / best["copy"],
    }


def loading(batch: int, length: int, passages: int) -> float:
    """Seconds in which a batch is read from a memory-mapped file of tokens, in the order of an epoch: the median."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, np.zeros((passages, length), np.uint16))
        loader = Loader(np.load(path, mmap_mode="r"), batch, seed=0)
        loader.batch(0)  # makes the order
        seconds = []
        for step in range(1, 20):
            start = time.perf_counter()
            loader.batch(step)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each preset of a flow."""
    return [_row(case, dtype, say, device) for case in cases(quick, dtype, device)]


def _row(case: Case, dtype: torch.dtype, say: Callable[[str], None], device: torch.device) -> Row:
    say(f"bounds: a step of {case.corpus}")
    (step,) = steps_of(case, ("FLM",)).values()
    (timed,) = compare({"FLM": step}, repeats=2 if case.quick else 5, device=device)
    model = step.model.config
    flops = expected(case.preset("flm")).step_flops
    roof = roofs(case.batch * model.length, model.backbone.width, model.vocab_size, dtype, case.quick, device)
    median = statistics.median(timed["seconds"])
    return {
        "arm": f"{case.corpus}-flm",
        "vocab": model.vocab_size,
        "length": model.length,
        "batch": case.batch,
        "seconds": timed["seconds"],
        "median": median,
        "shares": shares(step, device),
        "loading": loading(case.batch, model.length, 1000 if case.quick else 100_000) / median,
        "flops": flops,
        "flops_per_second": flops / median,
        "peak_share": flops / median / peak if (peak := peak_of(device)) else None,
        # Of what the widest products alone would take.
        "utilisation": flops / median / max(roof["block_flops"], roof["head_flops"]),
    } | roof
