"""What generating costs beside the network itself: noise, the clock's grid, the steps' arithmetic, decoding.

The measure is a bare forward: backbone and head of the same model on a state that is there already, then argmax.
Between the two stands one call of the denoiser, which adds the time embedding and the local posterior. The weights
are random: what is computed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import CPU, Row, compare
from torch import Tensor

from flowlm import FlowLM
from flowlm.backbone import BackboneConfig
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.device import precision

#: V, L, d and blocks.
SIZES = ((512, 64, 256, 4), (8192, 64, 256, 4))
QUICK = ((64, 8, 32, 1), (300, 8, 32, 1))
#: Those of the presets, on a GPU.
PUBLISHED = ((30_522, 128, 768, 12), (50_258, 1024, 768, 12))


def make_model(vocab: int, length: int, width: int, depth: int, device: torch.device = CPU) -> FlowLM:
    """A flow map of this size, untrained, with words to decode to."""
    torch.manual_seed(0)
    shape = BackboneConfig(width=width, depth=depth)
    denoiser = Denoiser(DenoiserConfig(vocab_size=vocab, length=length, two_times=True, backbone=shape))
    # A head starts at zero, and its argmax would be [EOS] everywhere: nothing would be decoded. Logits of the order of
    # one: far larger ones make denormal probabilities, which processors multiply many times slower.
    torch.nn.init.normal_(denoiser.head.weight, std=width**-0.5)
    words = Tokenizer.train_words((), vocab=[f"w{i}" for i in range(vocab - 2)])
    return FlowLM(denoiser.eval().to(device), words)


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each way, vocabulary and batch; `ratio` is for one network call."""
    repeats, steps = (2, 4) if quick else (9, 8)
    rows: list[Row] = []
    for vocab, length, width, depth in QUICK if quick else SIZES if device.type == "cpu" else PUBLISHED:
        model = make_model(vocab, length, width, depth, device)
        for batch in (1, 4) if quick else (1, 64):
            say(f"generation: V = {vocab:,}, batch {batch}")
            arms = ways(model, batch, steps, dtype)
            for row in compare(arms, repeats, calls={several(steps): steps}, device=device):
                size = {"vocab": vocab, "batch": batch, "length": length, "width": width, "depth": depth}
                speed = {"tokens_per_second": batch * length / (row["median"] * row["calls"])}
                rows.append(size | speed | row)
    return rows


def several(steps: int) -> str:
    """Name of the way that takes several network calls."""
    return f"generate, {steps} calls"


def ways(model: FlowLM, batch: int, steps: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """From the bare network to whole passages."""
    denoiser = model.denoiser
    name = str(dtype).removeprefix("torch.")
    device = denoiser.embedding.device
    y = torch.randn(batch, model.length, denoiser.config.backbone.width).to(device)
    cond = torch.randn(batch, 1, denoiser.config.backbone.conditioning).to(device, dtype)

    @torch.no_grad()
    def bare() -> Tensor:
        with precision(y.device, dtype):
            return denoiser.head(denoiser.backbone(y.to(dtype), cond).to(dtype)).argmax(-1)

    @torch.no_grad()
    def call() -> Tensor:
        with precision(y.device, dtype):
            return denoiser(y, 0.0, 1.0).tokens()

    return {
        "backbone and head": bare,
        "one call of the denoiser": call,
        "generate, 1 call": lambda: model.generate(batch, steps=1, dtype=name),
        several(steps): lambda: model.generate(batch, steps=steps, dtype=name),
    }
