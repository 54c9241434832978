"""The local posterior: what each position says by itself about its own token, shown to the network beside the state.

    p(k | y_l) ∝ π_l(k) p(y_l | k)      π_l a learned prior of the position, the likelihood in closed form

It is the exact denoiser of a law under which positions are independent. A state is noise for most of its way and its
embedding blurred; this is sharp, and leaves to the network what only the other positions can tell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm.path import evidence_features
from flowlm.posterior import Posterior


class LocalPosterior(nn.Module):
    """softmax(log-likelihood + log-prior)·E' at each position, E' an embedding of its own.

    Args:
        embedding: E (V, d), where E' starts.
        length: L, positions that have a prior.
        conditioning: width of the time conditioning.
        rank: r of the log-priors P Uᵀ + bias, P (L, r), U (V, r); 0 for one prior everywhere. All start flat.
    """

    def __init__(self, embedding: Tensor, length: int, conditioning: int, rank: int):
        super().__init__()
        self.embedding = nn.Parameter(embedding.detach().clone())
        self.bias = nn.Parameter(torch.zeros(len(embedding)))
        if rank:
            self.prior_positions = nn.Parameter(torch.randn(length, rank))
            self.prior_tokens = nn.Parameter(torch.zeros(len(embedding), rank))
        self.gain = nn.Linear(conditioning, 1)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)
        self.rank = rank

    def forward(self, y: Tensor, s: Tensor, cond: Tensor, weights: Tensor) -> Tensor:
        """(B, L, d), a statistic of the state: no gradient passes to y or E.

        The gain on y is the likelihood's and a learned function of the times, zero at the start: at s = 0 the
        likelihood is flat, but a flow map must see in the noise which tokens it leads to.

        Args:
            y: state (B, L, d).
            s: flow times (B,) or (B, L).
            cond: time conditioning (B, 1|L, C).
            weights: `flowlm.path.evidence_weights` of E.
        """
        device = y.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
        rows = weights.to(dtype)
        tokens = self.prior_tokens.to(dtype) if self.rank else None

        def head(features: Tensor) -> Tensor:
            evidence, position = features.tensor_split([rows.shape[1]], -1)
            logits = F.linear(evidence, rows, self.bias.to(dtype))
            return (logits if tokens is None else logits.addmm_(position, tokens.T)).float()

        with torch.autocast(device, enabled=False):
            # Tangents (forward mode) pass, gradients do not.
            seen = y.detach() if torch.is_grad_enabled() else y
            features = evidence_features(seen, s, self.gain(cond)).to(dtype)
            if self.rank:
                positions = self.prior_positions[: y.shape[1]].to(dtype)
                features = torch.cat([features, positions.expand(len(y), -1, -1)], -1)
        return Posterior(features, head, self.embedding).embed(dtype=dtype)
