"""How far a set of texts lies from another, as a causal model sees them (Heusel et al. 2017, on text as by
Semeniuta et al. 2018).

    F(a, b) = ‖m_a - m_b‖² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)

with means m and covariances S of the features of each: the squared Wasserstein distance of two Gaussians.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["frechet_distance"]

_Floats = NDArray[np.float64]


def frechet_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The distance of feature sets (n, d) and (m, d), at least 0.

    It depends on n: two samples of one law are not at 0, but at what chance in their means and covariances makes, which
    falls about as 1/n and rises with d; with n ≤ d the covariances are singular besides. Compare at equal n alone,
    and with the distance of one half of held-out text from the other, which is where a perfect model stands. Distances
    under different scorers do not compare.

    Raises:
        ValueError: fewer than two texts in a set, features of different widths, or not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for name, features in (("first", a), ("second", b)):
        if features.ndim != 2:
            raise ValueError(f"the {name} set has shape {features.shape}: features are (texts, width)")
        if len(features) < 2:
            raise ValueError(
                f"the {name} set has {len(features)} text{'s' * (len(features) != 1)}: a covariance needs at least two"
            )
        if not np.isfinite(features).all():
            raise ValueError(
                f"the {name} set has features that are not finite: the scorer overflows, use float32"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features of widths {a.shape[1]} and {b.shape[1]} do not compare: take both from one scorer"
        )
    apart = a.mean(0) - b.mean(0)
    ours, theirs = _covariance(a), _covariance(b)
    root = _root(ours)
    # of S_a^½ S_b S_a^½, whose eigenvalues are those of S_a S_b; rounding may leave them just below 0
    cross = np.sqrt(np.linalg.eigvalsh(root @ theirs @ root).clip(min=0)).sum()
    return max(0.0, float(apart @ apart + np.trace(ours) + np.trace(theirs) - 2 * cross))


def _covariance(features: _Floats) -> _Floats:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(matrix: _Floats) -> _Floats:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
