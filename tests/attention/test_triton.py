"""The whole core with every kernel on equals the eager core: kept sets, logits, answers, a training step."""

from __future__ import annotations

import pytest
import torch
from tiny_prompts import encode, mixed_questions, sharp_model

from sparsity_forcing import sparse_attention, sparse_generate
from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.models.families import visual_token_ids
from sparsity_forcing.models.prompts import append_answers
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

KINDS = [("suffix", "text"), ("sparse", "probe"), ("suffix", "all")]
BUDGETS = torch.tensor([0.5, 0.7])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def single():
    model, processor = sharp_model(dtype=torch.float32)
    return model.to(DEVICE), processor


@pytest.fixture(scope="module")
def inputs(single) -> dict:
    questions = mixed_questions()[:2]
    return {name: value.to(DEVICE) for name, value in encode(single[1], questions, torch.float32).items()}


@pytest.mark.parametrize("prefill, scoring_rows", KINDS)
def test_kept_sets_logits_and_answers(single, inputs, prefill, scoring_rows):
    model, _ = single
    real = inputs["attention_mask"].bool()
    found = {}
    for impl in ("eager", "triton"):
        kind = {"prefill": prefill, "scoring_rows": scoring_rows, "impl": impl, "probe_recent": 8, "probe_random": 8}
        with torch.no_grad(), sparse_attention(model, BUDGETS.to(DEVICE), **kind) as stats:
            logits = model(**inputs).logits[real]
            kept = [stats.kept(layer) for layer in range(2)]
        found[impl] = (logits, kept, sparse_generate(model, inputs, BUDGETS, max_new_tokens=3, **kind))
    (eager_logits, eager_kept, eager), (logits, kept, triton) = found["eager"], found["triton"]
    torch.testing.assert_close(logits, eager_logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(kept, eager_kept, strict=True))
    assert torch.equal(triton.tokens, eager.tokens)
    torch.testing.assert_close(triton.logps, eager.logps, rtol=1e-4, atol=1e-4)


def test_generate(single, inputs):
    model, _ = single
    answers = []
    for impl in ("eager", "triton"):
        with sparse_attention(model, 0.6, impl=impl):
            answers.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.parametrize("prefill", ["suffix", "sparse"])
def test_a_training_step(single, inputs, prefill):
    """The same replayed kept sets and sampled masses, the same weights after a step of both terms of the loss."""
    model, processor = single
    whole, labels = append_answers(processor, inputs, ["7", "red 7"])
    whole, labels = {name: value.to(DEVICE) for name, value in whole.items()}, labels.to(DEVICE)
    ids = visual_token_ids(model.config)
    layout = PromptLayout.from_tokens(inputs["input_ids"], inputs["attention_mask"], ids)
    scoring = "text" if prefill == "suffix" else "all"
    settings = {"prefill": prefill, "scoring_rows": scoring}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with decoder_attention(model), torch.no_grad():
        noise = torch.Generator(DEVICE).manual_seed(0)
        eager = SparsityParams(impl="eager", **settings)
        sampled = SparseContext(eager, layout, BUDGETS, sigma=0.5, generator=noise)
        model(**inputs, sparse=sampled, use_cache=False)

    def step(impl: str) -> dict[str, torch.Tensor]:
        model.load_state_dict(start)
        context = SparseContext(
            SparsityParams(impl=impl, **settings),
            layout,
            BUDGETS,
            replay=sampled.kept,
            sigma=0.5,
            perturbed=sampled.perturbed,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with decoder_attention(model):
            loss = model(**whole, labels=labels, sparse=context, use_cache=False).loss
        (loss - 0.01 * context.stacked_selection_logps().mean()).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return {name: value.clone() for name, value in model.state_dict().items()}

    eager_weights, triton_weights = step("eager"), step("triton")
    model.load_state_dict(start)
    assert any(not torch.equal(eager_weights[name], start[name]) for name in start)
    for name, expected in eager_weights.items():
        torch.testing.assert_close(triton_weights[name], expected, rtol=1e-4, atol=2e-5, msg=name)


def test_a_full_budget_is_the_dense_model(single, inputs):
    """Logits, loss gradients and greedy answers."""
    model, processor = single
    whole, labels = append_answers(processor, inputs, ["7", "red 7"])
    whole, labels = {name: value.to(DEVICE) for name, value in whole.items()}, labels.to(DEVICE)
    trained = [parameter for name, parameter in model.named_parameters() if "visual" not in name]

    def outcome() -> tuple:
        found = model(**whole, labels=labels)
        gradients = torch.autograd.grad(found.loss, trained)
        answers = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        return found.logits[whole["attention_mask"].bool()].detach(), gradients, answers

    dense = outcome()
    with sparse_attention(model, 1.0, impl="triton"):
        sparse = outcome()
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-4, atol=1e-4)
    for found, expected in zip(sparse[1], dense[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(sparse[2], dense[2])
