"""Devices and precisions are chosen explicitly, and the reason is said."""

from __future__ import annotations

import pytest
import torch

from flowlm import device
from flowlm.device import precision, resolve_device, resolve_dtype


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without accelerators and without instructions for bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for asked in device.BFLOAT16_UNITS:
        monkeypatch.setattr(torch.cpu, asked, lambda: False, raising=False)
    return monkeypatch


def test_auto_takes_the_best_there_is(bare: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    bare.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    bare.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device 'cuda' was asked for, but torch sees no CUDA device: use cpu or auto"),
        ("cuda:3", "torch sees no CUDA device"),
        ("mps", "device 'mps' was asked for, but torch sees none here: use cpu or auto"),
        ("gpu", "unknown device 'gpu': use auto, cpu, cuda or mps"),
        ("", "unknown device ''"),
    ],
)
def test_missing_and_unknown_devices(bare: pytest.MonkeyPatch, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


def test_dtypes(bare: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("float32", cuda) == (torch.float32, "asked for")
    assert resolve_dtype("bfloat16", cpu) == (torch.bfloat16, "asked for")
    assert resolve_dtype("auto", cpu) == (torch.float32, "no fast bfloat16 on this cpu device")
    for asked, unit in device.BFLOAT16_UNITS.items():
        with bare.context() as only:
            only.setattr(torch.cpu, asked, lambda: True)
            chosen = resolve_dtype("auto", cpu)
        assert chosen == (
            torch.bfloat16,
            f"this CPU multiplies bfloat16 matrices with its {unit} instructions",
        )
    bare.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_dtype("auto", cuda) == (torch.bfloat16, "this GPU multiplies bfloat16 matrices")
    bare.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert resolve_dtype("auto", cuda)[0] == torch.float32
    with pytest.raises(ValueError, match="unknown dtype 'half': use auto, bfloat16 or float32"):
        resolve_dtype("half", cpu)


def test_precision_is_autocast() -> None:
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    with precision(cpu, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
        assert (x @ x).dtype == torch.float32
    with device.precision(cpu, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
