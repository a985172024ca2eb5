"""Every supported family with its real class; every other kind of model refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import build_family
from transformers import Gemma3Config, LlavaConfig, MistralConfig, Qwen2Config, Qwen2VLConfig, T5Config

from sparsity_forcing.generation.encoded_images import encode
from sparsity_forcing.models.families import (
    FAMILIES,
    UnsupportedModelError,
    freeze_vision,
    require_supported,
    visual_token_ids,
)
from sparsity_forcing.models.load import load
from sparsity_forcing.models.prompts import encode_prompts


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loaded_with_the_real_classes(family, tmp_path, image):
    saved, processor = build_family(family)
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded_processor = load(tmp_path, device="cpu")
    assert (type(model), type(loaded_processor)) == (type(saved), type(processor))
    assert not model.training
    assert model.config._attn_implementation == "sdpa"

    inputs = encode_prompts(loaded_processor, ["which digit is red?", "why?"], [[image], [image, image]])
    one, two = torch.isin(inputs["input_ids"], torch.tensor(visual_token_ids(model.config))).sum(1).tolist()
    assert two == 2 * one > 0
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, saved(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_vision_leaves_exactly_the_weights_that_learn_from_encoded_images(family, image):
    model, processor = build_family(family)
    freeze_vision(model)
    inputs = encode_prompts(processor, ["which digit is red?"], [[image]])
    media = {name: value for name, value in inputs.items() if "pixel" in name or "image" in name}
    rest = {name: value for name, value in inputs.items() if name not in media}
    model(**rest, **encode(model, media)).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if "language_model" not in name} <= {"lm_head.weight"}
    assert any("language_model" in name for name in learning)


@pytest.mark.parametrize(
    "config, message",
    [
        (Qwen2Config(), "'qwen2' is not a vision-language model"),
        (T5Config(), "'t5'.* is an encoder-decoder model"),
        (Gemma3Config(), "'gemma3' is not a supported vision-language family"),
        (LlavaConfig(text_config=MistralConfig(sliding_window=8)), "sliding-window attention"),
        (LlavaConfig(text_config={"model_type": "gemma"}), "'gemma' decoder"),
        (
            Qwen2VLConfig(text_config={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
            "sliding-window attention",
        ),
    ],
)
def test_other_models_are_refused_by_name(config, message):
    with pytest.raises(UnsupportedModelError, match=f"models/mine.*{message}"):
        require_supported(config, "models/mine")
