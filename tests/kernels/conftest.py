"""Fixtures of all operations."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
