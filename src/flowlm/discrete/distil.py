"""What the few-step students of the discrete families minimise: a divergence from a target that their teacher makes.

KL(student ‖ target) = Σ_k p_k (log p_k - log target_k)        (SDTT, Duo's discrete consistency distillation)
"""

from __future__ import annotations

from torch import Tensor

from flowlm.posterior import Posterior, Target

#: Below it a target's probability counts as this: the divergence stays finite where a teacher is certain.
LEAST = 1e-9


def divergence(student: Posterior, target: Target) -> Tensor:
    """KL(student ‖ target) at each position (B, L), float32; no gradient passes to the target."""

    def rows_of(logits: Tensor, rows: slice) -> Tensor:
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * (log_p - target.probs_at(rows).clamp_min(LEAST).log())).sum(-1)

    return student.map(rows_of)
