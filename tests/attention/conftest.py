"""One exact small model for all tests of sparse attention."""

from __future__ import annotations

import pytest
from tiny_prompts import sharp_model


@pytest.fixture(scope="session")
def tiny():
    """(model, processor): two layers, float64."""
    return sharp_model()
