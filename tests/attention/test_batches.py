"""A row of a batch is what the row is alone, whatever its padding, its neighbours and their budgets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_prompts import encode, mixed_questions

from sparsity_forcing import sparse_attention

KINDS = [(prefill, rows) for prefill in ("suffix", "sparse", "dense") for rows in ("text", "probe", "all")]
BUDGETS = torch.tensor([0.5, 0.95, 0.7, 0.6])


def run(model, inputs: dict, p, **settings):
    with sparse_attention(model, p=p, probe_recent=3, probe_random=6, **settings) as stats:
        output = model.generate(
            **inputs,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return output.sequences[:, -5:], torch.stack(output.logits, dim=1), stats


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_a_row_equals_the_row_alone(tiny, prefill, scoring_rows):
    model, processor = tiny
    settings = {"prefill": prefill, "scoring_rows": scoring_rows}
    tokens, logits, stats = run(model, encode(processor, mixed_questions()), BUDGETS, **settings)
    for row, question in enumerate(mixed_questions()):
        alone, alone_logits, alone_stats = run(model, encode(processor, [question]), float(BUDGETS[row]), **settings)
        assert torch.equal(tokens[row], alone[0])
        torch.testing.assert_close(logits[row], alone_logits[0], rtol=1e-6, atol=1e-6)  # generate returns float32
        for layer in range(2):
            kept = stats.kept(layer)[row]
            assert torch.equal(kept[stats.valid[row]], alone_stats.kept(layer)[0])
            assert not kept[~stats.valid[row]].any()
        assert stats.token_ratio[row] == alone_stats.token_ratio[0]
        torch.testing.assert_close(
            stats.layer_visual_ratio[:, row], alone_stats.layer_visual_ratio[:, 0], rtol=0, atol=0, equal_nan=True
        )


def test_one_budget_for_all_is_that_budget_for_each(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_questions())
    for p in (torch.full((4,), 0.6), torch.tensor(0.6), torch.full((4,), 0.6, dtype=torch.float64)):
        tokens, logits, stats = run(model, inputs, p)
        expected, expected_logits, expected_stats = run(model, inputs, 0.6)
        assert torch.equal(tokens, expected)
        assert torch.equal(logits, expected_logits)
        assert torch.equal(stats.kept(1), expected_stats.kept(1))


def test_a_larger_budget_keeps_a_superset_in_the_first_layer(tiny):
    model, processor = tiny
    inputs = encode(processor, [mixed_questions()[1]] * 4)
    _, _, stats = run(model, inputs, torch.tensor([0.3, 0.6, 0.9, 1.0]))
    kept = stats.kept(0)
    for smaller, larger in pairwise(kept):
        assert not (smaller & ~larger).any()
    assert kept.sum(-1).unique().numel() == 4


def test_several_answers_per_prompt_share_one_number_and_refuse_a_budget_per_prompt(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_questions()[:2])
    options = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 3}
    with sparse_attention(model, p=0.6) as stats:
        assert model.generate(**inputs, **options).shape[0] == 6
    assert stats.token_ratio.shape == (6,)
    assert torch.equal(stats.kept(1)[0], stats.kept(1)[2])
    with (
        sparse_attention(model, p=torch.tensor([0.5, 0.6])),
        pytest.raises(ValueError, match="p holds 2 budgets for a batch of 6 rows"),
    ):
        model.generate(**inputs, **options)


def test_a_batch_of_another_size_than_its_budgets_is_refused(tiny):
    model, processor = tiny
    with (
        sparse_attention(model, p=torch.tensor([0.5, 0.6, 0.7])),
        pytest.raises(ValueError, match="p holds 3 budgets for a batch of 1 rows"),
    ):
        model(**encode(processor, mixed_questions()[:1]))
