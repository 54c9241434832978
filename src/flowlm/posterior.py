"""The posterior over tokens that a denoiser returns: hidden states and a head, never a tensor of logits.

Every method works through the vocabulary in chunks over tokens, so that nothing of size B×L×V outlives a
chunk unless `log_probs` asks for it. Under autograd the first chunk is kept for the backward pass, and the others
are recomputed there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowlm.categorical import categorical
from flowlm.device import wide

#: Logits held at once, in elements: 64 MiB of float32.
CHUNK_ELEMENTS = 2**24


def in_chunks(fn: Callable[..., Tensor], chunks: Iterable[tuple[slice, ...]]) -> list[Tensor]:
    """fn(*chunk) of each chunk, of which autograd keeps the first one's tensors and has the others' made again."""
    parts: list[Tensor] = []
    for chunk in chunks:
        again = parts and torch.is_grad_enabled()
        parts.append(checkpoint(fn, *chunk, use_reentrant=False) if again else fn(*chunk))
    return parts


def mean_state(logits: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(logits)·E (..., d), the mean of E[token], the product in dtype."""
    return _state_of(logits.softmax(-1), embedding, dtype)


def _state_of(probs: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(probs.device.type, enabled=False):
        return probs.to(dtype) @ embedding.to(dtype)


class Target(Protocol):
    """What a cross-entropy is taken to: a distribution over tokens at each position."""

    def probs_at(self, rows: slice) -> Tensor:
        """Probabilities (n, V), float32 and without gradient, of positions `rows` of the flattened (B·L)."""
        ...


class Head(nn.Module):
    """Hidden state to logits: linear with bias, zero at the start, optionally soft-capped.

    Args:
        width: d.
        vocab_size: V.
        softcap: logits a become c·tanh(a/c); 0 for none.
        tied: weight (V, d) of the embedding to share, or None.
    """

    def __init__(self, width: int, vocab_size: int, softcap: float = 0.0, tied: nn.Parameter | None = None):
        super().__init__()
        self.softcap = softcap
        if tied is None:
            self.weight = nn.Parameter(torch.zeros(vocab_size, width))
        self._tied = [tied]  # in a list: the embedding owns the parameter
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32."""
        logits = self.uncapped(hidden)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def uncapped(self, hidden: Tensor) -> Tensor:
        """Logits before the soft cap, which leaves their order as it is."""
        weight = self.weight if self._tied[0] is None else self._tied[0]
        return F.linear(hidden, weight.to(hidden.dtype), self.bias.to(hidden.dtype)).float()


class Posterior:
    """δ_{s,t}(y) or D_t(y): a distribution over the V tokens at each of (B, L) positions.

    Args:
        hidden: (B, L, d).
        head: hidden -> logits.
        embedding: E (V, d), for `embed`.
    """

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor], embedding: Tensor):
        self.hidden, self.head, self.embedding = hidden, head, embedding

    @property
    def shape(self) -> torch.Size:
        """(B, L), or (n,) of chosen positions."""
        return self.hidden.shape[:-1]

    def __getitem__(self, rows: slice) -> Posterior:
        """The posterior of some rows of the batch."""
        return self._of(self.hidden[rows])

    def at(self, chosen: Tensor) -> Posterior:
        """The posterior of the n chosen positions, of shape (n,).

        Args:
            chosen: (B, L), bool.
        """
        return self._of(self.hidden[chosen])

    def _of(self, hidden: Tensor) -> Posterior:
        """The posterior of other hidden states."""
        out = copy.copy(self)
        out.hidden = hidden
        return out

    def _slices(self) -> Iterator[slice]:
        n = self.hidden[..., 0].numel()
        size = max(1, CHUNK_ELEMENTS // self.embedding.shape[0])
        return (slice(i, min(i + size, n)) for i in range(0, max(n, 1), size))  # of no positions, one of none

    def _logits(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden)

    def _largest(self, hidden: Tensor) -> Tensor:
        """The likeliest token of each hidden state. A pass over V less where only a soft cap would be taken."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (self.head.uncapped if isinstance(self.head, Head) else self.head)(hidden).argmax(-1)

    def _probs(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def _chunked(self, fn: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Apply fn(hidden rows, rows) over chunks."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        parts = in_chunks(lambda rows: fn(hidden[rows], rows), ((rows,) for rows in self._slices()))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(*self.shape, *out.shape[1:])

    def map(self, fn: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """fn(logits (n, V), rows) of parts of the flattened positions, its answers (n, ...) joined into (B, L, ...).

        For what is a sum over the vocabulary and needs no tensor of its size.
        """
        return self._chunked(lambda h, rows: fn(self._logits(h), rows))

    def probs_at(self, rows: slice) -> Tensor:
        with torch.no_grad():
            hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[rows]
            return self._probs(self._logits(hidden))

    def log_probs_at(self, rows: slice) -> Tensor:
        """log p (n, V) of positions `rows` of the flattened (B·L), float32 and without gradient."""
        with torch.no_grad():
            hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[rows]
            return self._logits(hidden).log_softmax(-1)

    def log_probs(self) -> Tensor:
        """log p, float32 (B, L, V). The one method that makes a tensor of that size."""
        return self._chunked(lambda h, _: self._logits(h).log_softmax(-1))

    def embed(self, temperature: float = 1.0) -> Tensor:
        """The posterior mean of the state, softmax(logits / temperature)·E (B, L, d), in float32.

        As wide a product as the head's, it is done in the hidden states' dtype like that one: in bfloat16 the mean is
        off by some .2 % of a token's embedding, while the state has that little noise only at t > .998.
        """
        dtype = self.hidden.dtype if self.hidden.dtype.itemsize < 4 else torch.float32

        def chunk(h: Tensor, _: slice) -> Tensor:
            logits = self._logits(h)
            probs = self._probs(logits if temperature == 1 else logits / temperature)
            return _state_of(probs, self.embedding, dtype).float()

        return self._chunked(chunk)

    def tokens(self, rule: str = "argmax", uniform: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Token ids (B, L).

        Args:
            rule: "argmax", or "categorical", a draw in float64 by inversion.
            uniform: (B, L) float64 draws on [0, 1) for the categorical rule.
            temperature: of the categorical rule.
        """
        if rule == "argmax":
            return self._chunked(lambda h, _: self._largest(h))
        if rule != "categorical":
            raise ValueError(f"unknown last-step rule {rule!r}: use 'argmax' or 'categorical'")
        if uniform is None:
            raise ValueError("the categorical rule needs its uniform draws (B, L): pass uniform=")
        draws = uniform.reshape(-1)

        def chunk(h: Tensor, rows: slice) -> Tensor:
            weights = (self._logits(h).to(wide(h.device)) / temperature).softmax(-1)
            return categorical(weights, draws[rows])

        return self._chunked(chunk)

    def cross_entropy(self, target: Tensor | Target) -> Tensor:
        """-Σ_k target_k log p_k at each position (B, L), float32; the target carries no gradient.

        Args:
            target: token ids (B, L), or a distribution (a Posterior, a Mixture).
        """
        if isinstance(target, Tensor):
            ids = target.reshape(-1)
            return self._chunked(
                lambda h, rows: F.cross_entropy(self._logits(h), ids[rows], reduction="none")
            )
        return self._chunked(
            lambda h, rows: -(target.probs_at(rows) * self._logits(h).log_softmax(-1)).sum(-1)
        )

    def squared_error(self, target: Tensor | Target) -> Tensor:
        """Σ_k (p_k - target_k)² at each position (B, L), float32; the target carries no gradient.

        Args:
            target: token ids (B, L), a distribution, or what is one only in the end.
        """
        if isinstance(target, Tensor):
            target = OneHot(target, len(self.embedding))
        return self._chunked(
            lambda h, rows: (self._probs(self._logits(h)) - target.probs_at(rows)).square().sum(-1)
        )

    def squared_distance(self, other: Posterior) -> Tensor:
        """Σ_k (p_k - q_k)² to another posterior of the same head, (B, L), float32, with a gradient to both."""
        beside = other.hidden.reshape(-1, other.hidden.shape[-1])
        return self._chunked(
            lambda h, rows: (
                (self._probs(self._logits(h)) - self._probs(self._logits(beside[rows]))).square().sum(-1)
            )
        )


class Regression(Posterior):
    """The mean of the one-hot token itself at each position, as a regression gives it: what the head says, which may
    lie outside the simplex. It has no log-probabilities and no temperature."""

    def _probs(self, logits: Tensor) -> Tensor:
        return logits

    def embed(self, temperature: float = 1.0) -> Tensor:
        self._only(temperature == 1, f"temperature = {temperature}", "temperature = 1")
        return super().embed()

    def tokens(self, rule: str = "argmax", uniform: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        self._only(rule == "argmax", f"last = {rule!r}", "last = 'argmax'")
        return super().tokens()

    def log_probs(self) -> Tensor:
        raise self._none("a log-probability", "its tokens, or model.output = 'softmax'")

    def log_probs_at(self, rows: slice) -> Tensor:
        raise self._none("a log-probability", "its tokens, or model.output = 'softmax'")

    def cross_entropy(self, target: Tensor | Target) -> Tensor:
        raise self._none("flow.loss = 'cross-entropy'", "flow.loss = 'squared-error'")

    def _only(self, right: bool, asked: str, fix: str) -> None:
        if not right:
            raise self._none(asked, fix)

    @staticmethod
    def _none(asked: str, fix: str) -> ValueError:
        return ValueError(
            f"{asked} is of probabilities, and a network with model.output = 'linear' gives none: use {fix}"
        )


class Mixture:
    """Σ_i w_i p_i of posteriors over the same positions; the weights (B,) or (B, L) sum to 1."""

    def __init__(self, parts: Sequence[tuple[Tensor, Posterior]]):
        shape = parts[0][1].shape
        self.parts = [
            # float32, as every target: float64 weights would carry the whole cross-entropy to float64.
            (w.float().reshape(w.shape + (1,) * (len(shape) - w.dim())).expand(shape).reshape(-1, 1), p)
            for w, p in parts
        ]

    def probs_at(self, rows: slice) -> Tensor:
        out = None
        for weight, part in self.parts:
            term = weight[rows] * part.probs_at(rows)
            out = term if out is None else out + term
        assert out is not None
        return out


class Stacked:
    """Targets over consecutive rows of one batch, each a Target with its share of flattened positions."""

    def __init__(self, parts: Sequence[tuple[int, Target]]):
        self.parts = parts

    def probs_at(self, rows: slice) -> Tensor:
        out, start = [], 0
        for size, part in self.parts:
            low, high = max(rows.start - start, 0), min(rows.stop - start, size)
            if low < high:
                out.append(part.probs_at(slice(low, high)))
            start += size
        return torch.cat(out)


class OneHot:
    """Token ids (B, L) as a distribution."""

    def __init__(self, tokens: Tensor, vocab_size: int):
        self.tokens, self.vocab_size = tokens.reshape(-1), vocab_size

    def probs_at(self, rows: slice) -> Tensor:
        return F.one_hot(self.tokens[rows], self.vocab_size).float()
