"""The local posterior: what each position says by itself about its own token, shown to the network beside the state.

    p(k | y_l) ∝ π_l(k) p(y_l | k)      π_l a learned prior of the position, the likelihood in closed form

It is the exact denoiser of a law under which positions are independent. A state is noise for most of its way and its
embedding blurred; this is sharp, and leaves to the network what only the other positions can tell.

Of a large vocabulary it tells the most frequent tokens apart and takes the others as one, "none of these": a state
with no token in it, whose likelihood is that of k = none with w = 0. All of them would cost twice what the head does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm import posterior
from flowlm.path import evidence_gains
from flowlm.posterior import in_chunks, mean_state


class LocalPosterior(nn.Module):
    """softmax(log-likelihood + log-prior)·E' at each position, E' an embedding of its own.

    Args:
        embedding: E (V, d), where E' starts.
        told_apart: tokens that it tells apart; 0 for all of them.
        length: L, positions that have a prior.
        conditioning: width of the time conditioning.
        rank: r of the log-priors P Uᵀ + bias, P (L, r), U (V, r); 0 for one prior everywhere. All start flat.
    """

    tokens: Tensor

    def __init__(self, embedding: Tensor, length: int, conditioning: int, rank: int, told_apart: int = 0):
        super().__init__()
        self.partial = 0 < told_apart < len(embedding)
        if self.partial:
            self.register_buffer("tokens", torch.arange(told_apart))
        self.embedding = nn.Parameter(self._rows(embedding))
        self.bias = nn.Parameter(torch.zeros(len(self.embedding)))
        if rank:
            self.prior_positions = nn.Parameter(torch.randn(length, rank))
            self.prior_tokens = nn.Parameter(torch.zeros(len(self.embedding), rank))
        self.gain = nn.Linear(conditioning, 1)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)
        self.rank = rank

    @torch.no_grad()
    def _rows(self, embedding: Tensor) -> Tensor:
        """E' as it starts: rows of E, of the tokens that are told apart, and the mean of the others."""
        if not self.partial:
            return embedding.detach().clone()
        others = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
        others[self.tokens] = False
        return torch.cat([embedding[self.tokens], embedding[others].mean(0, keepdim=True)])

    @torch.no_grad()
    def tell_apart(self, passages: Tensor, embedding: Tensor) -> None:
        """Let it tell the most frequent tokens of passages (N, L) apart, starting from their rows of E."""
        if self.partial:
            counts = torch.bincount(passages.flatten(), minlength=len(embedding))
            # Of equals the first, on every device.
            order = counts.cpu().sort(descending=True, stable=True).indices
            self.tokens.copy_(order[: len(self.tokens)].sort().values)
            self.embedding.copy_(self._rows(embedding))

    def weights_of(self, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the evidence weights of all tokens, those of what it tells apart, and 0 for none of these."""
        if not self.partial:
            return weights
        w, offset = weights
        return F.pad(w[self.tokens], (0, 0, 0, 1)), F.pad(offset[self.tokens], (0, 1))

    def forward(self, y: Tensor, s: Tensor, cond: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """(B, L, d), a statistic of the state: no gradient passes to y or E.

        The gain on y is the likelihood's and a learned function of the times, zero at the start: at s = 0 the
        likelihood is flat, but a flow map must see in the noise which tokens it leads to.

        Args:
            y: state (B, L, d).
            s: flow times (B,) or (B, L).
            cond: time conditioning (B, 1|L, C).
            weights: `weights_of` `flowlm.path.evidence_weights` of E.
        """
        device = y.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
        with torch.autocast(device, enabled=False):
            # Tangents (forward mode) pass, gradients do not.
            seen = (y.detach() if torch.is_grad_enabled() else y).to(dtype)
            weight, offset = weights[0].to(dtype), weights[1]
            gain, offset_gain = evidence_gains(s, y)
            gain = (gain + self.gain(cond)).expand(*y.shape[:2], 1)
            offset_gain = offset_gain.expand(*y.shape[:2], 1)

            def mean(rows: slice, positions: slice) -> Tensor:
                # The two products with V columns come first, and each once: of states, which takes no gradient, and of
                # positions, the same for all rows. What learns is then elementwise, and its backward pass too.
                states = seen[rows, positions]
                # One product of two matrices: one of three dimensions may copy the weight for each row.
                evidence = F.linear(states.flatten(0, 1), weight).float().view(*states.shape[:2], -1)
                prior = self._prior(positions, dtype)
                logits = torch.addcmul(prior, gain[rows, positions], evidence)
                logits = logits.addcmul_(offset_gain[rows, positions], offset)
                return mean_state(logits.flatten(0, 1), self.embedding, dtype).view(states.shape)

            chunks = self._chunks(*y.shape[:2])
            parts = in_chunks(mean, [(rows, positions) for rows in chunks[0] for positions in chunks[1]])
        width = len(chunks[1])
        return torch.cat([torch.cat(parts[i : i + width], 1) for i in range(0, len(parts), width)])

    def _prior(self, positions: slice, dtype: torch.dtype) -> Tensor:
        """Log-priors of some positions, (n, V), or (1, V) where all have one."""
        if not self.rank:
            return self.bias[None]
        tokens = self.prior_tokens.to(dtype)
        return F.linear(self.prior_positions[positions].to(dtype), tokens, self.bias.to(dtype)).float()

    def _chunks(self, batch: int, length: int) -> tuple[list[slice], list[slice]]:
        """Slices of rows and of positions: all rows, for their prior is one, unless they alone exceed a chunk."""
        most = max(1, posterior.CHUNK_ELEMENTS // len(self.embedding))
        rows = min(batch, most)
        positions = most // rows
        return (
            [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)],
            [slice(i, min(i + positions, length)) for i in range(0, length, positions)],
        )
