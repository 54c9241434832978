"""Weights in files: what is stored small is the same network but for a stated error."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from flowlm.card import export
from flowlm.model import FlowLM
from flowlm.weights import SCALE, read_tensors, stored_as
from helpers import fmlm


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.65), ("int8", 0.45)])
def test_stored_small(tmp_path: Path, dtype: str, share: float) -> None:
    whole, small = export(fmlm(), tmp_path / "a"), export(fmlm(), tmp_path / "b", dtype=dtype)
    stored = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    buffers = dict(whole.denoiser.named_buffers())
    for name, p in whole.denoiser.named_parameters():
        found = dict(small.denoiser.named_parameters())[name]
        assert found.dtype == torch.float32  # computed with as ever
        if dtype == "bfloat16":
            assert stored[name].dtype == torch.bfloat16
            torch.testing.assert_close(found, p.to(torch.bfloat16).float(), rtol=0, atol=0)
        elif p.ndim == 2:
            assert stored[name].dtype == torch.int8
            step = p.detach().abs().amax(dim=1, keepdim=True) / 127
            assert ((found - p).abs() <= 0.5001 * step + 1e-30).all()
        else:
            torch.testing.assert_close(found, p, rtol=0, atol=0)
    for name, b in small.denoiser.named_buffers():
        torch.testing.assert_close(buffers[name], b, rtol=0, atol=0)
    sizes = [(tmp_path / x / "model.safetensors").stat().st_size for x in "ab"]
    assert sizes[1] < share * sizes[0]
    # stored again, it is what it was
    again = FlowLM.from_pretrained(tmp_path / "b")
    again.save_pretrained(tmp_path / "c", dtype=dtype)
    for name, value in read_tensors(tmp_path / "c" / "model.safetensors").items():
        torch.testing.assert_close(
            value, read_tensors(tmp_path / "b" / "model.safetensors")[name], rtol=1e-6, atol=0
        )


def test_rows_of_zeros_and_of_one_large_entry() -> None:
    layer = torch.nn.Linear(3, 3)
    layer.weight.data = torch.tensor([[0.0, 0, 0], [1e6, 1e-6, -1e6], [1e-30, -1e-30, 0]])
    state = stored_as("int8", layer)
    assert torch.equal(
        state["weight"], torch.tensor([[0, 0, 0], [127, 0, -127], [127, -127, 0]], dtype=torch.int8)
    )
    torch.testing.assert_close(
        state["weight"] * state["weight" + SCALE], layer.weight.data, rtol=1e-6, atol=1e-3
    )
    assert state["bias"] is not None
    assert layer.weight.data[1, 1] == 1e-6  # the module is left alone
    with pytest.raises(
        ValueError, match="dtype = 'int4': weights are stored as 'float32', 'bfloat16', 'int8'"
    ):
        stored_as("int4", layer)
