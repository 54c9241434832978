"""Times the package on this machine and writes the figures down.

    python benchmarks/run.py [NAME|all] [--quick] [--device D] [--threads N] [--dtype D] [--out FOLDER]

NAME is one of those that benchmarks/README.md tells of. FOLDER/MACHINE gets a JSON file per
benchmark, and tables.md, made from the JSON files that are there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bounds
import distillation
import families
import generation
import growth
import presets
import state
import steps
import tokenising
import torch
from measure import Row, machine

from flowlm.device import keep_freed_memory, resolve_device, resolve_dtype
from flowlm.files import write_data, write_json

RESULTS = Path(__file__).resolve().parent / "results"

#: Columns of each table: heading, and a cell from a row.
Columns = dict[str, Callable[[Row], str]]
_TIMES: Columns = {
    "ms": lambda row: f"{1000 * row['median']:,.1f}",
    "× the first": lambda row: f"{row['ratio']:.2f}",
    "within a turn": lambda row: f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}",
}
_MEMORY: Columns = {
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
    "× the first's peak": lambda row: f"{row['peak_ratio']:.2f}",
    "the step's MB": lambda row: f"{row['step_bytes'] / 1e6:,.0f}",
    "× the first's own": lambda row: f"{row['step_ratio']:.2f}",
}
TABLES: dict[str, tuple[str, Columns]] = {
    "state": (
        "One training step (forward, backward, optimizer) with each state. Peak: resident memory of a process that "
        "takes two steps, or of its tensors on a GPU; the step's: beyond what it has when weights, moments and batch "
        "are there.",
        {
            "V": lambda row: f"{row['vocab']:,}",
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "local posterior": lambda row: row["local_posterior"],
            "state": lambda row: row["arm"],
            **_TIMES,
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            **_MEMORY,
        },
    ),
    "distillation": (
        "One training step (draws, forward, backward, optimizer) by each objective, half of the rows on the diagonal. "
        "Memory as of `state`.",
        {
            "V": lambda row: f"{row['vocab']:,}",
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "objective": lambda row: row["arm"],
            **_TIMES,
            **_MEMORY,
        },
    ),
    "presets": (
        "Training steps of the presets at their full width, random tokens, as they are but for the batch. FLOP/s by "
        "the count of `flowlm info`. Said: what it says of gradients, moments and activations, all that a step adds to "
        "the memory of weights, average and teacher.",
        {
            "preset": lambda row: row["arm"],
            "parameters": lambda row: f"{row['parameters']:,}",
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "in a pass": lambda row: str(row["micro_batch"]),
            "ms": lambda row: f"{1000 * row['median']:,.1f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.1f}",
            "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:,.1f}",
            "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
            "the step's MB": lambda row: f"{row['step_bytes'] / 1e6:,.0f}",
            "said": lambda row: f"{row['expected_bytes'] / 1e6:,.0f}",
        },
    ),
    "steps": (
        "One training step at the published sizes, networks, objectives and optimizers of the presets. Outside: what a "
        "step takes beyond the blocks alone and beyond the gradients of embedding and head. GFLOP/s of the presets as "
        "they are, by the count of `flowlm info`.",
        {
            "V": lambda row: f"{row['vocab']:,}",
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "step of": lambda row: row["arm"],
            **_TIMES,
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:,.1f}" if row["flops_per_second"] else "",
            "the step's MB": lambda row: f"{row['step_bytes'] / 1e6:,.0f}",
            "outside MB": lambda row: f"{row['outside_bytes'] / 1e6:,.0f}",
            "× the first's outside": lambda row: f"{row['outside_ratio']:.2f}",
        },
    ),
    "bounds": (
        "Where a training step of the presets goes, by a profile of its operations, and what it reaches of what this "
        "machine can do: products of matrices as large as those of the blocks and of the head, and a copy. Utilisation "
        "is of the faster product; of a GPU also of what its maker states for dense "
        "bfloat16. Reading a batch: of a memory-mapped file, as a share of the step.",
        {
            "preset": lambda row: row["arm"],
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "ms": lambda row: f"{1000 * row['median']:,.1f}",
            "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:,.1f}",
            "blocks' product": lambda row: f"{row['block_flops'] / 1e9:,.0f}",
            "head's product": lambda row: f"{row['head_flops'] / 1e9:,.0f}",
            "utilisation": lambda row: f"{100 * row['utilisation']:.0f} %",
            "of the maker's peak": lambda row: (
                f"{100 * row['peak_share']:.0f} %" if row.get("peak_share") else ""
            ),
            "copy, GB/s": lambda row: f"{row['copied_bytes'] / 1e9:,.1f}",
            "reading a batch": lambda row: f"{100 * row['loading']:.2f} %",
            "its time": lambda row: ", ".join(
                f"{kind} {100 * share:.0f} %" for kind, share in row["shares"].items() if share >= 0.005
            ),
        },
    ),
    "growth": (
        "Seconds against one of vocabulary, length and batch, the others as said, and the line a + b x through them. "
        "Power: the slope of log seconds over log x between the last two points, 1 where growth is linear.",
        {
            "of": lambda row: row["arm"],
            "x": lambda row: row["varied"],
            "the others": lambda row: ", ".join(
                f"{name} {row['about'][name]:,}"
                for name in ("vocab", "length", "batch")
                if name != row["varied"]
            ),
            "at": lambda row: ", ".join(f"{x:,}" for x in row["points"]),
            "ms": lambda row: ", ".join(f"{1000 * x:,.1f}" for x in row["medians"]),
            "a, ms": lambda row: f"{1000 * row['fixed']:,.2f}",
            "b, ms": lambda row: f"{1000 * row['each']:,.4f}",
            "farthest from the line": lambda row: f"{100 * row['worst']:.0f} %",
            "power": lambda row: f"{row['power']:.2f}",
        },
    ),
    "tokenising": (
        "Stories of the grammar to ids.",
        {
            "tokens": lambda row: row["tokenizer"],
            "V": lambda row: f"{row['vocab']:,}",
            "texts": lambda row: f"{row['texts']:,}",
            "way": lambda row: row["arm"],
            **_TIMES,
            "texts/s": lambda row: f"{row['texts_per_second']:,.0f}",
        },
    ),
    "generation": (
        "Milliseconds and ratio are for one network call, tokens per second for whole passages.",
        {
            "V": lambda row: f"{row['vocab']:,}",
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "way": lambda row: row["arm"],
            **_TIMES,
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        },
    ),
    "families": (
        "Whole passages, models of one size; milliseconds are for the batch, at batch 1 the wait for one passage.",
        {
            "V": lambda row: f"{row['vocab']:,}",
            "batch × length": lambda row: f"{row['batch']} × {row['length']}",
            "way": lambda row: row["arm"],
            **_TIMES,
            "passages/s": lambda row: f"{row['passages_per_second']:,.1f}",
        },
    ),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py", description="Time the package on this machine."
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*TABLES, "all"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: cuda where there is one; tokenising is always the CPU's",
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; its own choice when left out")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, float32 or bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    if chosen.threads < 0:
        parser.error(f"--threads {chosen.threads}: give at least 1, or leave it out")
    return chosen


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is asked for; returns the folder of this machine."""
    chosen = parse(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    device = resolve_device(there if chosen.device == "auto" else chosen.device)
    if chosen.what == "tokenising":
        device = torch.device("cpu")
    dtype, _ = resolve_dtype(chosen.dtype, device)
    keep_freed_memory()  # as training and evaluating do, here for every way
    here = machine(dtype, device)
    folder = chosen.out / folder_name(here)
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    measures: dict[str, Callable[[], list[Row]]] = {
        "state": lambda: state.measure(chosen.quick, dtype, say, device),
        "distillation": lambda: distillation.measure(chosen.quick, dtype, say, device),
        "presets": lambda: presets.measure(chosen.quick, dtype, say, device),
        "steps": lambda: steps.measure(chosen.quick, dtype, say, device),
        "bounds": lambda: bounds.measure(chosen.quick, dtype, say, device),
        "growth": lambda: growth.measure(chosen.quick, dtype, say, device),
        "tokenising": lambda: tokenising.measure(chosen.quick, say),
        "generation": lambda: generation.measure(chosen.quick, dtype, say, device),
        "families": lambda: families.measure(chosen.quick, dtype, say, device),
    }
    if chosen.what == "all":
        # Each in a process of its own: the peak of one that starts others counts in theirs.
        options = [o for o in (sys.argv[1:] if arguments is None else arguments) if o != "all"]
        for name in TABLES:
            subprocess.run([sys.executable, __file__, name, *options], check=True)
        return folder
    rows = measures[chosen.what]()
    write_json(folder / f"{chosen.what}.json", {"machine": here, "quick": chosen.quick, "rows": rows})
    write_data(folder / "tables.md", tables(folder))
    say(f"written to {folder}")
    return folder


def folder_name(here: dict[str, Any]) -> str:
    """A folder's name for a machine, its threads and dtype: figures of two of them never share a table."""
    text = " ".join(
        [*filter(None, [here.get("gpu")]), f"{here['cpu']} {here['threads']} threads {here['dtype']}"]
    )
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def tables(folder: Path) -> str:
    """Markdown of every JSON file of a machine's folder."""
    parts = []
    for name, (note, columns) in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(section(name, note, columns, json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def section(name: str, note: str, columns: Columns, result: dict[str, Any]) -> str:
    """One benchmark: its circumstances, then a line per row."""
    here = result["machine"]
    quick = " **Quick: tiny sizes, no figures to quote.**" if result["quick"] else ""
    gpu = f"{here['gpu']}, " if "gpu" in here else ""
    head = (
        f"{gpu}{here['cpu']}, {here['threads']} of {here['cores']} cores, {here['dtype']}, torch {here['torch']}, "
        f"commit `{here['commit']}`.{quick} {note} Medians of {len(result['rows'][0]['seconds'])} turns."
    )
    lines = [
        list(columns),
        ["--:"] * len(columns),
        *([cell(row) for cell in columns.values()] for row in result["rows"]),
    ]
    return "\n".join([f"## {name}", "", head, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


if __name__ == "__main__":
    main()
