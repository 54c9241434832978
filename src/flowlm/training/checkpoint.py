"""Run directories and their checkpoints: written whole or not at all, pruned by a policy, never pickled.

run/
  config.toml  config.json  tokenizer.json  clock.json     what it is
  data.json  origin.json                                   what it learned from, and where it was begun
  tokenizer_config.json                                    end token and pad of a tokenizer made elsewhere
  model.safetensors  ema.safetensors                       the exported checkpoint's weights
  metrics.jsonl  samples/                                  what happened
  checkpoints/step-00000250/                               what a resume needs
    model.safetensors  ema.safetensors  optimizer.safetensors  clock.json  state.json
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowlm import files
from flowlm.clock import Clock
from flowlm.model import read_sampling_clock, write_model_config, write_sampling_clock
from flowlm.weights import load_weights, read_tensors, write_weights

ORIGIN = "origin.json"
"""Commit, torch, machine and arithmetic with which a run was begun."""
CHECKPOINT_FORMAT = "flowlm-checkpoint/1"
#: Of a checkpoint, what stands at the top of the run too.
_EXPORTED = ("model.safetensors", "ema.safetensors", "clock.json")
#: What a run directory may hold, and --force may therefore remove.
_OURS = re.compile(
    r"config\.toml|config\.json|tokenizer(_config)?\.json|clock\.json|(data|origin)\.json|metrics\.jsonl|samples|checkpoints"
    r"|(model|ema|nonfinite-step-\d+)\.safetensors|\..*\.tmp"
)


class RunDirectory:
    """The folder of one run.

    Args:
        path: its place; made by `create`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def _taken(self) -> bool:
        return bool(self.steps()) or any(
            (self.path / name).exists() for name in ("config.toml", "config.json")
        )

    def check(self, *, force: bool = False) -> None:
        """Whether a new run can be made here.

        Raises:
            ValueError: a run is already there, and not to be replaced; or something else.
        """
        if self.path.is_file():
            raise ValueError(f"{self.path} is a file: choose a folder for the run with --out")
        found = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        ours = [name for name in found if _OURS.fullmatch(name) and (self.path / name).is_file()]
        others = ", ".join(name for name in ours if not name.endswith(".tmp"))
        if others and not self._taken:
            raise ValueError(
                f"{self.path} holds {others} of no run, which a run would write over: choose another folder with "
                "--out, or remove what is there yourself"
            )
        if self._taken:
            if not force:
                raise ValueError(
                    f"{self.path} already holds a run: continue it with --resume, replace it with --force, "
                    "or choose another folder with --out"
                )
            foreign = [name for name in found if not _OURS.fullmatch(name)]
            if foreign:
                raise ValueError(
                    f"{self.path} holds what no run made ({', '.join(foreign[:5])}), so --force leaves it "
                    "alone: choose another folder with --out, or remove it yourself"
                )

    def create(self, config_toml: str, *, force: bool = False) -> None:
        """Make the folder of a new run.

        Raises:
            ValueError: as of `check`.
            OSError: it cannot be made, with the reason.
        """
        self.check(force=force)
        if self._taken:
            shutil.rmtree(self.path)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise files.explain(error, self.path) from error
        files.write_data(self.path / "config.toml", config_toml)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(
            int(p.name[5:])
            for p in self.checkpoints.glob("step-*")
            if p.name[5:].isdigit() and (p / "state.json").exists()
        )

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.checkpoints / f"step-{step:08d}"

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        clock: Clock | None,
        state: dict[str, Any],
        objective: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint of a step: into a temporary folder, flushed, then moved into place.

        Args:
            model, ema: weights and their average, by name.
            optimizer, objective: their states.
            clock: sampling clock.
            state: what else a resume needs.

        Raises:
            OSError: naming the last good checkpoint, which stays untouched.
        """
        target = self.checkpoint(step)
        if target.exists():
            return target
        temporary = self.checkpoints / f".step-{step:08d}.{os.getpid()}.tmp"
        try:
            self._check_space(model, objective or {})
            temporary.mkdir(parents=True)
            write_weights(temporary / "model.safetensors", model)
            write_weights(temporary / "ema.safetensors", ema)
            write_weights(temporary / "optimizer.safetensors", optimizer)
            if objective:
                write_weights(temporary / "objective.safetensors", objective)
            write_sampling_clock(temporary, clock)
            content = {"format": CHECKPOINT_FORMAT, "step": step, **state}
            files.write_json(temporary / "state.json", content)
            files.sync(temporary)
            os.replace(temporary, target)
            files.sync(self.checkpoints)
        except OSError as error:
            good = self.steps()
            last = f"the last good checkpoint is {self.checkpoint(good[-1])}" if good else "there is none yet"
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"could not save the checkpoint of step {step}: {reason}; {last}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _check_space(self, model: Mapping[str, Tensor], objective: Mapping[str, Tensor]) -> None:
        # Weights, their average and two moments, four bytes each: better to say so before a file is cut short.
        need = 16 * sum(value.numel() for value in model.values())
        need += sum(value.nbytes for value in objective.values())
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise OSError(
                28, f"the disk is full: {need / 2**20:.0f} MiB are needed, {free / 2**20:.0f} are free"
            )

    def sweep(self) -> None:
        """Remove what a kill left half-written."""
        for leftover in self.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in (self.path, self.path / "samples"):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def prune(self, keep: int, chosen: int | None) -> None:
        """Keep the newest `keep` checkpoints and the chosen one."""
        for step in self.steps()[:-keep]:
            if step != chosen:
                # Under a name that `sweep` knows: a kill may come while its files go, and with the first of them it
                # would be no checkpoint any more that is listed.
                gone = self.checkpoints / f".step-{step:08d}.gone.tmp"
                with contextlib.suppress(OSError):
                    os.replace(self.checkpoint(step), gone)
                shutil.rmtree(gone, ignore_errors=True)

    def export(self, step: int, model: Any) -> None:
        """Put a checkpoint's weights at the top of the run, where `FlowLM.from_pretrained` reads them."""
        source = self.checkpoint(step)
        for name in _EXPORTED:
            files.link_or_copy(source / name, self.path / name)
        write_model_config(self.path, model.config)

    def is_exported(self) -> bool:
        """Whether the weights at the top are those that the newest checkpoint names: a kill may come between."""
        newest = self.checkpoint(self.steps()[-1])
        chosen = json.loads((newest / "state.json").read_text(encoding="utf-8"))["chosen"]
        return (self.path / "config.json").exists() and all(
            (self.path / name).exists()
            and filecmp.cmp(self.checkpoint(chosen) / name, self.path / name, shallow=False)
            for name in _EXPORTED
        )

    def load(
        self,
        step: int,
        model: Any,
        ema: Any,
        load_optimizer: Callable[[dict[str, Tensor]], None],
        load_objective: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> tuple[dict[str, Any], Clock | None]:
        """Restore a checkpoint's tensors into place; returns its state and sampling clock.

        Raises:
            ValueError: it is damaged, of another version, or of another model.
        """
        folder = self.checkpoint(step)
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}/state.json cannot be read ({error}): remove {folder} to use an older one"
            ) from None
        if state.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(
                f"{folder} has format {state.get('format')!r}, this version reads {CHECKPOINT_FORMAT!r}: "
                "resume with the version of flowlm that wrote it, or start a new run with --init"
            )
        load_weights(model, folder / "model.safetensors")
        load_weights(ema, folder / "ema.safetensors")
        load_optimizer(read_tensors(folder / "optimizer.safetensors"))
        if load_objective is not None and (folder / "objective.safetensors").exists():
            load_objective(read_tensors(folder / "objective.safetensors"))
        return state, read_sampling_clock(folder, getattr(model, "clock", None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for a last one that a kill cut short. ValueError: another is damaged."""
    text, lines = path.read_text(encoding="utf-8"), []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if line.endswith("\n"):
                raise ValueError(f"{path}, line {number} is damaged ({error}): remove that line") from None
    return lines


class Metrics:
    """metrics.jsonl: one JSON object a line, appended; a resume drops what came after its step.

    Args:
        path: of the file; None for a process that writes nothing.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def resume_at(self, step: int) -> list[dict[str, Any]]:
        """Forget lines of later steps, and a line that a kill cut short; returns the others."""
        if self.path is None or not self.path.exists():
            return []
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        files.write_data(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self.path is None:
            return
        clean = {k: (v.item() if isinstance(v, Tensor) else v) for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(clean) + "\n")


def save_batch(path: Path, tensors: dict[str, Tensor]) -> None:
    """Keep the batch on which a run stopped, for a post-mortem."""
    write_weights(
        path, {k: v if v.dim() else v[None] for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    )
