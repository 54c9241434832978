"""Shared by every test: one thread, so that times and sums do not depend on the machine's load; a cache of its own."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: trains a network for more than a few seconds")
    config._flowlm_cache = os.environ["FLOWLM_CACHE"] = tempfile.mkdtemp(prefix="flowlm-cache-")  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config._flowlm_cache, ignore_errors=True)  # type: ignore[attr-defined]
