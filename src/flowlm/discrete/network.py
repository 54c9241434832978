"""The network of the discrete families: the same transformer as the denoiser's, reading tokens in place of a state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm.backbone import Backbone, KVCache, TimeEmbedding
from flowlm.denoiser import DenoiserConfig, check_size
from flowlm.posterior import Head, Posterior

#: λ is multiplied by it before its sinusoids. Time's own would be too smooth to tell many latents apart, and with the
#: 1000 of the paper's code neighbours have nothing in common: on the toy of the tests it learns later.
LATENT_SCALE = 100.0


class TokenNetwork(nn.Module):
    """Embedding, backbone and head over V tokens, and one more that is only read: the mask, or the beginning.

    Args:
        config: V, L, the transformer; what in it is for flows is not read.
        causal: whether a position sees only those before it.
        timed: whether it reads a time; a mask says by itself how noisy a passage is.
        extra: tokens that are read and never written, numbered from V.
        latent: whether it reads a latent of the whole passage, beside the time.

    Raises:
        ValueError: a vocabulary of fewer than two tokens, a passage of fewer than one.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        *,
        causal: bool = False,
        timed: bool = False,
        extra: int = 1,
        latent: bool = False,
    ):
        super().__init__()
        check_size(config)
        self.config, self.timed = config, timed
        width = config.backbone.width
        bound = config.embedding_scale / width**0.5
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, width).uniform_(-bound, bound))
        if extra:
            self.extra = nn.Parameter(torch.empty(extra, width).uniform_(-bound, bound))
        self.backbone = Backbone(config.backbone, config.length, causal)
        if timed:
            self.time_embedding = TimeEmbedding(config.backbone.conditioning, config.backbone.time_scale)
        self.head = Head(
            width, config.vocab_size, config.logit_softcap, self.embedding if config.tied_head else None
        )
        if latent:
            # With its teacher's weights it starts as the teacher. Where there is a time, the last layer is zero for
            # that; where there is none, the weights that read it have stayed zero, and two zeros would never learn.
            # Its entries are then of the order of 1: with those of small ones no latent differs enough from another
            # for what they have in common to be seen, and a mixture long stays the product it begins as.
            width = config.backbone.conditioning
            self.latent_embedding = TimeEmbedding(width, LATENT_SCALE, zero=timed)
            last = self.latent_embedding.mlp[-1]
            if not timed and isinstance(last, nn.Linear):
                nn.init.normal_(last.weight, std=4 / width**0.5)

    def forward(
        self,
        tokens: Tensor,
        t: Tensor | None = None,
        cache: KVCache | None = None,
        latent: Tensor | None = None,
    ) -> Posterior:
        """The posterior over V tokens at each position.

        Args:
            tokens: ids (B, L), those from V on being the extra ones; or their embedded mixture (B, L, d).
            t: times (B,), if it is timed.
            cache: of the positions before these, if it is causal.
            latent: λ in [0, 1) of each passage (B,), if it reads one.
        """
        if tokens.is_floating_point():
            h = tokens
        else:
            v = len(self.embedding)
            h = F.embedding(tokens.clamp_max(v - 1), self.embedding)
            if hasattr(self, "extra"):
                # Two look-ups: one table of both would be a copy of E at each call.
                h = torch.where(
                    (tokens >= v)[..., None], F.embedding((tokens - v).clamp_min(0), self.extra), h
                )
        if self.timed:
            assert t is not None, "this network reads the time"
            with torch.autocast(h.device.type, enabled=False):
                cond = self.time_embedding(t.float().expand(len(h)))
        else:
            # Its modulations are then their biases: gains and shifts that are learned, and the same for all.
            cond = h.new_zeros(len(h), 1, self.config.backbone.conditioning)
        if hasattr(self, "latent_embedding"):
            assert latent is not None, "this network reads a latent"
            with torch.autocast(h.device.type, enabled=False):
                cond = cond + self.latent_embedding(latent.float())
        cond = F.silu(cond)
        if torch.is_autocast_enabled(h.device.type):
            dtype = torch.get_autocast_dtype(h.device.type)
            h, cond = h.to(dtype), cond.to(dtype)
        return Posterior(self.backbone(h, cond, cache).to(h.dtype), self.head, self.embedding)
