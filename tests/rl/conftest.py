"""Small models for tests of rollouts, replay and training."""

from __future__ import annotations

import pytest
import torch
from tiny_prompts import sharp_model

from sparsity_forcing.attention.api import decoder_attention


@pytest.fixture
def policy(tiny):
    """The same model with its decoder on the registered attention, as rollouts and updates want it."""
    model, processor = tiny
    with decoder_attention(model):
        yield model, processor
    model.zero_grad(set_to_none=True)
    model.eval()


@pytest.fixture
def single():
    """A float32 policy, to train and to break."""
    model, processor = sharp_model(dtype=torch.float32)
    with decoder_attention(model):
        yield model, processor
