"""The network of the discrete families: the same transformer as the denoiser's, reading tokens in place of a state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm.backbone import Backbone, BackboneConfig, KVCache, TimeEmbedding
from flowlm.posterior import Head, Posterior


class TokenNetwork(nn.Module):
    """Embedding, backbone and head over V tokens, and one more that is only read: the mask, or the beginning.

    Args:
        vocab_size: V.
        length: L.
        config: shape and choices of the transformer.
        causal: whether a position sees only those before it.
        timed: whether it reads a time; a mask says by itself how noisy a passage is.
        extra: tokens that are read and never written, numbered from V.
        embedding_scale: entries of the embedding start uniform in ±scale/√d.
        tied: share the head's weight with the embedding.
        softcap: of the logits; 0 for none.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        config: BackboneConfig,
        *,
        causal: bool = False,
        timed: bool = False,
        extra: int = 1,
        embedding_scale: float = 3.0,
        tied: bool = False,
        softcap: float = 0.0,
    ):
        super().__init__()
        self.vocab_size, self.length, self.timed = vocab_size, length, timed
        bound = embedding_scale / config.width**0.5
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.width).uniform_(-bound, bound))
        if extra:
            self.extra = nn.Parameter(torch.empty(extra, config.width).uniform_(-bound, bound))
        self.backbone = Backbone(config, length, causal)
        if timed:
            self.time_embedding = TimeEmbedding(config.conditioning, config.time_scale)
        self.head = Head(config.width, vocab_size, softcap, self.embedding if tied else None)
        self.conditioning = config.conditioning

    def forward(
        self, tokens: Tensor, t: Tensor | None = None, cache: KVCache | None = None
    ) -> Posterior:
        """The posterior over V tokens at each position.

        Args:
            tokens: ids (B, L), those from V on being the extra ones; or their embedded mixture (B, L, d).
            t: times (B,), if it is timed.
            cache: of the positions before these, if it is causal.
        """
        if tokens.is_floating_point():
            h = tokens
        else:
            table = torch.cat([self.embedding, self.extra]) if hasattr(self, "extra") else self.embedding
            h = F.embedding(tokens, table)
        if self.timed:
            assert t is not None, "this network reads the time"
            with torch.autocast(h.device.type, enabled=False):
                cond = self.time_embedding(t.float().expand(len(h)))
        else:
            # Its modulations are then their biases: gains and shifts that are learned, and the same for all.
            cond = h.new_zeros(len(h), 1, self.conditioning)
        cond = F.silu(cond)
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)
            h, cond = h.to(dtype), cond.to(dtype)
        return Posterior(self.backbone(h, cond, cache).to(h.dtype), self.head, self.embedding)
