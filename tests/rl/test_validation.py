"""Greedy answers in batches of prompts of about one length, in the order of the questions."""

from __future__ import annotations

import torch
from runs import rows, trainer_of

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.models.prompts import pixels
from sparsity_forcing.params import DigitsParams
from sparsity_forcing.rl.validation import answered


def length_of(text: str, answer: str) -> float:
    return len(text) + len(answer) / 100


def test_answers_come_in_the_order_of_the_questions(tmp_path):
    trainer = trainer_of(tmp_path, dtype=torch.float64, validation_batch_size=3)
    asked = rows("validation", 8)  # canvases of two sizes in turn
    with decoder_attention(trainer.model):
        together = answered(trainer.sampler, asked, length_of)
        alone = torch.cat([answered(trainer.sampler, [row], length_of) for row in asked])
    assert len(set(together[:, 0].tolist())) > 1
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_images_of_one_size_share_a_batch(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, validation_batch_size=4)
    deployed, sizes = trainer.sampler.deployed, []

    def observed(part):
        sizes.append([pixels(row.images) for row in part])
        return deployed(part)

    monkeypatch.setattr(trainer.sampler, "deployed", observed)
    small, large = ([digits_row(DigitsParams(grids=(grid,)), 0, "validation", n) for n in range(4)] for grid in (4, 5))
    with decoder_attention(trainer.model):
        answered(trainer.sampler, [row for pair in zip(small, large, strict=True) for row in pair], length_of)
    assert [len(set(batch)) for batch in sizes] == [1, 1]
    assert sizes[0] < sizes[1]
