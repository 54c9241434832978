"""A progress bar: what is done, loss, tokens a second, time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

PLAIN_EVERY = 15.0  # seconds between plain lines


class Progress:
    """Shows how a job goes.

    Args:
        total, done: steps in all, and already taken.
        tokens: tokens per step; 0 shows no speed.
        say: where plain messages go.
        label: what is counted.
        brief: says nothing of a job that is over before its first plain line is due.
        shown: False for no bar and no lines, of a process that is not the one to tell.
    """

    _live: ClassVar[bool] = False
    """Whether a bar stands on the terminal."""

    def __init__(
        self,
        total: int,
        done: int,
        tokens: int,
        say: Callable[[str], None],
        *,
        label: str = "step",
        brief: bool = False,
        shown: bool = True,
    ):
        self.total, self.first, self.tokens = total, done, tokens
        self._say, self._label, self._shown = say, label, shown
        self._silent = brief
        self._bar: Any = None
        self._loss: float | None = None

    def __enter__(self) -> Progress:
        self._start = self._told = time.perf_counter()
        terminal = self._shown and sys.stderr.isatty()
        # One bar at a time: that of a job within a job would write over it.
        self._shown = self._shown and not (terminal and Progress._live)
        if terminal and self._shown:
            Progress._live = True
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
            Progress._live = False

    def go_on_from(self, step: int) -> None:
        """What lies before this step was done at another time: speed and time left are of what follows."""
        self.first, self._start = step, time.perf_counter()
        if self._bar is not None:
            self._bar.reset(self._task, completed=step, loss="", speed="")

    def advance(self, step: float, loss: float | None = None) -> None:
        """At this step now; the loss shown is a running mean."""
        if loss is not None:
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        shown = "" if self._loss is None else f"loss {self._loss:.4f}"
        now = time.perf_counter()
        rate = (step - self.first) / max(now - self._start, 1e-9)
        if self._bar is not None:
            speed = f"{rate * self.tokens:,.0f} tokens/s" if self.tokens else ""
            self._bar.update(self._task, completed=step, loss=shown, speed=speed)
        elif self._shown and (now - self._told > PLAIN_EVERY or (step == self.total and not self._silent)):
            self._told, self._silent = now, False
            parts = (
                f"{self._label} {step if isinstance(step, int) else f'{step:.1f}'}/{self.total}",
                shown,
                f"{rate * self.tokens:,.0f} tokens/s" if self.tokens else "",
                f"{(self.total - step) / rate:.0f} s left" if rate else "",
            )
            self._say("  ".join(part for part in parts if part))

    def part(self, first: float, size: float) -> Part:
        """A stretch of the bar, from step `first` on, as a bar of its own for a job within the job."""
        return Part(self, first, size)

    def say(self, message: str) -> None:
        """A message above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            self._say(message)


class Part:
    """A stretch of a bar: what goes on in it is shown as its share of the whole.

    Args:
        whole: the bar.
        first, size: the stretch, in its steps.
        total: steps of the job that fills it.
    """

    def __init__(self, whole: Progress, first: float, size: float, total: int = 1):
        self._whole, self._first, self._size, self._total = whole, first, size, total

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The whole goes on."""

    def of(self, total: int) -> Part:
        """The same stretch for a job of so many steps."""
        return Part(self._whole, self._first, self._size, total)

    def split(self, share: float) -> tuple[Part, Part]:
        """The stretch in two, the first with this share of it."""
        size = share * self._size
        return Part(self._whole, self._first, size), Part(self._whole, self._first + size, self._size - size)

    def share(self, number: int, count: int) -> Part:
        """One of `count` equal stretches."""
        return Part(self._whole, self._first + self._size * number / count, self._size / count)

    def advance(self, step: float, loss: float | None = None) -> None:
        """At this step of the job now."""
        self._whole.advance(self._first + self._size * step / self._total)

    def say(self, message: str) -> None:
        """Nothing: of a job within a job the whole tells what matters."""

    def tell(self, message: str) -> None:
        """A message above the bar, of the whole."""
        self._whole.say(message)
