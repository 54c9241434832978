"""The denoiser: backbone + conditioning clock -> posterior over tokens.

    D_t(y)_l    = p(token_l | y_t = y)                            one time
    δ_{s,t}(y)  = the two-time denoiser of the flow map X_{s,t}    two times, δ_{t,t} = D_t

Times are flow times, scalar, (B,) or (B, L); the network reads their clock time τ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm.backbone import Backbone, BackboneConfig, TimeEmbedding
from flowlm.clock import make_clock
from flowlm.device import wide
from flowlm.local import LocalPosterior
from flowlm.path import (
    DenseNoise,
    IsotropicNoise,
    LowRankNoise,
    evidence_weights,
    isotropic_evidence_weights,
    noise_law,
    step,
    times_like,
)
from flowlm.posterior import Head, Posterior, Regression

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """What a denoiser is made of; saved as config.json beside its weights."""

    vocab_size: int = 0
    """V; filled in from the tokenizer."""
    vocabulary: str = ""
    """sha256 of the tokens in the order of their ids; filled in from the tokenizer. Empty: not known."""
    length: int = 64
    """L, tokens in a passage."""
    family: str = "flow"
    """What kind of network it is, filled in from the objective: "flow", or one of `flowlm.families`."""
    two_times: bool = False
    """Whether the network reads (s, t), as a flow map does, or one time."""
    state: str = "one-hot"
    """What flows: "one-hot" (tokens, seen through y = xE), "embedding" (E[token] itself, of length 1 and learned) or
    "random" (the same, as it starts). The last two are for comparison."""
    output: str = "softmax"
    """What the head gives: "softmax", or "linear", the mean of the one-hot token regressed (flow.loss =
    "squared-error"), for comparison."""
    clock: str = "decoding-error"
    """Conditioning clock: "decoding-error" or "uniform"."""
    logit_softcap: float = 0.0
    """Output logits a become c·tanh(a/c); 0 for none (published releases use 30)."""
    tied_head: bool = False
    """Share the head's weight with the embedding."""
    input_scaling: bool = False
    """Scale the state to unit variance before the network."""
    embedding_scale: float = 3.0
    """Entries of the embedding start uniform in ±scale/√d (published: 1)."""
    local_posterior: bool = True
    """Show the network, beside y, the embedded posterior of each token given its own noisy state alone."""
    prior_rank: int = 64
    """Rank in which the local posterior's prior over tokens depends on the position; 0 for one prior everywhere."""
    local_tokens: int = 512
    """Most frequent tokens that the local posterior tells apart, the others being one to it; 0 for all of them. With
    all of a large vocabulary it costs more than the head."""
    head_start: float = 0.0
    """Of a flow map, filled in from flow_map.head_start."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


def as_it_was(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved config, with those that have become a choice since as they were then."""
    if not isinstance(values, dict) or values.get("family", "flow") != "flow":
        return values
    return {"local_tokens": 0} | values


def check_size(config: DenoiserConfig) -> None:
    """Refuse what no network can be made of."""
    if config.vocab_size < 2:
        raise ValueError(
            f"a vocabulary of {config.vocab_size} tokens leaves nothing to learn: V must be at least 2"
        )
    if config.length < 1:
        raise ValueError(f"model.length must be at least 1, got {config.length}")
    if config.embedding_scale <= 0:
        raise ValueError(f"model.embedding_scale must be positive, got {config.embedding_scale}")
    for name, choices in (("state", ("one-hot", "embedding", "random")), ("output", ("softmax", "linear"))):
        if getattr(config, name) not in choices:
            raise ValueError(f"model.{name} = {getattr(config, name)!r}: use {', '.join(map(repr, choices))}")
    if config.input_scaling and config.state != "one-hot":
        raise ValueError(
            f"model.input_scaling is for the one-hot state, and model.state = {config.state!r}: leave it out"
        )


#: Widths of clock time below it are rounding: time(τ) is good where 1e-6 < τ < 1 - 1e-6.
CLOCK_ROUNDING = 1e-6


class Denoiser(nn.Module):
    """Embedding E, backbone, head and conditioning clock.

    Raises:
        ValueError: a vocabulary of fewer than two tokens, a passage of fewer than one.
    """

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        check_size(config)
        if config.local_tokens < 0:
            raise ValueError(
                f"model.local_tokens cannot be negative, got {config.local_tokens}: 0 tells all tokens apart"
            )
        if config.prior_rank < 0:
            raise ValueError(
                f"model.prior_rank cannot be negative, got {config.prior_rank}: 0 is one prior everywhere"
            )
        if config.head_start and not config.two_times:
            raise ValueError(
                f"model.head_start = {config.head_start} is for flow maps, which read two times: a denoiser of one "
                "time goes nowhere"
            )
        if not 0 <= config.head_start < 1:
            raise ValueError(f"model.head_start is a share of the way in [0, 1), got {config.head_start}")
        self.config = config
        width = config.backbone.width
        bound = config.embedding_scale / width**0.5
        rows = torch.empty(config.vocab_size, width).uniform_(-bound, bound)
        rows = rows if config.state == "one-hot" else F.normalize(rows, dim=-1)
        self.embedding = nn.Parameter(rows, requires_grad=config.state != "random")
        self.backbone = Backbone(config.backbone, config.length)
        self.time_embedding = TimeEmbedding(config.backbone.conditioning, config.backbone.time_scale)
        if config.two_times:
            self.end_embedding = TimeEmbedding(
                config.backbone.conditioning, config.backbone.time_scale, zero=True
            )
            if config.head_start:
                # Zero until `set_mean`; learned where the embedding is.
                self.mean = nn.Parameter(torch.zeros(config.length, width))
        self.head = Head(
            width, config.vocab_size, config.logit_softcap, self.embedding if config.tied_head else None
        )
        if config.local_posterior:
            self.local = LocalPosterior(
                self.embedding,
                config.length,
                config.backbone.conditioning,
                config.prior_rank,
                config.local_tokens,
            )
        self._holds = False
        self._kept: dict[Callable[[Tensor], Any], Any] = {}
        self._kept_of: tuple[int, int] | None = None
        self.clock = make_clock(config.clock, config.vocab_size)

    def constrain(self) -> None:
        """Bring the embedding back to where it lives, after a step of an optimizer: rows of length 1, if it flows."""
        if self.config.state == "embedding":
            with torch.no_grad():
                self.embedding.copy_(F.normalize(self.embedding, dim=-1))

    def noise_law(self) -> DenseNoise | LowRankNoise | IsotropicNoise:
        """The law of the noise state y_0 = zE under the present embedding."""
        if self.config.state != "one-hot":
            return IsotropicNoise(self.embedding)
        # With gradients, its own way to E.
        return noise_law(self.embedding) if torch.is_grad_enabled() else self._of_embedding(noise_law)

    def forward(self, y: Tensor, s: Tensor | float, t: Tensor | float | None = None) -> Posterior:
        """The posterior δ_{s,t}(y), or D_s(y) when t is None.

        Args:
            y: state (B, L, d).
            s, t: flow times, scalar, (B,) or (B, L), s ≤ t.

        Raises:
            ValueError: t given to a one-time denoiser.
        """
        if t is not None and not self.config.two_times:
            raise ValueError(
                "this denoiser was built with one time (FLM): it has no δ_{s,t}; distil it first"
            )
        if y.shape[1] > self.config.length and (
            self.config.head_start or (self.config.local_posterior and self.config.prior_rank)
        ):
            raise ValueError(
                f"a passage of {y.shape[1]} tokens is longer than the {self.config.length} positions whose prior this "
                "denoiser has learned: train with a larger model.length, or with model.prior_rank 0 and "
                "flow_map.head_start 0"
            )
        if t is not None and self.config.head_start:
            y, s = self.head_start(y, s, t)
        # Times in float32: rounded to bfloat16, τ = .800 and .804 would be one time.
        with torch.autocast(y.device.type, enabled=False):
            cond = self.time_embedding(self.clock.tau(_batched(s, y)))
            if self.config.two_times:
                cond = cond + self.end_embedding(self.clock.tau(_batched(s if t is None else t, y)))
        h = y
        if self.config.input_scaling:
            time = times_like(_batched(s, y), y).float()
            variance = (1 - time).square() + time.square() / self.config.vocab_size
            power = self.embedding.detach().float().square().sum() / self.embedding.shape[1]
            h = h * (variance * power).rsqrt().to(h.dtype)
        cond = F.silu(cond)
        if self.config.local_posterior:
            h = h + self.local(y, _batched(s, y), cond, self._of_embedding(self._evidence))
        if torch.is_autocast_enabled(y.device.type):
            # The residual stream follows the compute dtype: otherwise every block casts back and forth.
            dtype = torch.get_autocast_dtype(y.device.type)
            h, cond = h.to(dtype), cond.to(dtype)
        # The final norm may come out in float32; the head, the widest product of all, runs in the compute dtype.
        kind = Posterior if self.config.output == "softmax" else Regression
        return kind(self.backbone(h, cond).to(h.dtype), self.head, self.embedding)

    def _evidence(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """What the local posterior weighs a state with."""
        make = evidence_weights if self.config.state == "one-hot" else isotropic_evidence_weights
        return self.local.weights_of(make(embedding))

    def head_start(self, y: Tensor, s: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The state at u, a share of the clock time from s to t, had it gone there towards the mean alone; and u.

        D_0 does not depend on y: it is the law of each position's token, whose mean is `mean`. From s = 0 this is
        Euler's first step exactly, elsewhere an affine change of y. A network that was trained on states on their
        way, not on noise alone, starts there from what it knows.
        """
        with torch.autocast(y.device.type, enabled=False):
            # In float64, so that s < u where the clock is nearly flat.
            given = _batched(s, y)
            start, end = (x.to(wide(y.device)) for x in (given, _batched(t, y)))
            tau = self.clock.tau(start)
            way = self.clock.tau(end) - tau
            u = self.clock.time(tau + self.config.head_start * way)
            # Near the data τ rounds to 1, and its inverse with it: there the state stays where it is.
            u = torch.where(way > CLOCK_ROUNDING, torch.minimum(torch.maximum(u, start), end), start)
            return step(y, self.mean[: y.shape[1]].to(y.dtype), start, u), u.to(given.dtype)

    @torch.no_grad()
    def set_mean(self, tokens: Tensor) -> None:
        """Let the head start go towards the mean of these passages, (N, L) token ids, under the present embedding."""
        total = torch.zeros_like(self.mean)
        for part in tokens.split(4096):
            total += F.embedding(part.to(total.device), self.embedding).sum(0)
        self.mean.copy_(total / len(tokens))

    @contextlib.contextmanager
    def frozen_embedding(self) -> Iterator[None]:
        """Within it the embedding must not change: what follows from it alone is made once, not at each call.

        For steps with gradients. Without them it is kept between calls anyway.
        """
        held, self._holds = self._holds, True
        self._kept = {} if not held else self._kept
        try:
            yield
        finally:
            self._holds = held
            if not held:
                self._kept = {}

    def _of_embedding(self, make: Callable[[Tensor], T]) -> T:
        """make(E), kept for as long as E stays as it is.

        Fused optimizers change a tensor and leave no mark on it. But they step where gradients are on, and what was
        kept is dropped there.
        """
        e = self.embedding
        if not self._holds:
            mark = None if torch.is_grad_enabled() or e.is_inference() else (e.data_ptr(), e._version)
            if mark is None or mark != self._kept_of:
                self._kept, self._kept_of = {}, mark
            if mark is None:
                return make(e)
        if make not in self._kept:
            self._kept[make] = make(e)
        return cast("T", self._kept[make])


def _batched(t: Tensor | float, y: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        t = torch.full((), t, dtype=torch.float32, device=y.device)  # no copy from the host, which would wait
    t = t.to(y.device)
    return t.expand(y.shape[0]) if t.dim() == 0 else t
