"""What a user waits for: whole passages of the flow map in one network call, beside the same transformer writing token
after token with its cache of keys and values, and discrete diffusion in eight calls.

All have one size and random weights: what is computed depends on neither training nor text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import CPU, Row, compare

from flowlm import FlowLM
from flowlm.backbone import BackboneConfig
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import DenoiserConfig
from flowlm.families import family_of
from flowlm.objectives import FlowMapConfig

#: Name, family, and network calls asked for; AR takes as many as there are tokens.
WAYS = (
    ("FMLM, 1 call", "flow", 1),
    ("AR, a call a token", "ar", 1),
    ("MDLM, 8 calls", "mdlm", 8),
    ("Duo, 8 calls", "duo", 8),
)
VOCAB = 8192


def make_model(
    kind: str, vocab: int, length: int, width: int, depth: int, device: torch.device = CPU
) -> FlowLM:
    """A model of a family, untrained."""
    torch.manual_seed(0)
    shape = BackboneConfig(width=width, depth=depth)
    flow_map = {"two_times": True, "head_start": FlowMapConfig().head_start} if kind == "flow" else {}
    config = DenoiserConfig(vocab_size=vocab, length=length, family=kind, backbone=shape, **flow_map)
    network = family_of(config).network(config).eval().to(device)
    # Logits of the order of one, as in `generation`.
    torch.nn.init.normal_(network.get_parameter("head.weight"), std=width**-0.5)
    words = Tokenizer.train_words((), vocab=[f"w{i}" for i in range(vocab - 2)])
    return FlowLM(network, words)


def measure(
    quick: bool, dtype: torch.dtype, say: Callable[[str], None], device: torch.device = CPU
) -> list[Row]:
    """A row for each family, length and batch; seconds are for the whole batch of passages."""
    repeats, vocab = (2, 64) if quick else (5, VOCAB)
    width, depth = (32, 1) if quick else (256, 6)
    name = str(dtype).removeprefix("torch.")
    rows: list[Row] = []
    for length in (4, 8) if quick else (32, 128, 1024):
        models = {way: make_model(kind, vocab, length, width, depth, device) for way, kind, _ in WAYS}
        for batch in (1, 2) if quick else (1, 16):
            say(f"families: {length} tokens, batch {batch}")
            arms = {
                way: lambda model=models[way], calls=calls, batch=batch: model.generate(
                    batch, steps=calls, dtype=name
                )
                for way, _, calls in WAYS
            }
            for row in compare(arms, repeats, device=device):
                size = {"vocab": vocab, "batch": batch, "length": length, "width": width, "depth": depth}
                rows.append(size | {"passages_per_second": batch / row["median"]} | row)
    return rows
