"""Progress where there is no terminal: plain lines, not too many of them."""

from __future__ import annotations

import pytest

from flowlm import progress
from flowlm.progress import Progress


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 8))  # every step takes eight seconds
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(progress.sys, "stderr", open("/dev/null"))  # noqa: SIM115
    lines: list[str] = []
    with Progress(10, 4, 100, lines.append) as bar:
        for step in range(5, 11):
            bar.advance(step, 2.0)
        bar.say("a message")
    assert [line.split("  ")[0] for line in lines] == ["step 6/10", "step 8/10", "step 10/10", "a message"]
    assert "loss 2.0000" in lines[0]
    assert "12 tokens/s" in lines[0]  # 100 tokens every eight seconds, counted from step 4
    assert lines[0].endswith("32 s left")
    assert lines[2].endswith("0 s left")


def test_a_job_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(progress.sys, "stderr", open("/dev/null"))  # noqa: SIM115
    lines: list[str] = []
    with Progress(4, 0, 0, lines.append, label="calls") as bar:
        bar.advance(2)
        bar.advance(4)
    assert lines == ["calls 2/4  20 s left", "calls 4/4  0 s left"]


def test_what_was_done_before_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 21.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress.sys, "stderr", open("/dev/null"))  # noqa: SIM115
    lines: list[str] = []
    with Progress(100, 0, 0, lines.append, label="KiB") as bar:
        bar.go_on_from(80)
        bar.advance(90)
    assert lines == ["KiB 90/100  20 s left"]


def test_a_job_within_a_job_has_no_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    lines: list[str] = []
    with Progress(4, 0, 0, lines.append) as outer:
        with Progress(4, 0, 0, lines.append, label="texts scored") as inner:
            assert inner._bar is None
            inner.advance(4)
        assert outer._bar is not None
        outer.advance(1)
    with Progress(4, 0, 0, lines.append) as later:
        assert later._bar is not None
    assert lines == []
