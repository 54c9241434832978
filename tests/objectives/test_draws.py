"""Random times: stratified, and shares rounded without bias."""

from __future__ import annotations

import pytest
import torch

from flowlm.objectives.draws import stochastic_round, stratified


@pytest.mark.parametrize("num", [1, 2, 7, 512])
def test_one_draw_in_each_cell(num: int) -> None:
    draws = stratified(num, torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float64
    assert torch.equal((draws * num).long().sort().values, torch.arange(num))


def test_no_draws() -> None:
    assert stratified(0, torch.Generator()).shape == (0,)


def test_rows_are_uniform_whatever_their_place() -> None:
    """Row 0 of many batches: uniform, so a row's time does not depend on where it stands."""
    gen = torch.Generator().manual_seed(0)
    first = torch.stack([stratified(8, gen)[0] for _ in range(8000)])
    counts = torch.histc(first, 16, 0, 1)
    assert ((counts - 500).square() / 500).sum() < 39.3  # χ², 15 degrees of freedom, 99.94 %
    within = (first * 8).frac()
    assert (torch.histc(within, 10, 0, 1) - 800).square().sum() / 800 < 29.7  # 9 degrees


@pytest.mark.parametrize("value", [0.0, 0.03, 0.5, 2.0, 7.9])
def test_rounding_keeps_the_mean(value: float) -> None:
    gen = torch.Generator().manual_seed(0)
    draws = torch.tensor([stochastic_round(value, gen) for _ in range(20_000)]).double()
    share = value - int(value)
    assert set(draws.tolist()) <= {float(int(value)), float(int(value) + 1)}
    assert abs(float(draws.mean()) - value) <= 4 * (share * (1 - share) / 20_000) ** 0.5
