"""Prompts cut at the end of the visual prefix are the same prompts."""

from __future__ import annotations

import pytest
import torch
from scenes import prompts_of
from tiny_prompts import TEXT_ONLY, encode, extend, mixed_questions, sharp_model

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.generation.forward import run_prefix, run_rest
from sparsity_forcing.generation.prompts import build_prompts
from sparsity_forcing.models.families import FAMILIES, visual_token_ids
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

SUFFIX = SparsityParams()


def test_no_row_loses_or_reorders_anything(policy):
    model, processor = policy
    inputs = encode(processor, mixed_questions())
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    layout = PromptLayout.from_tokens(inputs["input_ids"], inputs["attention_mask"], visual_token_ids(model.config))
    prompts = prompts_of(model, processor, mixed_questions(), SUFFIX)
    for row in range(prompts.queries):
        old, new = layout.valid[row], prompts.layout.valid[row]
        assert torch.equal(prompts.input_ids[row, new], inputs["input_ids"][row, old])
        assert torch.equal(prompts.position_ids[:, row, new], positions[:, row, old])
        assert torch.equal(prompts.layout.visual[row, new], layout.visual[row, old])
        assert torch.equal(prompts.layout.prefix[row, new], layout.prefix[row, old])
        assert prompts.next_position[row] == positions[:, row, old].max() + 1
        assert not (prompts.layout.visual[row] & ~new).any()
    assert torch.equal(prompts.layout.seeds, layout.seeds)


def test_every_prefix_ends_in_the_same_column(policy):
    prompts = prompts_of(*policy, mixed_questions(), SUFFIX)
    layout = prompts.layout
    assert torch.equal(layout.prefix[:, : prompts.prefix], layout.valid[:, : prompts.prefix])
    assert not layout.prefix[:, prompts.prefix :].any()
    assert layout.visual[:3, prompts.prefix - 1].all()
    assert layout.valid[:, -1].all()
    assert not layout.valid[3, : prompts.prefix].any()  # a text-only prompt has no prefix


@pytest.mark.parametrize(
    "settings", [{"prefill": "sparse"}, {"scoring_rows": "probe"}, {"prefill": "dense", "scoring_rows": "all"}]
)
def test_where_the_prefix_depends_on_the_budget_nothing_is_cut(policy, settings):
    model, processor = policy
    prompts = prompts_of(model, processor, mixed_questions(), SparsityParams(**settings))
    assert prompts.prefix == 0
    assert torch.equal(prompts.input_ids, encode(processor, mixed_questions())["input_ids"])
    assert prompts.layout.prefix[:3].any()


def test_prompts_without_images_have_no_prefix_and_no_media(policy):
    prompts = prompts_of(*policy, [TEXT_ONLY, ("why?", [])], SUFFIX)
    assert (prompts.prefix, prompts.media) == (0, {})
    assert prompts.next_position.tolist() == prompts.layout.valid.sum(-1).tolist()


@pytest.mark.parametrize("encode_images", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_equal_one_pass_of_plain_transformers(family, encode_images):
    model, processor = sharp_model(family)
    questions = mixed_questions()
    inputs = encode(processor, questions)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(10, 200, (4, 3), generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        plain = model(**extend(inputs, completions, mask)).logits[:, -4:]
        with decoder_attention(model):
            prompts = prompts_of(model, processor, questions, SUFFIX, encode_images)
            cache = run_prefix(model, prompts, group=1)
            found = run_rest(model, prompts, 1, cache, completions, mask, None, keep=4)
    assert prompts.prefix > 0
    real = torch.cat([torch.ones(4, 1, dtype=torch.bool), mask], dim=1)
    torch.testing.assert_close(found[real], plain[real], rtol=0, atol=1e-6)  # rotary angles are float32


@pytest.mark.parametrize("chosen", [[2], [1, 1, 3, 0], [3], [2, 2, 1, 0, 3, 0]])
@pytest.mark.parametrize("family", FAMILIES)
def test_taken_prompts_are_those_prompts_with_their_images(family, chosen):
    """Against the same rows of a batch with all of them, and of one that was built of them."""
    model, processor = sharp_model(family)
    questions = mixed_questions()
    for settings in (SUFFIX, SparsityParams(prefill="sparse")):
        whole = prompts_of(model, processor, questions, settings)
        taken = whole.take(torch.tensor(chosen))
        built = prompts_of(model, processor, [questions[place] for place in chosen], settings)
        with torch.no_grad(), decoder_attention(model):
            every, found, alone = (
                run_rest(model, prompts, 1, run_prefix(model, prompts, 1), None, None, None, keep=1)
                for prompts in (whole, taken, built)
            )
        torch.testing.assert_close(found, every[chosen], rtol=0, atol=1e-12)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)  # rotary angles are float32
        assert torch.equal(taken.layout.seeds, built.layout.seeds)
        assert torch.equal(taken.next_position, built.next_position)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_image_beside_a_video_is_left_to_the_passes(family):
    """The second of two images as a video of one frame, which has the same patches."""
    model, processor = sharp_model(family)
    (question,) = (question for question in mixed_questions() if len(question[1]) == 2)
    inputs = encode(processor, [question])
    ids, kinds, first = inputs["input_ids"][0], inputs["mm_token_type_ids"][0], int(inputs["image_grid_thw"][0].prod())
    second = ((ids == model.config.image_token_id).cumsum(0) > first // 4) & (ids == model.config.image_token_id)
    ids[second], kinds[second] = model.config.video_token_id, 2
    for name, cut in (("pixel_values", first), ("image_grid_thw", 1)):
        video = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}[name]
        inputs[name], inputs[video] = inputs[name][:cut], inputs[name][cut:]
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        with decoder_attention(model):
            prompts = build_prompts(model, dict(inputs), SUFFIX)
            found = run_rest(model, prompts, 1, run_prefix(model, prompts, 1), None, None, None, keep=1)[:, 0]
    assert prompts.prefix > 0
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


def test_pixels_are_not_divided_over_prompts(policy):
    prompts = prompts_of(*policy, mixed_questions(), SUFFIX, encode_images=False)
    with pytest.raises(ValueError, match="only encoded images can be divided over prompts, got image_grid_thw, pixel"):
        prompts.take(torch.tensor([0]))
    assert prompts.take(torch.tensor([3]), media={}).media == {}
