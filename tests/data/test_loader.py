"""Batches are a pure function of (seed, step)."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from flowlm.data.loader import Loader, permuted

SIZES = [(10, 3), (12, 4), (7, 1), (5, 12), (1, 4), (6, 6)]  # rows, batch


def _tokens(num: int, length: int = 4) -> np.ndarray:
    return np.arange(num * length, dtype=np.uint16).reshape(num, length)


def _chi_squared(counts: np.ndarray) -> float:
    """Against equal shares."""
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


@pytest.mark.parametrize(("num", "batch"), SIZES)
def test_every_epoch_has_every_row_once(num: int, batch: int) -> None:
    loader = Loader(_tokens(num), batch, seed=3)
    rows = np.concatenate([loader.rows(step) for step in range(-(-5 * num // batch))])
    for epoch in range(5):
        assert sorted(rows[epoch * num : (epoch + 1) * num]) == list(range(num))


@pytest.mark.parametrize(("num", "batch"), SIZES)
def test_any_order_of_steps_gives_the_same_rows(num: int, batch: int) -> None:
    loader = Loader(_tokens(num), batch, seed=3)
    sequential = [loader.rows(step) for step in range(20)]
    again = Loader(_tokens(num), batch, seed=3)
    for step in np.random.default_rng(0).permutation(20).tolist():
        np.testing.assert_array_equal(again.rows(step), sequential[step])
        np.testing.assert_array_equal(Loader(_tokens(num), batch, seed=3).rows(step), sequential[step])


def test_seeds_and_epochs_differ() -> None:
    loader = Loader(_tokens(100), 100, seed=0)
    orders = [loader.rows(0), loader.rows(1), Loader(_tokens(100), 100, seed=1).rows(0)]
    assert len({tuple(order) for order in orders}) == 3
    assert tuple(loader.rows(0)) != tuple(range(100))


def test_the_order_is_the_same_on_every_machine() -> None:
    assert Loader(_tokens(8), 8, seed=0).rows(0).tolist() == [1, 2, 0, 5, 7, 6, 3, 4]


def test_a_batch_runs_on_over_the_end_of_an_epoch() -> None:
    whole = Loader(_tokens(10), 10, seed=5)
    epochs = np.concatenate([whole.rows(0), whole.rows(1)])
    np.testing.assert_array_equal(Loader(_tokens(10), 4, seed=5).rows(2), epochs[8:12])


def test_a_batch_larger_than_the_corpus_spans_epochs() -> None:
    whole = Loader(_tokens(5), 5, seed=5)
    epochs = np.concatenate([whole.rows(step) for step in range(5)])
    np.testing.assert_array_equal(Loader(_tokens(5), 12, seed=5).rows(1), epochs[12:24])


def test_shards_together_are_the_whole() -> None:
    tokens = _tokens(10)
    loader = Loader(tokens, 6, seed=2)
    for step in range(4):
        whole = loader.batch(step)
        assert whole.dtype == torch.int64
        assert whole.shape == (6, 4)
        np.testing.assert_array_equal(whole.numpy(), tokens[loader.rows(step)])
        parts = [Loader(tokens, 6, seed=2).batch(step, a, a + 2) for a in (0, 2, 4)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_batch_is_a_copy() -> None:
    tokens = _tokens(4)
    loader = Loader(tokens.astype(np.int64), 4, seed=0)
    loader.batch(0).zero_()
    assert loader.batch(0).sum() == tokens.sum()


def test_late_steps_cost_nothing() -> None:
    assert len(Loader(_tokens(10), 4, seed=0).rows(10**9)) == 4


def test_memory_is_that_of_a_batch() -> None:
    """Of a corpus a thousand times larger too, whose order alone would take 800 MB."""
    peaks = []
    for num in (10**5, 10**8):
        tokens = np.broadcast_to(np.zeros((1, 2), np.uint16), (num, 2))
        tracemalloc.start()
        rows = np.concatenate([Loader(tokens, 64, seed=1).rows(step) for step in (0, 1, num // 64 - 1)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(rows.tolist())) == 3 * 64
        assert rows.max() > 0.9 * num
    assert peaks[1] < 1.5 * peaks[0] < 1e6


@pytest.mark.parametrize("num", [1, 2, 3, 27, 1000, 65_537])
def test_each_seed_permutes(num: int) -> None:
    for seed in range(3):
        assert sorted(permuted(np.arange(num), num, seed)) == list(range(num))


def test_all_permutations_are_as_likely() -> None:
    found = Counter(tuple(permuted(np.arange(4), 4, seed)) for seed in range(2400))
    assert len(found) == 24
    assert (
        _chi_squared(np.array([*found.values()])) < 49.7
    )  # of 23 degrees of freedom, one in a thousand is above


def test_neighbours_do_not_stay_together() -> None:
    """Over seeds, of a grid's row or of another, what comes next is anywhere."""
    num = 100
    steps = [np.diff(permuted(np.arange(num), num, seed)) % num for seed in range(400)]
    counts = np.bincount(np.concatenate(steps), minlength=num)
    assert counts[0] == 0
    assert _chi_squared(counts[1:]) < 147.1  # one in a thousand, of 98


def test_memory_maps(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", _tokens(9))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    assert torch.equal(Loader(mapped, 4, seed=1).batch(3), Loader(_tokens(9), 4, seed=1).batch(3))


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (2, 2, 2)])
def test_tokens_are_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \(N, L\)"):
        Loader(np.zeros(shape, np.int32), 2, seed=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        Loader(_tokens(4), 0, seed=0)
    loader = Loader(_tokens(4), 2, seed=0)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        loader.rows(-1)
    for start, stop in [(0, 3), (1, 1), (-1, 2), (2, 1)]:
        with pytest.raises(ValueError, match=f"got {start}:{stop} of a batch of 2"):
            loader.batch(0, start, stop)


# ------------------------------------------------------------------------------------------------ several processes


def _parts(loader: Loader, step: int, world: int) -> list[torch.Tensor]:
    """What processes take that share a batch evenly, each from a loader of its own."""
    part = loader.size // world
    return [
        Loader(loader.tokens, loader.size, loader.seed).batch(step, rank * part, (rank + 1) * part)
        for rank in range(world)
    ]


@pytest.mark.parametrize(
    ("num", "batch", "world"), [(10, 6, 2), (10, 6, 3), (7, 4, 4), (5, 12, 2), (100, 8, 8)]
)
def test_ranks_together_see_what_one_process_sees(num: int, batch: int, world: int) -> None:
    one = Loader(_tokens(num), batch, seed=4)
    for step in range(12):  # over the ends of epochs
        parts = _parts(one, step, world)
        assert {len(part) for part in parts} == {batch // world}
        assert torch.equal(torch.cat(parts), one.batch(step))


def test_a_run_goes_on_where_it_was_in_another_number_of_processes() -> None:
    """At a step of three epochs, begun in two processes and gone on with in four."""
    one = Loader(_tokens(10), 8, seed=1)
    for step, world in [(0, 2), (1, 2), (2, 2), (3, 4), (4, 4), (5, 4)]:
        assert torch.equal(torch.cat(_parts(one, step, world)), one.batch(step))
