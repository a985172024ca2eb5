"""Greedy answers in batches of prompts of one length, in the order of the questions."""

from __future__ import annotations

import torch
from runs import rows, trainer_of

from sparsity_forcing.attention.api import decoder_attention
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


def test_prompts_of_one_length_share_a_batch(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, validation_batch_size=4)
    deployed, lengths = trainer.sampler.deployed, []

    def observed(part):
        lengths.append({trainer.sampler.prompts([row]).length for row in part})
        return deployed(part)

    asked = rows("validation", 8)
    asked = sorted(asked, key=lambda row: len(row.question) % 3)  # mixed
    monkeypatch.setattr(trainer.sampler, "deployed", observed)
    with decoder_attention(trainer.model):
        answered(trainer.sampler, asked, length_of)
    spans = [max(part) - min(part) for part in lengths]
    everything = set.union(*lengths)
    assert max(spans) < max(everything) - min(everything)
