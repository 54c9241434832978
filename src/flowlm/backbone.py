"""The transformer: a DiT with adaLN-zero conditioning, embeddings and head left outside.

Reference architecture of Flow Map Language Models (arXiv 2602.16813, appendix): pre-norm blocks whose
shift, scale and gate come from the time embedding, rotary positions, soft-capped attention scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlm.attention import BACKENDS, attention


@dataclass(frozen=True)
class BackboneConfig:
    """Shape and choices of the transformer."""

    width: int = 256
    """d, the width of the residual stream and of the state y = xE."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 4
    """Attention heads; must divide width."""
    conditioning: int = 128
    """Width of the time conditioning vector."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLP over width."""
    activation: str = "relu2"
    """"gelu" (tanh form, as published) or "relu2" (squared ReLU, cheaper)."""
    dropout: float = 0.0
    """Dropout after attention and MLP, before the gate."""
    attention_softcap: float = 0.0
    """Scores a become c·tanh(a/c); 0 for none (the published models use 50)."""
    attention_backend: str = "auto"
    """"sdpa" (fused kernels), "math" (plain products, with a forward-mode derivative), or "auto" (the faster)."""
    norm: str = "layer"
    """"layer" (LayerNorm without bias) or "rms"."""
    position: str = "learned"
    """"rotary", "learned" (absolute), or "both"."""
    position_scale: float = 0.5
    """Standard deviation of learned positions at the start; of the order of the noisy state's own."""
    qk_norm: bool = True
    """Normalise queries and keys per head (RMS); learns agreement over a distance sooner."""
    time_scale: float = 1.0
    """Multiplies τ before its sinusoidal embedding; the published models use 1."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "depth", "conditioning", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.backbone.{name} must be positive, got {getattr(self, name)}")
        if self.attention_softcap < 0:
            raise ValueError(
                f"model.backbone.attention_softcap cannot be negative, got {self.attention_softcap}: 0 is none"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.backbone.dropout must lie in [0, 1), got {self.dropout}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model.backbone: width {self.width} over {self.heads} heads must be a whole, even head width "
                "(rotary positions turn pairs): change width or heads"
            )
        for name, value, choices in (
            ("norm", self.norm, ("layer", "rms")),
            ("position", self.position, ("rotary", "learned", "both")),
            ("activation", self.activation, ("gelu", "relu2")),
            ("attention_backend", self.attention_backend, BACKENDS),
        ):
            if value not in choices:
                raise ValueError(f"model.backbone.{name} = {value!r} is not one of {', '.join(choices)}")


class TimeEmbedding(nn.Module):
    """256 sinusoids of clock time τ, unscaled as in the published models, through a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int, scale: float, *, zero: bool = False):
        super().__init__()
        self.register_buffer(
            "frequencies", scale * torch.exp(-math.log(1e4) * torch.arange(128) / 128), persistent=False
        )
        last = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), last)

    def forward(self, tau: Tensor) -> Tensor:
        """(B,) or (B, L) -> (B, 1, C) or (B, L, C)."""
        angle = tau.float()[..., None] * self.frequencies
        out = self.mlp(torch.cat([angle.cos(), angle.sin()], -1))
        return out[:, None] if out.dim() == 2 else out


class Norm(nn.Module):
    """LayerNorm without bias, or RMSNorm; eps 1e-5."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-5)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, 1e-5)


def rotary_tables(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (L, h) of rotary positions, base 1e4, halves convention."""
    freq = 1e4 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angle = torch.arange(length, device=device)[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+h/2}) of x (..., L, h) by its position's angle."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class KVCache:
    """Keys and values of the positions that a causal backbone has read, for it to go on from.

    Args:
        backbone: whose; batch: rows; dtype: of keys and values.
    """

    def __init__(self, backbone: Backbone, batch: int, device: torch.device, dtype: torch.dtype):
        cfg = backbone.config
        shape = (2, batch, cfg.heads, backbone.length, cfg.width // cfg.heads)
        self.blocks = [torch.empty(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.length = 0
        """Positions read so far."""

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, with these, of the next ones, after those of before."""
        end = self.length + k.shape[2]
        held = self.blocks[block]
        held[0, :, :, self.length : end] = k
        held[1, :, :, self.length : end] = v
        return held[0, :, :, :end], held[1, :, :, :end]


class Block(nn.Module):
    """x + gate·attention(mod(norm x)), then x + gate·MLP(mod(norm x)), with mod(h) = h (1 + scale) + shift."""

    def __init__(self, config: BackboneConfig, index: int = 0, causal: bool = False):
        super().__init__()
        d, hidden = config.width, int(config.width * config.mlp_ratio)
        self.config, self.index, self.causal = config, index, causal
        self.norm1, self.norm2 = Norm(d, config.norm), Norm(d, config.norm)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.modulation = nn.Linear(config.conditioning, 6 * d)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, cond: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None
    ) -> Tensor:
        cfg = self.config
        b, length, d = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, -1)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = self.qkv(h).view(b, length, 3, cfg.heads, d // cfg.heads).permute(2, 0, 3, 1, 4)
        if cfg.qk_norm:
            # Autocast may norm in float32: queries and keys go on in the dtype of the values.
            q, k = (F.rms_norm(x, x.shape[-1:]).to(v.dtype) for x in (q, k))
        if rotary is not None:
            cos, sin = (table.to(q.dtype) for table in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        h = attention(
            q, k, v, softcap=cfg.attention_softcap, backend=cfg.attention_backend, causal=self.causal
        )
        h = self.out(h.transpose(1, 2).reshape(b, length, d))
        x = torch.addcmul(x, gate1, F.dropout(h, cfg.dropout, self.training))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        h = self.up(h)
        h = self.down(F.gelu(h, approximate="tanh") if cfg.activation == "gelu" else F.relu(h).square())
        return torch.addcmul(x, gate2, F.dropout(h, cfg.dropout, self.training))


class Backbone(nn.Module):
    """The blocks and the final modulated norm: (h (B, L, d), cond (B, 1|L, C)) -> hidden (B, L, d).

    Args:
        config: shape and choices.
        length: longest sequence that learned positions cover.
        causal: whether a position sees only itself and those before it.
    """

    def __init__(self, config: BackboneConfig, length: int, causal: bool = False):
        super().__init__()
        self.config, self.length, self.causal = config, length, causal
        self.blocks = nn.ModuleList(Block(config, i, causal) for i in range(config.depth))
        self.norm = Norm(config.width, config.norm)
        self.modulation = nn.Linear(config.conditioning, 2 * config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        if config.position != "rotary":
            self.positions = nn.Parameter(config.position_scale * torch.randn(length, config.width))

    def forward(self, h: Tensor, cond: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states of the positions in h, which follow those that a cache holds; the cache then holds them too.

        Raises:
            ValueError: more positions than are learned, or than a cache holds; a cache for a backbone that looks
                both ways.
        """
        cfg = self.config
        if cache is not None and not self.causal:
            raise ValueError(
                "a cache is for a causal backbone: one that looks both ways reads all of it again"
            )
        start = 0 if cache is None else cache.length
        length = start + h.shape[1]
        if (cfg.position != "rotary" or cache is not None) and length > self.length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {self.length} learned positions: "
                "train with model.length at least as large, or model.backbone.position = 'rotary'"
            )
        if cfg.position != "rotary":
            h = h + self.positions[start:length].to(h.dtype)
        rotary = None
        if cfg.position != "learned":
            cos, sin = rotary_tables(length, cfg.width // cfg.heads, h.device)
            rotary = cos[start:], sin[start:]
        for block in self.blocks:
            h = block(h, cond, rotary, cache)
        if cache is not None:
            cache.length = length
        shift, scale = self.modulation(cond).chunk(2, -1)
        return torch.addcmul(shift, self.norm(h), 1 + scale)
