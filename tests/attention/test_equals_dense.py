"""At p = 1, and wherever nothing may be dropped, sparse attention is the dense model."""

from __future__ import annotations

import pytest
import torch
from tiny_prompts import TEXT_ONLY, encode, mixed_questions, sharp_model

from sparsity_forcing import sparse_attention
from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.models.families import FAMILIES
from sparsity_forcing.models.prompts import append_answers

KINDS = [(prefill, rows) for prefill in ("suffix", "sparse", "dense") for rows in ("text", "probe", "all")]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def generate(model, inputs: dict, **options):
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**settings, **options})


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_logits_and_greedy_tokens_of_a_mixed_batch(tiny, prefill, scoring_rows):
    model, processor = tiny
    inputs = encode(processor, mixed_questions())
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense, answers = model(**inputs).logits, generate(model, inputs)
        with sparse_attention(model, p=1.0, prefill=prefill, scoring_rows=scoring_rows) as stats:
            torch.testing.assert_close(model(**inputs).logits[real], dense[real], **EXACT)
            sparse = generate(model, inputs)
    assert torch.equal(sparse.sequences, answers.sequences)
    torch.testing.assert_close(torch.stack(sparse.logits), torch.stack(answers.logits), rtol=1e-5, atol=1e-5)
    assert stats.token_ratio.tolist() == [1.0] * 4


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_gradients_of_a_loss(tiny, prefill, scoring_rows):
    model, processor = tiny
    inputs, labels = append_answers(processor, encode(processor, mixed_questions()), ["7", "red 7", "2", "4"])
    parameters = list(model.parameters())

    def gradients() -> tuple[torch.Tensor, ...]:
        loss = model(**inputs, labels=labels).loss
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    dense = gradients()
    with sparse_attention(model, p=1.0, prefill=prefill, scoring_rows=scoring_rows):
        sparse = gradients()
    for found, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # the loss itself is float32


def test_the_registered_attention_without_a_context_is_dense(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_questions())
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense, answers = model(**inputs).logits, generate(model, inputs)
        with decoder_attention(model):
            torch.testing.assert_close(model(**inputs).logits[real], dense[real], **EXACT)
            assert torch.equal(generate(model, inputs).sequences, answers.sequences)


@pytest.mark.parametrize("prefill", ["suffix", "sparse", "dense"])
def test_a_text_only_prompt_drops_nothing(tiny, prefill):
    model, processor = tiny
    inputs = encode(processor, [TEXT_ONLY])
    dense = generate(model, inputs)
    with sparse_attention(model, p=0.1, prefill=prefill) as stats:
        sparse = generate(model, inputs)
    assert torch.equal(sparse.sequences, dense.sequences)
    assert stats.token_ratio.tolist() == [1.0]
    assert stats.visual_token_ratio.isnan().all()
    assert stats.cache_bytes == stats.dense_cache_bytes


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_a_prompt_of_one_token(tiny, prefill, scoring_rows):
    model, _ = tiny
    inputs = {"input_ids": torch.tensor([[70]]), "attention_mask": torch.tensor([[1]])}
    dense = generate(model, inputs)
    with sparse_attention(model, p=0.3, prefill=prefill, scoring_rows=scoring_rows, protect_text=False) as stats:
        sparse = generate(model, inputs)
    assert torch.equal(sparse.sequences, dense.sequences)
    assert (stats.token_ratio.tolist(), stats.kept(1).tolist()) == ([1.0], [[True]])


def test_beam_search(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_questions())
    dense = generate(model, inputs, num_beams=3)
    with sparse_attention(model, p=1.0):
        sparse = generate(model, inputs, num_beams=3)
    assert torch.equal(sparse.sequences, dense.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_dense_at_a_full_budget_and_pruned_below_it(family):
    model, processor = sharp_model(family)
    inputs = encode(processor, [mixed_questions()[0], mixed_questions()[1], TEXT_ONLY])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        dense, answers = model(**inputs).logits, generate(model, inputs)
        with sparse_attention(model, p=1.0):
            torch.testing.assert_close(model(**inputs).logits[real], dense[real], rtol=1e-8, atol=1e-8)
            assert torch.equal(generate(model, inputs).sequences, answers.sequences)
        with sparse_attention(model, p=0.6) as stats:
            generate(model, inputs)
    assert bool((stats.visual_token_ratio[:2] < 0.9).all())
    assert bool((stats.token_ratio[:2] > stats.visual_token_ratio[:2]).all())
    assert stats.token_ratio[2] == 1
    assert stats.cache_bytes < stats.dense_cache_bytes
