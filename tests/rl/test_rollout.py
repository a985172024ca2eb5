"""Rollouts: the answers of `model.generate`, sampled with one budget per row and a shared visual prefix."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scenes import prompts_of, rollouts_of, sampling, suppressed
from tiny_prompts import encode, mixed_questions, question

from sparsity_forcing import sparse_attention
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.rollout import roll_out

BUDGETS = torch.tensor([0.5, 0.95, 0.7, 0.6])
SUFFIX = SparsityParams()


@contextmanager
def logits_changed(model, change):
    """Passes the model's logits (rows, tokens, vocabulary) through ``change``."""
    handle = model.lm_head.register_forward_hook(lambda module, args, output: change(output.clone()))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("scoring_rows", ["text", "all"])
@pytest.mark.parametrize("prefill", ["suffix", "sparse", "dense"])
def test_greedy_rollouts_are_those_of_generate(tiny, policy, prefill, scoring_rows):
    model, processor = policy
    settings = SparsityParams(prefill=prefill, scoring_rows=scoring_rows)
    prompts = prompts_of(model, processor, mixed_questions(), settings)
    found = rollouts_of(model, prompts, BUDGETS, 1, settings, temperature=0.0, tokens=6)
    inputs = encode(processor, mixed_questions())
    with sparse_attention(model, p=BUDGETS, settings=settings) as stats:
        expected = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=suppressed(model).tolist()
        )[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found.completions[found.completion_mask], expected[found.completion_mask])
    for row in range(4):
        for layer in range(2):
            kept = found.kept[layer][row, prompts.layout.valid[row]]
            assert torch.equal(kept, stats.kept(layer)[row, stats.valid[row]])
    torch.testing.assert_close(found.token_ratio, stats.token_ratio)
    torch.testing.assert_close(found.visual_token_ratio, stats.visual_token_ratio, equal_nan=True)
    torch.testing.assert_close(found.layer_ratio, stats.layer_ratio)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("prefill", ["suffix", "dense"])
def test_a_shared_prefix_changes_nothing(policy, prefill, sigma):
    model, processor = policy
    settings, group = SparsityParams(prefill=prefill), 3
    questions = mixed_questions()
    p = torch.tensor([0.5, 0.7, 0.9]).repeat(len(questions))
    shared = rollouts_of(model, prompts_of(model, processor, questions, settings), p, group, settings, sigma=sigma)
    repeated = [question for question in questions for _ in range(group)]
    alone = rollouts_of(model, prompts_of(model, processor, repeated, settings), p, 1, settings, sigma=sigma)
    assert torch.equal(shared.completions, alone.completions)
    assert torch.equal(shared.completion_mask, alone.completion_mask)
    torch.testing.assert_close(shared.logps, alone.logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared.selection_logps, alone.selection_logps, rtol=1e-6, atol=1e-6)
    for layer in range(2):
        assert torch.equal(shared.kept[layer], alone.kept[layer])
    assert shared.completions.unique(dim=0).shape[0] > 6  # sampled, not all the same


def test_the_cut_changes_nothing(policy, monkeypatch):
    model, processor = policy
    cut = prompts_of(model, processor, mixed_questions(), SUFFIX)
    monkeypatch.setattr("sparsity_forcing.generation.prompts.shares_prefix", lambda settings: False)
    whole = prompts_of(model, processor, mixed_questions(), SUFFIX)
    assert cut.prefix > 0 == whole.prefix
    first, second = (rollouts_of(model, prompts, BUDGETS, 1, SUFFIX) for prompts in (cut, whole))
    assert torch.equal(first.completions, second.completions)
    torch.testing.assert_close(first.logps, second.logps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first.token_ratio, second.token_ratio)


def test_the_generator_decides_everything(policy):
    model, processor = policy
    prompts = prompts_of(model, processor, mixed_questions(), SUFFIX)
    first, same, other = (
        rollouts_of(model, prompts, BUDGETS, 1, SUFFIX, sigma=0.5, seed=seed, tokens=8) for seed in (1, 1, 2)
    )
    assert torch.equal(first.completions, same.completions)
    assert torch.equal(first.perturbed[1], same.perturbed[1])
    assert not torch.equal(first.completions, other.completions)
    assert not torch.equal(first.perturbed[1], other.perturbed[1])


def test_noise_explores_kept_sets_at_one_budget(policy):
    model, processor = policy
    prompts = prompts_of(model, processor, [question(6)], SUFFIX)
    p = torch.full((4,), 0.7)
    still, noisy = (rollouts_of(model, prompts, p, 4, SUFFIX, sigma=sigma) for sigma in (0.0, 0.5))
    assert still.kept[0].unique(dim=0).shape[0] == 1
    assert noisy.kept[0].unique(dim=0).shape[0] == 4
    assert noisy.selection_logps.shape == (2, 4)
    assert still.selection_logps.shape == (0, 4)


def test_image_placeholders_are_never_sampled(policy):
    model, processor = policy
    prompts = prompts_of(model, processor, mixed_questions(), SUFFIX)
    placeholders = suppressed(model)
    with logits_changed(model, lambda logits: logits.index_fill(-1, placeholders, 1000.0)):
        for temperature in (0.0, 1.5):
            found = rollouts_of(model, prompts, BUDGETS, 1, SUFFIX, temperature=temperature)
            assert not torch.isin(found.completions, placeholders).any()
            assert found.logps.isfinite().all()
            assert (found.logps > -20).all()  # the mass of the placeholders is not counted


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(policy):
    model, processor = policy
    prompts = prompts_of(model, processor, mixed_questions(), SUFFIX)
    stop, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    calls = []

    def stop_second_row_at_its_third_token(logits):
        calls.append(None)
        logits[..., stop] = -1000.0
        if len(calls) == 4:  # prefix, prompt, first token, second token
            logits[1, -1, stop] = 1000.0
        return logits

    with logits_changed(model, stop_second_row_at_its_third_token):
        found = rollouts_of(model, prompts, BUDGETS, 1, SUFFIX, tokens=6)
    assert found.completion_mask.sum(-1).tolist() == [6, 3, 6, 6]
    assert found.completions[1, 2:].tolist() == [stop, pad, pad, pad]
    assert (found.logps[1, 3:] == 0).all()
    assert found.truncated.tolist() == [True, False, True, True]


def test_rollouts_end_when_every_row_has_stopped(policy):
    model, processor = policy
    prompts = prompts_of(model, processor, mixed_questions(), SUFFIX)
    stop = torch.tensor([model.generation_config.eos_token_id])
    with logits_changed(model, lambda logits: logits.index_fill(-1, stop, 1000.0)):
        found = rollouts_of(model, prompts, BUDGETS, 1, SUFFIX, tokens=6)
    assert found.completions.tolist() == [stop.tolist()] * 4
    assert not found.truncated.any()
    torch.testing.assert_close(found.logps, torch.zeros_like(found.logps))


def test_padding_with_a_suppressed_token_leaves_numbers_finite(policy):
    """Some processors pad with a token that must not be sampled."""
    model, processor = policy
    prompts = prompts_of(model, processor, mixed_questions(), SUFFIX)
    stop = torch.tensor([model.generation_config.eos_token_id])
    pad = int(suppressed(model)[0])

    def stop_first_row(logits):
        logits[0, :, stop] = 1000.0
        return logits

    with logits_changed(model, stop_first_row):
        options = replace(sampling(model), pad_id=pad)
        found = roll_out(model, prompts, BUDGETS, 1, SUFFIX, options, generator=torch.Generator().manual_seed(0))
    assert found.completions[0, 1] == pad
    assert found.logps.isfinite().all()
