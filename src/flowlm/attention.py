"""Attention behind one function: every back end gives the same answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "math")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float = 0.0,
    backend: str = "auto",
    causal: bool = False,
) -> Tensor:
    """softmax(cap(q kᵀ/√h)) v over the whole sequence: both ways, or causal.

    Args:
        q: (B, heads, L, h).
        k, v: (B, heads, K, h); K = L unless causal.
        causal: each query sees the keys up to its own position, the queries being the last L of K positions.
        softcap: c > 0 replaces each score a by c·tanh(a/c); 0 leaves scores alone.
        backend: "sdpa", torch's fused kernels; "math", plain products, which also have a forward-mode
            derivative and soft caps; "auto", plain products for bfloat16 on a CPU, where the fused kernel's
            backward pass is slow, else the fused kernels. Soft-capped scores always take the plain products.

    Raises:
        ValueError: unknown back end.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention back end {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "math" if q.device.type == "cpu" and q.dtype == torch.bfloat16 else "sdpa"
    new, known = q.shape[-2], k.shape[-2]
    masked = causal and new > 1  # a single query at the end sees every key
    if backend == "sdpa" and not softcap:
        if not masked or new == known:
            return F.scaled_dot_product_attention(q, k, v, is_causal=masked)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_causal_mask(new, known, q.device))
    # Autocast would run the softmax in float32 and copy the scores twice; torch's bfloat16 softmax already
    # accumulates in float32.
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if masked:
            scores = scores.masked_fill(~_causal_mask(new, known, q.device), float("-inf"))
        return scores.softmax(-1) @ v


def _causal_mask(new: int, known: int, device: torch.device) -> Tensor:
    """(new, known) of which queries see which keys."""
    return torch.ones(new, known, dtype=torch.bool, device=device).tril(known - new)
