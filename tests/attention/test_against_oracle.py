"""Kept sets, prefill and pruned-cache decode against eager attention under explicit masks."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle
from tiny_prompts import encode, extend, mixed_questions, question

from sparsity_forcing import sparse_attention
from sparsity_forcing.params import SparsityParams

NEW_TOKENS = 4
BUDGETS = torch.tensor([0.5, 0.7, 0.9, 0.6])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # transformers' eager softmax is float32 whatever the model


def run(model, inputs: dict, settings: SparsityParams, p: torch.Tensor):
    """Generated ids, their logits (batch, tokens, vocabulary) and the statistics."""
    with sparse_attention(model, p=p, settings=settings) as stats:
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    completions = output.sequences[:, inputs["input_ids"].shape[1] :]
    return completions, torch.stack(output.logits, dim=1), stats


def assert_equals_oracle(model, inputs: dict, settings: SparsityParams, p: torch.Tensor) -> None:
    completions, logits, stats = run(model, inputs, settings, p)
    oracle = Oracle(model, inputs, stats.context.layout, settings, p)
    for layer, kept in enumerate(oracle.kept):
        assert torch.equal(stats.kept(layer), kept)
    torch.testing.assert_close(stats.token_ratio, oracle.token_ratio)
    assert bool((stats.token_ratio[stats.visual.any(-1)] < 1).all())  # a budget that drops nothing proves nothing

    expected = oracle.logits(extend(inputs, completions))[:, inputs["input_ids"].shape[1] - 1 : -1].to(logits.dtype)
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("scoring_rows", ["text", "probe", "all"])
@pytest.mark.parametrize("prefill", ["suffix", "sparse", "dense"])
def test_a_mixed_batch_with_a_budget_per_row(tiny, prefill, scoring_rows):
    model, processor = tiny
    settings = SparsityParams(prefill=prefill, scoring_rows=scoring_rows, probe_recent=3, probe_random=6)
    assert_equals_oracle(model, encode(processor, mixed_questions()), settings, BUDGETS)


@pytest.mark.parametrize("prefill", ["suffix", "sparse", "dense"])
def test_the_literal_rule_that_protects_nothing_but_the_last_token(tiny, prefill):
    model, processor = tiny
    settings = SparsityParams(
        prefill=prefill, scoring_rows="all", rank_by="raw", protect_text=False, protect_first=0, protect_last=1
    )
    assert_equals_oracle(model, encode(processor, mixed_questions()), settings, BUDGETS)


@pytest.mark.parametrize("rule, scale", [("top_k", 1.0), ("threshold", 0.5)])
def test_other_rules(tiny, rule, scale):
    model, processor = tiny
    settings = SparsityParams(rule=rule, protect_first=1)
    assert_equals_oracle(model, encode(processor, mixed_questions()), settings, BUDGETS * scale)


def test_the_oracle_can_tell_the_prefill_kinds_apart(tiny):
    """The masks differ where they should, so that agreement above means something."""
    model, processor = tiny
    inputs = encode(processor, [question(6)])
    p = torch.tensor([0.5])
    found = {}
    for prefill in ("suffix", "sparse", "dense"):
        settings = SparsityParams(prefill=prefill)
        _, logits, _ = run(model, inputs, settings, p)
        found[prefill] = logits[0, 0]
    for first, second in (("suffix", "sparse"), ("suffix", "dense"), ("sparse", "dense")):
        assert (found[first] - found[second]).abs().max() > 1e-3
