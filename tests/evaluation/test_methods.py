"""Every method does what its row says and leaves the model as it was."""

from __future__ import annotations

import pickle

import pytest
import torch

from sparsity_forcing.methods import Full, Threshold, TopK, TopP, rows_to_compare, sparse_method
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.params import Baseline, SparsityParams

SETTINGS = SparsityParams(prefill="sparse", scoring_rows="all")
METHODS = [Full(), TopP(0.5, SETTINGS), TopK(0.5, SETTINGS), Threshold(0.5, SETTINGS)]


@pytest.fixture(scope="module")
def inputs(tiny, rows) -> dict:
    return encode_prompts(tiny.processor, [row.question for row in rows[:4]], [row.images for row in rows[:4]])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_drops_tokens_and_leaves_the_model_as_it_was(method, tiny, inputs):
    before = tiny.model(**inputs).logits
    with method.attend(tiny.model) as stats:
        tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(tiny.model(**inputs).logits, before)
    if isinstance(method, Full):
        assert stats is None
        assert method.p == 1.0
    else:
        assert ((stats.visual_token_ratio > 0) & (stats.visual_token_ratio < 1)).all()


def test_top_k_keeps_its_share_of_the_droppable_tokens(tiny, inputs):
    with TopK(0.25, SETTINGS).attend(tiny.model) as stats:
        tiny.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert stats.visual_token_ratio.tolist() == pytest.approx([0.25] * 4)  # 36 or 64 visual tokens, text is protected


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_travel_between_processes(method):
    assert pickle.loads(pickle.dumps(method)) == method
    assert len({method, pickle.loads(pickle.dumps(method))}) == 1


def test_rows_to_compare_are_dense_and_then_by_rule_and_budget():
    assert rows_to_compare(SETTINGS, (0.94, 0.975)) == (Full(), TopP(0.94, SETTINGS), TopP(0.975, SETTINGS))
    baselines = (Baseline(rule="top_k", p=0.2), Baseline(p=0.5), Baseline(rule="threshold", p=0.9))
    expected = (
        Full(),
        *(TopP(p, SETTINGS) for p in (0.5, 0.94, 0.975)),
        TopK(0.2, SETTINGS),
        Threshold(0.9, SETTINGS),
    )
    assert rows_to_compare(SETTINGS, (0.94, 0.975), baselines) == expected


@pytest.mark.parametrize("rule, kind", [("top_p", TopP), ("top_k", TopK), ("threshold", Threshold)])
def test_every_rule_has_its_method(rule, kind):
    settings = SparsityParams(rule=rule)
    method = sparse_method(settings, 0.9)
    assert type(method) is kind
    assert (method.rule, method.p, method.settings) == (rule, 0.9, settings)
