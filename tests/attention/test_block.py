"""The block itself: what it leaves behind, what it refuses, what its statistics say."""

from __future__ import annotations

import pytest
import torch
from tiny_prompts import TEXT_ONLY, encode, mixed_questions, question
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from sparsity_forcing import sparse_attention
from sparsity_forcing.models.families import UnsupportedModelError


def state(model) -> tuple:
    """Everything of a model that the block touches."""
    configs = (model.config, model.config.text_config, model.config.vision_config, model.model.language_model.config)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return tuple(config._attn_implementation for config in configs), hooks, model.training


@pytest.fixture
def inputs(tiny) -> dict:
    return encode(tiny[1], mixed_questions())


def _fail_after(_: torch.Tensor) -> None:
    raise KeyError


def answer(model, inputs: dict, tokens: int = 3) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(tiny, inputs, before):
    model, _ = tiny
    model.set_attn_implementation({"text_config": before})
    try:
        expected, dense = state(model), model(**inputs).logits
        with sparse_attention(model, p=0.5):
            assert state(model) != expected
            assert state(model)[0][2] == "sdpa"  # the vision tower stays as it is
            answer(model, inputs)
        assert state(model) == expected
        assert torch.equal(model(**inputs).logits.nan_to_num(), dense.nan_to_num())
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


def test_the_model_is_left_as_it_was_by_an_error(tiny, inputs):
    model, _ = tiny
    expected = state(model)
    with pytest.raises(KeyError), sparse_attention(model, p=0.5):
        _fail_after(answer(model, inputs))
    assert state(model) == expected
    with pytest.raises(ValueError, match="budgets"), sparse_attention(model, p=torch.ones(7)):
        answer(model, inputs)
    assert state(model) == expected


def test_one_block_serves_many_calls_and_describes_the_last(tiny, inputs):
    model, processor = tiny
    with sparse_attention(model, p=0.6) as stats:
        first = answer(model, inputs)
        ratios, kept = stats.token_ratio, stats.kept(1)
        answer(model, encode(processor, [TEXT_ONLY]))
        assert stats.token_ratio.tolist() == [1.0]
        assert torch.equal(answer(model, inputs), first)
        assert torch.equal(stats.token_ratio, ratios)
        assert torch.equal(stats.kept(1), kept)


def test_of_nested_blocks_the_innermost_rules(tiny, inputs):
    model, _ = tiny
    with sparse_attention(model, p=0.5) as alone:
        expected = answer(model, inputs)
    with sparse_attention(model, p=1.0) as outer:
        dense = answer(model, inputs)
        with sparse_attention(model, p=0.5) as inner:
            assert torch.equal(answer(model, inputs), expected)
        assert torch.equal(inner.token_ratio, alone.token_ratio)
        assert outer.token_ratio.tolist() == [1.0] * 4
        assert torch.equal(answer(model, inputs), dense)
    assert state(model)[1] == 0


def test_bytes_are_those_of_the_stored_tensors(tiny):
    model, processor = tiny
    inputs = encode(processor, [question(6)])
    dense = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    with sparse_attention(model, p=0.5) as stats:
        sparse = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)

    token = 2 * 2 * 16 * 8  # keys and values x kv heads x head size x float64
    stored = [
        t.untyped_storage().nbytes()
        for cut in sparse.past_key_values.layers
        for t in (cut.ragged.key, cut.ragged.value)
    ]
    free = sum(cut.ragged.room_left for cut in sparse.past_key_values.layers)
    assert stats.cache_bytes == sum(stored) - token * free
    whole = [t.untyped_storage().nbytes() for full in dense.past_key_values.layers for t in (full.keys, full.values)]
    assert stats.dense_cache_bytes == sum(whole)
    assert stats.cache_bytes < 0.8 * stats.dense_cache_bytes
    assert stats.cache_bytes == token * (int(stats.kept(0).sum()) + int(stats.kept(1).sum()) + 2 * 2)


def test_ratios_are_counted_from_the_kept_sets(tiny, inputs):
    model, _ = tiny
    with sparse_attention(model, p=torch.tensor([0.5, 0.6, 0.7, 0.8])) as stats:
        model(**inputs)
    assert stats.layer_ratio.shape == stats.layer_visual_ratio.shape == (2, 4)
    for layer in range(2):
        for row in range(3):
            kept = stats.kept(layer)[row]
            share = int(kept.sum()) / int(inputs["attention_mask"][row].sum())
            visual = int(kept[stats.visual[row]].sum()) / int(stats.visual[row].sum())
            assert stats.layer_ratio[layer, row] == pytest.approx(share)
            assert stats.layer_visual_ratio[layer, row] == pytest.approx(visual)
    torch.testing.assert_close(stats.token_ratio, stats.layer_ratio.mean(0))
    assert (stats.cache_bytes, stats.dense_cache_bytes) == (0, 0)  # a plain forward keeps no cache
    with pytest.raises(IndexError, match="layer 2 is not one of the 2 decoder layers"):
        stats.kept(2)


def test_protected_tokens_are_kept(tiny, inputs):
    model, _ = tiny
    with sparse_attention(model, p=1e-6, protect_first=6, protect_last=2) as stats:
        model(**inputs)
    text = stats.valid & ~stats.visual
    place = stats.valid.cumsum(-1)
    first = stats.valid & (place <= 6)
    for layer in range(2):
        assert not ((text | first) & ~stats.kept(layer)).any()
        assert ((stats.kept(layer) & ~text & ~first).sum(-1) == torch.tensor([1, 1, 1, 0])).all()


def test_statistics_before_the_first_call_say_so(tiny):
    with sparse_attention(tiny[0], p=0.5) as stats, pytest.raises(RuntimeError, match="no prompt has been run"):
        _ = stats.token_ratio


def test_several_tokens_at_once_go_on_from_the_pruned_cache(tiny):
    model, processor = tiny
    inputs = encode(processor, [question(6)])
    following = torch.tensor([[70, 71, 72, 73]])
    with torch.no_grad(), sparse_attention(model, p=0.5):
        together = DynamicCache()
        model(**inputs, past_key_values=together, use_cache=True)
        at_once = model(input_ids=following, past_key_values=together, use_cache=True).logits
        stepwise = DynamicCache()
        model(**inputs, past_key_values=stepwise, use_cache=True)
        steps = [model(input_ids=following[:, [i]], past_key_values=stepwise).logits for i in range(4)]
    torch.testing.assert_close(at_once, torch.cat(steps, dim=1), rtol=1e-10, atol=1e-10)


def test_a_cache_from_outside_is_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [question(4)])
    cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[70]]), "past_key_values": cache}
    with sparse_attention(model, p=0.5), pytest.raises(ValueError, match="was not made inside this sparse_attention"):
        model(**step)
    with sparse_attention(model, p=0.5):
        inside = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with sparse_attention(model, p=0.5), pytest.raises(ValueError, match="was not made inside this sparse_attention"):
        model(**{**step, "past_key_values": inside})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 64)}, "needs input_ids"),
        ({"use_cache": True}, r"pass past_key_values=DynamicCache\(\)"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "must have the shape of input_ids"),
    ],
)
def test_calls_that_cannot_be_sparse_are_refused(tiny, change, message):
    call = {"input_ids": torch.tensor([[70, 71, 72]]), **change}
    with sparse_attention(tiny[0], p=0.5), pytest.raises(ValueError, match=message):
        tiny[0](**call)


def test_positional_arguments_are_refused(tiny):
    with sparse_attention(tiny[0], p=0.5), pytest.raises(ValueError, match="keyword arguments"):
        tiny[0](torch.tensor([[70]]))


def test_a_static_cache_is_refused(tiny, inputs):
    with sparse_attention(tiny[0], p=0.5), pytest.raises(ValueError, match="static cache cannot be pruned"):
        tiny[0].generate(**inputs, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("p", [0.0, -1.0, 1.5, float("nan"), torch.tensor([0.5, 2.0]), torch.ones(2, 2)])
def test_a_budget_out_of_range_is_refused_before_anything_runs(tiny, p):
    expected = state(tiny[0])
    with pytest.raises(ValueError, match=r"budget p must be in \(0, 1\]"), sparse_attention(tiny[0], p=p):
        pytest.fail("the block was entered")
    assert state(tiny[0]) == expected


@pytest.mark.parametrize("override", [{"rule": "top_q"}, {"protect_last": 0}, {"sigma": 1.0}, {"prefill": None}])
def test_a_setting_that_does_not_exist_is_refused(tiny, override):
    with pytest.raises(ValueError, match=next(iter(override))), sparse_attention(tiny[0], **override):
        pytest.fail("the block was entered")


def test_a_family_without_images_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1))
    with pytest.raises(UnsupportedModelError, match="not a vision-language model"), sparse_attention(model):
        pytest.fail("the block was entered")


def test_attention_dropout_is_refused(tiny):
    model, _ = tiny
    attention = model.model.language_model.layers[0].self_attn
    attention.attention_dropout = 0.1
    model.train()
    try:
        with sparse_attention(model, p=0.5), pytest.raises(ValueError, match="attention dropout"):
            model(input_ids=torch.tensor([[70, 71]]))
    finally:
        attention.attention_dropout = 0.0
        model.eval()
