"""The update pass sees what the rollout saw, and its gradient is that of the unshared, uncut pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import (
    TEMPERATURE,
    assert_same,
    cut_short,
    gradients,
    prompts_of,
    replay_of,
    replayed,
    rollouts_of,
    sampling,
    suppressed,
)
from tiny_prompts import encode, extend, mixed_questions, sharp_model

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.models.families import FAMILIES
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.rollout import roll_out

GROUP = 2
BUDGETS = torch.tensor([0.5, 0.8]).repeat(4)
LENGTHS = [5, 1, 3, 5, 2, 4, 5, 5]
KINDS = [("suffix", "text"), ("dense", "text"), ("sparse", "text"), ("suffix", "probe"), ("sparse", "all")]


def scene(model, processor, settings: SparsityParams, sigma: float):
    """Prompts, ragged rollouts and how often prompts repeat inside the passes."""
    shared = settings.prefill != "sparse" and settings.scoring_rows == "text"
    questions = mixed_questions() if shared else [q for q in mixed_questions() for _ in range(GROUP)]
    prompts = prompts_of(model, processor, questions, settings)
    group = GROUP if shared else 1
    rollouts = rollouts_of(model, prompts, BUDGETS, group, settings, sigma=sigma)
    return prompts, cut_short(rollouts, LENGTHS), group


def kind(prefill: str, scoring_rows: str) -> SparsityParams:
    return SparsityParams(prefill=prefill, scoring_rows=scoring_rows, probe_recent=3, probe_random=6)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_replay_gives_the_log_probabilities_of_the_rollout(policy, prefill, scoring_rows, sigma):
    model, processor = policy
    settings = kind(prefill, scoring_rows)
    prompts, rollouts, group = scene(model, processor, settings, sigma)
    assert rollouts.completion_mask.sum() == sum(LENGTHS)
    logps, selection = replayed(model, prompts, rollouts, group, settings)
    torch.testing.assert_close(logps, rollouts.logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(selection, rollouts.selection_logps, rtol=1e-6, atol=1e-6)
    assert selection.shape == ((2, 8) if sigma else (0, 8))

    dense = replay_of(model, settings).reference_logps(model, prompts, rollouts, group)
    assert (dense - rollouts.logps)[rollouts.completion_mask].abs().max() > 1e-3  # a dense update would be off


@pytest.mark.parametrize("prefill", ["suffix", "dense", "sparse"])
def test_replay_in_single_precision(single, prefill):
    model, processor = single
    settings = kind(prefill, "text")
    prompts, rollouts, group = scene(model, processor, settings, sigma=0.5)
    logps, _ = replayed(model, prompts, rollouts, group, settings)
    assert (logps - rollouts.logps).abs().max() < 1e-5


@pytest.mark.parametrize("prefill", ["suffix", "dense", "sparse"])
def test_attention_in_float64_rounds_a_float32_models_replay_no_more(single, prefill):
    model, processor = single
    settings, dtype = kind(prefill, "text"), torch.float64
    prompts, plain, group = scene(model, processor, settings, sigma=0.5)
    noise = torch.Generator().manual_seed(0)
    answers = sampling(model)
    rollouts = roll_out(model, prompts, BUDGETS, group, settings, answers, 0.5, noise, attention_dtype=dtype)
    logps, _ = replayed(model, prompts, rollouts, group, settings, attention_dtype=dtype)
    assert logps.dtype == rollouts.logps.dtype == torch.float32
    assert (logps - rollouts.logps)[rollouts.completion_mask].abs().max() < 1e-6
    torch.testing.assert_close(rollouts.logps[:, 0], plain.logps[:, 0], rtol=1e-4, atol=1e-4)


def test_tokens_after_the_stop_token_do_not_matter(policy):
    model, processor = policy
    prompts, rollouts, group = scene(model, processor, SparsityParams(), 0.0)
    garbage = rollouts.completions.masked_fill(~rollouts.completion_mask, 77)
    expected, _ = replayed(model, prompts, rollouts, group, SparsityParams())
    found, _ = replayed(model, prompts, replace(rollouts, completions=garbage), group, SparsityParams())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefill", ["suffix", "dense"])
def test_sharing_the_prefix_leaves_the_gradient_as_it_is(policy, prefill):
    model, processor = policy
    settings = kind(prefill, "text")
    prompts, rollouts, group = scene(model, processor, settings, sigma=0.5)
    repeated = prompts_of(model, processor, [q for q in mixed_questions() for _ in range(GROUP)], settings)
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)
    results = []
    for these, times in ((prompts, group), (repeated, 1)):
        logps, selection = replayed(model, these, rollouts, times, settings)
        results.append((logps, selection, gradients(model, logps.mean(-1) @ weights, (selection @ weights).sum())))
    (logps, selection, found), (other_logps, other_selection, expected) = results
    torch.testing.assert_close(logps, other_logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(selection, other_selection, rtol=1e-6, atol=1e-6)
    assert_same(found, expected)


def test_the_cut_leaves_the_gradient_as_it_is(policy, monkeypatch):
    model, processor = policy
    settings = SparsityParams()
    results = []
    for shares in (True, False):
        monkeypatch.setattr("sparsity_forcing.generation.prompts.shares_prefix", lambda settings, shares=shares: shares)
        prompts = prompts_of(model, processor, mixed_questions(), settings, encode_images=False)
        assert (prompts.prefix > 0) == shares
        rollouts = cut_short(rollouts_of(model, prompts, BUDGETS[:4], 1, settings), LENGTHS[:4])
        logps, _ = replayed(model, prompts, rollouts, 1, settings)
        results.append((rollouts.completions, logps, gradients(model, logps.sum())))
    (tokens, logps, found), (other_tokens, other_logps, expected) = results
    assert torch.equal(tokens, other_tokens)
    torch.testing.assert_close(logps, other_logps, rtol=1e-10, atol=1e-10)
    assert_same(found, expected)
    assert found["model.visual.patch_embed.proj.weight"].abs().max() > 0  # through the prefix to the pixels


def objective_and_gradients(model, inputs, settings: SparsityParams, **memory):
    prompts, rollouts, group = inputs
    logps, selection = replayed(model, prompts, rollouts, group, settings, **memory)
    weights = torch.linspace(-1, 1, len(rollouts.p), dtype=logps.dtype)
    objectives = (logps.mean(-1) @ weights, (selection @ weights).sum())
    return logps, selection, gradients(model, *objectives)


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_gradient_checkpointing_leaves_every_bit_as_it_is(policy, prefill, scoring_rows):
    model, processor = policy
    settings = kind(prefill, scoring_rows)
    inputs = scene(model, processor, settings, sigma=0.5)
    plain, again = (objective_and_gradients(model, inputs, settings, gradient_checkpointing=on) for on in (False, True))
    assert torch.equal(again[0], plain[0])
    assert torch.equal(again[1], plain[1])
    assert again[2].keys() == plain[2].keys()
    assert all(torch.equal(again[2][name], value) for name, value in plain[2].items())


def test_gradient_checkpointing_keeps_no_activations_of_layers(policy):
    model, processor = policy
    inputs = scene(model, processor, SparsityParams(), sigma=0.5)

    def kept_for_backward(on: bool) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            replayed(model, *inputs, SparsityParams(), gradient_checkpointing=on)
        return sum(sizes)

    assert kept_for_backward(True) < kept_for_backward(False) / 3
    assert all("forward" not in vars(module) for module in model.modules())  # the layers are themselves again


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_memory_changes_nothing_in_any_family(family):
    model, processor = sharp_model(family)
    settings = SparsityParams()
    with decoder_attention(model):
        inputs = scene(model, processor, settings, sigma=0.5)
        plain = objective_and_gradients(model, inputs, settings)
        small = objective_and_gradients(model, inputs, settings, logits_chunk=7, gradient_checkpointing=True)
        dense, small_dense = (
            replay_of(model, settings, logits_chunk=size).reference_logps(model, *inputs) for size in (None, 7)
        )
    torch.testing.assert_close(small[0], plain[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small_dense, dense, rtol=1e-12, atol=1e-12)
    assert torch.equal(small[1], plain[1])
    assert_same(small[2], plain[2])


def test_only_completion_tokens_have_logits_and_a_chunk_at_a_time(policy):
    model, processor = policy
    inputs = scene(model, processor, SparsityParams(), sigma=0.0)
    rows = []
    with model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel())):
        replayed(model, *inputs, SparsityParams(), logits_chunk=7)
    _prefix, *chunks = rows
    assert chunks == [7, 7, 7, 7, 2]
    assert sum(chunks) == sum(LENGTHS)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_the_reference_is_plain_transformers(family):
    model, processor = sharp_model(family)
    with decoder_attention(model):
        prompts, rollouts, group = scene(model, processor, SparsityParams(), 0.0)
        found = replay_of(model, SparsityParams()).reference_logps(model, prompts, rollouts, group)
    repeated = encode(processor, [question for question in mixed_questions() for _ in range(GROUP)])
    with torch.no_grad():
        logits = model(**extend(repeated, rollouts.completions, rollouts.completion_mask)).logits
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    logits = logits[:, -rollouts.completions.shape[1] - 1 : -1] / TEMPERATURE
    logits[..., suppressed(model)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, rollouts.completions[..., None])[..., 0]
    real = rollouts.completion_mask
    torch.testing.assert_close(found[real], expected[real], rtol=1e-8, atol=1e-8)
    assert (found[~real] == 0).all()
