"""No part of a sparse forward, of its backward or of a dense padded one grows with the square of the prompt."""

from __future__ import annotations

import pytest
import torch
from peak_memory import peak_bytes
from tiny_prompts import sharp_model

from sparsity_forcing import sparse_attention
from sparsity_forcing.attention.api import decoder_attention

LENGTHS = (1024, 2048)


@pytest.fixture(scope="module")
def single():
    return sharp_model(dtype=torch.float32)[0]


def image_prompt(model, length: int) -> dict[str, torch.Tensor]:
    """Two prompts without pixels, the second padded on the left: the decoder alone is looked at."""
    ids = torch.full((2, length), model.config.image_token_id)
    ids[:, -8:] = torch.arange(70, 78)
    mask = torch.ones_like(ids)
    mask[1, : length // 8] = 0
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}


def test_it_sees_a_square():
    """Of the measure itself: an attention map quadruples."""
    sizes = [peak_bytes(lambda n=n: torch.randn(n, 16) @ torch.randn(16, n)) for n in LENGTHS]
    assert sizes[1] > 3.5 * sizes[0]


@pytest.mark.parametrize("prefill, scoring_rows", [("suffix", "text"), ("suffix", "all"), ("sparse", "probe")])
def test_a_sparse_forward_and_its_backward(single, prefill, scoring_rows):
    def step(length: int) -> None:
        with sparse_attention(single, p=0.6, prefill=prefill, scoring_rows=scoring_rows):
            single(**image_prompt(single, length)).logits.sum().backward()
        single.zero_grad(set_to_none=True)

    step(64)
    small, large = (peak_bytes(lambda n=n: step(n)) for n in LENGTHS)
    assert large < 2.4 * small


def test_a_dense_padded_forward(single):
    def run(length: int) -> None:
        with decoder_attention(single), torch.no_grad():
            single(**image_prompt(single, length))

    run(64)
    small, large = (peak_bytes(lambda n=n: run(n)) for n in LENGTHS)
    assert large < 2.4 * small
