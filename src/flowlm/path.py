"""The path from noise to data, in the low-rank state.

The flow lives on one-hot sequences: x_t = (1-t) z + t·onehot(tokens), z ~ N(0, I) in R^{L×V}. The network
reads x only through y = x E with the embedding E (V, d), every update of a sampler is affine in x, and the
last step takes the posterior's tokens. So the state carried is y (B, L, d), and x is never made.

Shapes: tokens (B, L), states and embedded posteriors (B, L, d), times scalar, (B,) or (B, L).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from flowlm.device import wide, widened


def times_like(t: Tensor | float, y: Tensor) -> Tensor:
    """Times (scalar, (B,) or (B, L)) shaped to multiply a state (B, L, d), in at least float32."""
    # A number is filled in there: to copy it from the host would wait for the device.
    t = t.to(y.device) if isinstance(t, Tensor) else torch.full((), t, device=y.device)
    if not t.is_floating_point():
        t = t.to(y.dtype)
    return t.reshape(t.shape + (1,) * (y.dim() - t.dim())) if t.dim() else t


class DenseNoise:
    """y_0 = z E with z ~ N(0, I_V) drawn itself: the choice for small vocabularies (V ≤ 2d).

    The gradient in E is the dense formulation's.
    """

    def __init__(self, embedding: Tensor):
        self.embedding = embedding
        self.width = embedding.shape[0]

    def __call__(self, xi: Tensor) -> Tensor:
        """Noise state (B, L, d) from standard normals xi (B, L, width)."""
        return _product(xi, self.embedding)


class LowRankNoise:
    """y_0 = ξ Cᵀ with C Cᵀ = G = EᵀE and ξ ~ N(0, I_d): the law of z E without z. For V > 2d.

    The gradient in E is that of the dense formulation given y_0: z is replaced by its conditional mean,
    y_0 = sg(ξCᵀ)·M with M = sg(G)⁻¹ sg(E)ᵀE, whose value is the identity. As sg(Cᵀ)M = C⁻¹ sg(E)ᵀE this costs
    nothing beyond the one product. Right for every loss, also where a stop-gradient target reads the same
    noise, and no gradient passes through the Cholesky factor.
    """

    def __init__(self, embedding: Tensor):
        self.width = embedding.shape[1]
        frozen = embedding.detach().float()
        with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False):
            inverse_factor = _inverse_factor(frozen)
        with torch.autocast(embedding.device.type, enabled=False):
            self.factor = inverse_factor @ (frozen.T @ embedding)

    def __call__(self, xi: Tensor) -> Tensor:
        """Noise state (B, L, d) from standard normals xi (B, L, width)."""
        return _product(xi, self.factor)


class IsotropicNoise:
    """y_0 = ξ itself, ξ ~ N(0, I_d): the law of a flow on embeddings, which is none on one-hot tokens.

    Its state is y_t = (1-t) ξ + t E[token]. Rows of E of length 1 are as far from the noise as one-hot tokens are.
    """

    def __init__(self, embedding: Tensor):
        self.width = embedding.shape[1]

    def __call__(self, xi: Tensor) -> Tensor:
        """Noise state (B, L, d) from standard normals xi (B, L, width)."""
        return xi


class CoupledDenseNoise:
    """One z seen through two embeddings, drawn itself (V ≤ 2d)."""

    def __init__(self, first: Tensor, second: Tensor):
        self.first, self.second = first.detach(), second
        self.width = first.shape[0]

    def __call__(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        return _product(xi, self.first), _product(xi, self.second)


class CoupledLowRankNoise:
    """One z seen through a frozen embedding E₁ (a teacher's) and a trained E₂ (a student's), without z.

        y₁ = ξ₁ C₁ᵀ,   y₂ = y₁ K + r,   K = G₁⁻¹E₁ᵀE₂,   Cov r = S = E₂ᵀE₂ - E₂ᵀE₁K

    S is the part of E₂ that E₁ does not determine (zero while student and teacher agree), factored by a
    clamped eigendecomposition without gradient; r's gradient in E₂ is carried by S⁺ sg(A)ᵀA, A = E₂ - E₁ sg(K).
    """

    def __init__(self, first: Tensor, second: Tensor):
        self.width, self._split = first.shape[1] + second.shape[1], first.shape[1]
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            self._first = first.detach().float()
            inverse_factor = _inverse_factor(self._first)
            self.first_factor = inverse_factor @ (self._first.T @ self._first)
            self._solve = inverse_factor.T @ inverse_factor @ self._first.T  # G₁⁻¹E₁ᵀ, (d, V)
        self._couple(second)

    def again(self, second: Tensor) -> CoupledLowRankNoise:
        """The same with another E₂, as after a step of its training: what follows from E₁ alone is kept."""
        law = copy.copy(self)
        law._couple(second)
        return law

    def _couple(self, second: Tensor) -> None:
        with torch.autocast(second.device.type, enabled=False):
            shared = self._solve @ second  # K
            with torch.no_grad():
                residual = second.detach().float() - self._first @ shared.detach()
                values, vectors = torch.linalg.eigh(widened(residual.T @ residual))
                # Eigenvalues below rounding are directions in which the two embeddings agree.
                scale = widened(second.detach()).square().sum()
                tiny = torch.finfo(values.dtype).tiny
                keep = values > (1e-10 * scale).clamp_min(tiny)
                inverse_root = torch.where(keep, values.clamp_min(tiny).rsqrt(), 0.0)
                # r = ξ₂ S^½ · S⁺ AᵀA, with S^½ S⁺ = S^{-½} folded into one factor.
                half = (inverse_root[:, None] * vectors.T).float()
            self.second_factor = self.first_factor @ shared
            innovation = residual + (second - second.detach())  # A: its value, and the gradient of E₂ alone
            self.residual_factor = half @ (residual.T @ innovation)

    def __call__(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """Two noise states (B, L, d₁), (B, L, d₂) of the same x from standard normals xi (B, L, width)."""
        a, b = xi[..., : self._split], xi[..., self._split :]
        second = _product(a, self.second_factor) + _product(b, self.residual_factor)
        return _product(a, self.first_factor), second


#: Closest approach to the data of `evidence_gains`: by 1-t = .02 a token's own state has settled what it is.
EVIDENCE_CUT = 0.02


def evidence_weights(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """w_k = G⁺e_k (V, d) and -½ w_k·e_k (V,), with G = EᵀE, for the log-likelihood of a token.

    The state of one position is y_t ~ N(t e_k, (1-t)² G) if its token is k, so

        log p(y_t | k) = t/(1-t)² w_k·y_t - ½ t²/(1-t)² w_k·e_k + const

    With V ≤ d independent rows, w_k·y is coordinate k of the state x itself.
    """
    with torch.no_grad(), torch.autocast(embedding.device.type, enabled=False):
        e = embedding.detach().float()
        if e.shape[0] > e.shape[1]:
            inverse_factor = _inverse_factor(e)
            w = (e @ inverse_factor.T) @ inverse_factor
        else:
            inverse_factor = _inverse_factor(e.T)
            w = inverse_factor.T @ (inverse_factor @ e)
        return w, -0.5 * (w * e).sum(-1)


def isotropic_evidence_weights(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """e_k (V, d) and -½ e_k·e_k (V,): as `evidence_weights`, under `IsotropicNoise`."""
    with torch.no_grad():
        e = embedding.detach().float()
        return e, -0.5 * e.square().sum(-1)


def evidence_gains(t: Tensor | float, y: Tensor) -> tuple[Tensor, Tensor]:
    """t/(1-t)² and t²/(1-t)², what `evidence_weights` are multiplied by, shaped to multiply a state y (B, L, d)."""
    t = times_like(t, y).to(y.dtype).clamp(max=1 - EVIDENCE_CUT)
    gain = t / (1 - t).square()
    return gain, gain * t


def _product(xi: Tensor, matrix: Tensor) -> Tensor:
    """ξ·matrix in full precision: autocast would round the noise state."""
    with torch.autocast(xi.device.type, enabled=False):
        return xi @ matrix


def _inverse_factor(embedding: Tensor) -> Tensor:
    """C⁻¹ of the lower Cholesky factor C of EᵀE, in float64, returned in float32."""
    gram = (embedding.T @ embedding).to(wide(embedding.device))
    # float32 rounding of the Gram can push its smallest eigenvalues below zero: a relative 1e-7 on the
    # diagonal is of the size of that rounding.
    gram.diagonal().add_(1e-7 * gram.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    # A failed factorisation (info > 0) turns into NaN, which stops the run with a message, without a sync here.
    return torch.where(info > 0, float("nan"), inverse).float()


def noise_law(embedding: Tensor) -> DenseNoise | LowRankNoise:
    """The law of y_0 = zE for this embedding: dense when V ≤ 2d (its Gram may be singular), else low-rank."""
    vocab, width = embedding.shape
    return DenseNoise(embedding) if vocab <= 2 * width else LowRankNoise(embedding)


def coupled_noise_law(first: Tensor, second: Tensor) -> CoupledDenseNoise | CoupledLowRankNoise:
    """The law of (zE₁, zE₂), E₁ frozen; dense when V ≤ 2d for either."""
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"two embeddings of one state need one vocabulary, got V={first.shape[0]} and V={second.shape[0]}"
        )
    dense = first.shape[0] <= 2 * max(first.shape[1], second.shape[1])
    return CoupledDenseNoise(first, second) if dense else CoupledLowRankNoise(first, second)


def corrupt(tokens: Tensor, t: Tensor | float, embedding: Tensor, noise: Tensor) -> Tensor:
    """The interpolant y_t = (1-t) y_0 + t E[tokens].

    Args:
        tokens: (B, L) token ids.
        t: flow times.
        embedding: E (V, d).
        noise: the noise state y_0 (B, L, d), from a noise law.
    """
    clean = torch.nn.functional.embedding(tokens, embedding)
    t = times_like(t, clean).to(clean.dtype)
    return (1 - t) * noise + t * clean


def step(y: Tensor, d: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """The flow-map step X_{s,t}(y) = ((1-t) y + (t-s) d)/(1-s), with d = δ_{s,t}(y) embedded; y where s = 1.

    With d = D_s(y) it is Euler's step of the flow.
    """
    s, t = times_like(s, y), times_like(t, y)
    left = 1 - s
    done = left <= 0
    h = ((t - s) / torch.where(done, torch.ones_like(left), left)).masked_fill(done, 0.0).to(y.dtype)
    return (1 - h) * y + h * d


def velocity(y: Tensor, d: Tensor, t: Tensor | float) -> Tensor:
    """b_t(y) = (D_t(y) - y)/(1-t), for t < 1."""
    return (d - y) / (1 - times_like(t, y)).to(y.dtype)


def renoise_times(t: Tensor | float, gamma: float) -> Tensor:
    """The γ-sampler's intermediate time t̃ = 1 - (1-t')√(1-γ²) of a step that ends at t'."""
    return 1 - (1 - torch.as_tensor(t)) * (1 - gamma * gamma) ** 0.5


def renoise(
    y: Tensor, d: Tensor, noise: Tensor, t: Tensor | float, t_mid: Tensor | float, gamma: float
) -> Tensor:
    """From X_{·,t̃} back to noise level t': y + (σ̃-σ) d + γσ y_0, σ = 1-t', σ̃ = 1-t̃.

    Args:
        y: the state at t̃.
        d: δ_{·,t̃} embedded, the posterior that led there.
        noise: fresh noise state y_0.
        t: t'.
        t_mid: t̃.
        gamma: share of re-noising in [0, 1]; 0 leaves y as it is.
    """
    sigma = (1 - times_like(t, y)).to(y.dtype)
    sigma_mid = (1 - times_like(t_mid, y)).to(y.dtype)
    return y + (sigma_mid - sigma) * d + gamma * sigma * noise
