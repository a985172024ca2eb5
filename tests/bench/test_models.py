"""Whole models at toy sizes: that a timed step is the step it should be, and what the cases hold."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers import AttentionInterface

import sparsity_forcing.attention.functions as functions
import sparsity_forcing.bench.gpu as gpu
import sparsity_forcing.bench.models as models
import sparsity_forcing.bench.steps as steps
from sparsity_forcing.bench.compare import BenchError, Case
from sparsity_forcing.bench.models import equal_batch_case, equal_memory_case, prefill_case, random_qwen
from sparsity_forcing.bench.steps import FOLDED, GENERATE, dense_step, generate_arm, make_pool, pruned_step
from sparsity_forcing.params import SparsityParams

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip
ENTRY = 2 * 2 * 2 * 16 * 4  # bytes of keys and values of a token in all layers
DENSE = {"dense, this project's kernel", "dense SDPA, static cache, grouped-query", "dense SDPA, static cache, folded"}


def small_model(dtype: torch.dtype = torch.float32, **sizes):
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    return random_qwen(SMALL | sizes, "cpu", dtype, vision)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    for module in (steps, models):
        monkeypatch.setattr(module, "NEW_TOKENS", 2)


STEPS = {
    "sparse": lambda model, pool: pruned_step(model, pool, 3, 128, 32),
    "dense, this project's kernel": lambda model, pool: pruned_step(model, pool, 3, 128, 128),
    "grouped-query": lambda model, pool: dense_step(model, pool, 3, 128, "sdpa"),
    "folded": lambda model, pool: dense_step(model, pool, 3, 128, FOLDED),
}


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_step_attends_to_all_its_entries(model, name):
    """Its logits are those of attention in float64 over the keys and values it was given, call after call."""
    pool = make_pool(model, 3 * 129)
    step = STEPS[name](model, pool)
    entries = step.entries([0, 1, 2])
    assert entries[0][0].shape == (3, 2, 32 if name == "sparse" else 128, 16)

    def explicit(module, query, key, value, mask, scaling, **_):
        old_key, old_value = entries[module.layer_idx]
        key, value = (
            torch.cat(pair, dim=2).double().repeat_interleave(2, dim=1) for pair in ((old_key, key), (old_value, value))
        )
        weights = (query.double() @ key.transpose(-1, -2) * scaling).softmax(-1)
        return (weights @ value).float().transpose(1, 2), None

    AttentionInterface.register("explicit_in_test", explicit)
    with steps._attention(model, "explicit_in_test"):
        positions = torch.full((3, 3, 1), 128)
        expected = model(input_ids=step.tokens[:, None], position_ids=positions, use_cache=False).logits[:, -1]
    for _ in range(2):
        torch.testing.assert_close(step.run(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_step_reads_its_cache(model, name):
    pool = make_pool(model, 3 * 129)
    for memory in pool[1]:
        memory.fill_(float("nan"))
    assert STEPS[name](model, pool).run().isnan().all()


def test_the_whole_pool_is_read_by_generate(model):
    pool = make_pool(model, 3 * 129)
    for memory in pool[1]:
        memory.fill_(float("nan"))
    run = generate_arm(model, pool, 3, 128)
    assert run(1, output_logits=True, return_dict_in_generate=True).logits[0].isnan().all()


def only_the_first_entry(right):
    return lambda q, k, v, start, length, *rest, **options: right(q, k, v, start, length * 0 + 1, *rest, **options)


def off_by_a_percent(right):
    return lambda *args, **options: right(*args, **options) * 1.01


@pytest.mark.parametrize("fault", [only_the_first_entry, off_by_a_percent])
def test_a_wrong_step_is_not_timed(model, monkeypatch, fault):
    monkeypatch.setattr(functions, "ragged_attention", fault(functions.ragged_attention))
    with pytest.raises(BenchError, match="logits of one step of 'sparse'"):
        equal_batch_case(model, "small", 2, 128, 0.25, repetitions=1)
    with pytest.raises(BenchError, match="logits of one step of 'sparse'"):
        equal_memory_case(model, "small", 128, 0.25, 4 * 132 * ENTRY, repetitions=1)


def test_a_captured_step_is_compared_with_the_uncaptured(model):
    step = pruned_step(model, make_pool(model, 2 * 129), 2, 128, 32)
    with torch.no_grad():
        replayed = lambda: step.run()  # noqa: E731
        checked = steps.check_arm(model, "sparse", step, replayed, 128)
        assert [check["what"] for check in checked][1:] == ["'sparse' captured and uncaptured"]
        assert (
            len(steps.check_arm(model, "sparse", step, step.run, 128)) == 1
        )  # with itself there is nothing to compare


def test_equal_batch(model):
    case = equal_batch_case(model, "small", batch=2, length=128, share=0.25, repetitions=1)
    assert set(case.seconds) == {"sparse", GENERATE} | DENSE
    assert case.notes["cache_bytes_dense"] == 2 * 128 * ENTRY
    assert 1 < case.notes["bandwidth_limit_of_speedup"] < 4
    assert len(case.checked) == 5
    without = equal_batch_case(model, "small", 2, 128, 0.25, repetitions=1, generate=False)
    assert GENERATE not in without.seconds
    assert GENERATE in without.notes["left_out"]


def test_equal_memory(model):
    case = equal_memory_case(model, "small", 128, 0.25, cache_bytes=4 * 132 * ENTRY, repetitions=1)
    assert case.setting["batch"] == {"sparse": 16, GENERATE: 4} | dict.fromkeys(DENSE, 4)
    with pytest.raises(BenchError, match="hold no row"):
        equal_memory_case(model, "small", 128, 0.25, cache_bytes=1000, repetitions=1)


def test_arms_of_whole_models_take_turns_and_the_fastest_is_the_baseline(model, monkeypatch):
    """All arms go through `time_arms` together; its samples, of ``NEW_TOKENS`` steps, become those of one step."""
    times = {arm: [8.0] for arm in DENSE} | {"sparse": [2.0], GENERATE: [20.0]}
    times["dense SDPA, static cache, grouped-query"] = [6.0]
    monkeypatch.setattr(models, "time_arms", lambda arms, _: {arm: times[arm] for arm in arms})
    case = equal_batch_case(model, "small", 2, 128, 0.25, repetitions=1)
    assert (case.baseline, case.speedup) == ("dense SDPA, static cache, grouped-query", 3.0)
    assert case.seconds["sparse"] == [1.0]
    assert set(case.as_json()["speedups"]) == {GENERATE} | DENSE
    memory = equal_memory_case(model, "small", 128, 0.25, cache_bytes=4 * 132 * ENTRY, repetitions=1)
    assert memory.speedup == 12.0


@pytest.mark.parametrize("settings", [SparsityParams(), SparsityParams(prefill="sparse", scoring_rows="probe")])
def test_prefill(model, settings):
    case = prefill_case(model, "small", 128, 0.25, settings, repetitions=1)
    assert (case.setting["prefill"], case.setting["p"]) == (settings.prefill, 0.25)
    assert 0.5 < case.notes["token_ratio"] < 0.8  # the text, half of this prompt, is kept
    assert len(case.notes["token_ratio_of_layers"]) == 2


def test_a_prefill_with_slightly_wrong_logits_is_not_timed(model, monkeypatch):
    monkeypatch.setattr(functions, "kept_attention", off_by_a_percent(functions.kept_attention))
    with pytest.raises(BenchError, match="logits of the last token at p = 1"):
        prefill_case(model, "small", 128, 0.25, SparsityParams(), repetitions=1)


def test_what_bfloat16_allows(monkeypatch):
    """As many layers as the 7B model has: rounding stays within the tolerance, a few missing entries do not."""
    deep = small_model(torch.bfloat16, num_hidden_layers=28, hidden_size=256)
    equal_batch_case(deep, "deep", 2, 128, 0.25, repetitions=1)
    prefill_case(deep, "deep", 128, 0.25, SparsityParams(), repetitions=1)
    right = functions.ragged_attention
    fewer = lambda q, k, v, start, length, scale, **_: right(q, k, v, start + 3, length - 3, scale)  # noqa: E731
    monkeypatch.setattr(functions, "ragged_attention", fewer)
    with pytest.raises(BenchError, match="logits of one step of 'sparse'"):
        equal_batch_case(deep, "deep", 2, 128, 0.25, repetitions=1)


def test_one_model_at_a_time(monkeypatch):
    """The last model is gone when the next is made."""
    made = []

    def make(*_):
        assert all(last() is None for last in made)
        model = torch.nn.Linear(1, 1)
        model.itself = [model]  # as in real ones, only the garbage collector frees it
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(gpu, "random_qwen", make)
    monkeypatch.setattr(gpu, "_held", {})
    measure = lambda model, name: Case(name, {}, "a", "b", {}, [])  # noqa: E731
    for name in ("7B", "7B", "3B", "7B"):
        assert gpu._with_model(measure, name).name == name
    assert len(made) == 3


def test_the_gpu_set_leaves_out_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(140e9), int(141e9)))
    cases = gpu.gpu_cases(1)
    assert {"decode_32k_b64", "mass_16k_all", "step_7B_16k_b64", "memory_3B_16k"} <= set(cases)
    assert "step_7B_32k_b64" not in cases
    assert cases["step_7B_16k_b32"].args[-1] is True
    assert cases["step_7B_16k_b64"].args[-1] is False  # without model.generate


def test_the_gpu_figures():
    arms = {"mass": [1.0], "dense": [56.0], "together": [2e-6], "sparse": [28.0]}
    case = Case("x", {}, "sparse", "dense", arms, [])
    keys = ("mass_16k_all", "mass_16k_probe", "selection_16k", "prefill_7B_16k_suffix_text")
    figures = gpu.gpu_summary(dict.fromkeys(keys, case))
    assert figures["prefill_7B_16k_suffix_text_speedup"] == 2.0
    assert figures["mass_16k_all_share_of_prefill"] == 0.5
    assert figures["selection_16k_microseconds"] == pytest.approx(2.0)
