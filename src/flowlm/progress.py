"""A progress bar: what is done, loss, tokens a second, time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

PLAIN_EVERY = 15.0  # seconds between plain lines


class Progress:
    """Shows how a job goes.

    Args:
        total, done: steps in all, and already taken.
        tokens: tokens per step; 0 shows no speed.
        say: where plain messages go.
        label: what is counted.
        brief: says nothing of a job that is over before its first plain line is due.
    """

    def __init__(
        self,
        total: int,
        done: int,
        tokens: int,
        say: Callable[[str], None],
        *,
        label: str = "step",
        brief: bool = False,
    ):
        self.total, self.first, self.tokens = total, done, tokens
        self._say, self._label = say, label
        self._silent = brief
        self._bar: Any = None
        self._loss: float | None = None

    def __enter__(self) -> Progress:
        self._start = self._told = time.perf_counter()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(f"[bold]{self._label}"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.first, loss="", speed="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, loss: float | None = None) -> None:
        """At this step now; the loss shown is a running mean."""
        if loss is not None:
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        shown = "" if self._loss is None else f"loss {self._loss:.4f}"
        now = time.perf_counter()
        rate = (step - self.first) / (now - self._start)
        if self._bar is not None:
            speed = f"{rate * self.tokens:,.0f} tokens/s" if self.tokens else ""
            self._bar.update(self._task, completed=step, loss=shown, speed=speed)
        elif now - self._told > PLAIN_EVERY or (step == self.total and not self._silent):
            self._told, self._silent = now, False
            left = (self.total - step) / rate
            parts = (
                f"{self._label} {step}/{self.total}",
                shown,
                f"{rate * self.tokens:,.0f} tokens/s" if self.tokens else "",
                f"{left:.0f} s left",
            )
            self._say("  ".join(part for part in parts if part))

    def say(self, message: str) -> None:
        """A message above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._say(message)
