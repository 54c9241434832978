"""The Fréchet distance against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from flowlm.evaluation.frechet import frechet_distance

RNG = np.random.default_rng(0)


def standard(num: int, width: int) -> np.ndarray:
    """Features of mean exactly 0 and covariance exactly 1."""
    raw = RNG.normal(size=(num, width))
    raw -= raw.mean(0)
    values, vectors = np.linalg.eigh(raw.T @ raw / (num - 1))
    whitened: np.ndarray = raw @ (vectors / np.sqrt(values))
    return whitened


def test_equal_sets_are_at_zero() -> None:
    features = RNG.normal(size=(50, 8)) @ RNG.normal(size=(8, 8))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)


def test_a_shift_is_its_squared_length() -> None:
    features = RNG.normal(size=(50, 8))
    shift = RNG.normal(size=8)
    assert frechet_distance(features, features + shift) == pytest.approx(shift @ shift)


def test_diagonal_covariances() -> None:
    """sum (s_i - r_i)², s and r the standard deviations."""
    a, b = standard(60, 5), standard(80, 5)
    s, r = np.array([1.0, 2, 3, 0, 0.5]), np.array([2.0, 2, 1, 1, 0])
    assert frechet_distance(a * s, b * r) == pytest.approx(((s - r) ** 2).sum())


def test_covariances_that_do_not_commute() -> None:
    """A turn of both changes nothing, of one: tr (S^½ R S^½)^½ of two-by-two matrices is √(tr SR + 2√det SR)."""
    a, b = standard(40, 2), standard(40, 2)
    left, right = RNG.normal(size=(2, 2, 2))
    s, r = left.T @ left, right.T @ right
    cross = np.sqrt(np.trace(s @ r) + 2 * np.sqrt(np.linalg.det(s @ r)))
    assert frechet_distance(a @ left, b @ right) == pytest.approx(np.trace(s) + np.trace(r) - 2 * cross)
    turn = np.linalg.qr(RNG.normal(size=(2, 2)))[0]
    assert frechet_distance(a @ left @ turn, b @ right @ turn) == pytest.approx(
        frechet_distance(a @ left, b @ right)
    )
    assert frechet_distance(a @ left, b @ right) == pytest.approx(frechet_distance(b @ right, a @ left))


def test_it_depends_on_the_number_of_texts() -> None:
    """Two samples of one law: the distance falls about as 1/n."""
    few, many = (
        np.mean([frechet_distance(RNG.normal(size=(n, 4)), RNG.normal(size=(n, 4))) for _ in range(40)])
        for n in (50, 400)
    )
    assert few / many == pytest.approx(8, rel=0.35)
    # fewer texts than features: singular covariances, and still a number
    assert frechet_distance(RNG.normal(size=(3, 10)), RNG.normal(size=(3, 10))) > 0


def test_refusals() -> None:
    two = np.zeros((2, 3))
    for a, b, message in (
        (two[:1], two, "the first set has 1 text: a covariance needs at least two"),
        (two, two[:0], "the second set has 0 texts"),
        (two, np.zeros((2, 4)), "widths 3 and 4 do not compare"),
        (two, np.zeros(3), r"the second set has shape \(3,\)"),
        (two + np.nan, two, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(a, b)
