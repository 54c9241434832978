"""Shared by every test: one thread, so that times and sums do not depend on the machine's load."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: trains a network for more than a few seconds")
