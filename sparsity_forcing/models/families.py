"""The families of vision-language models that this library runs, in one place.

A family is supported when its decoder layers call transformers' attention interface with full causal attention, and
its image and video features replace placeholder tokens of the prompt. Each entry is tested with its real class.
To add one: name it here, give it a tiny configuration in tests/models/conftest.py, run tests/models and
tests/attention.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl")
DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2", "qwen3", "llama", "mistral")


class ModelError(ValueError):
    """A model cannot be loaded; the message names the model, what is wrong with it and the fix."""


class UnsupportedModelError(ModelError):
    """The model is whole, but of a family that sparse attention does not support."""


def require_supported(config: PretrainedConfig, name: str = "the model") -> None:
    """Raises UnsupportedModelError unless ``config`` is of a supported family; ``name`` says whose it is."""
    family = config.model_type
    supported = f"Supported families: {', '.join(FAMILIES)}."
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} ({family!r}) is an encoder-decoder model; a decoder-only vision-language model is needed. "
            + supported
        )
    if family not in FAMILIES:
        has_vision = getattr(config, "vision_config", None) is not None
        what = "is not a supported vision-language family" if has_vision else "is not a vision-language model"
        raise UnsupportedModelError(f"{name}: {family!r} {what}. {supported}")
    decoder = config.get_text_config(decoder=True)
    if decoder.model_type not in DECODERS:
        raise UnsupportedModelError(
            f"{name} ({family!r}) has a {decoder.model_type!r} decoder. Supported decoders: {', '.join(DECODERS)}."
        )
    if _has_sliding_layers(decoder):
        raise UnsupportedModelError(
            f"{name} ({family!r}) has sliding-window attention layers in its decoder; only full attention is supported"
        )


def _has_sliding_layers(decoder: PretrainedConfig) -> bool:
    layer_types = getattr(decoder, "layer_types", None)
    if layer_types is not None:
        return any(kind != "full_attention" for kind in layer_types)
    return getattr(decoder, "sliding_window", None) is not None


def visual_token_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """The token ids whose embeddings image and video features replace: the visual tokens of a prompt."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(token for token in ids if token is not None)


def freeze_vision(model: PreTrainedModel) -> None:
    """Freezes all that turns pixels into visual tokens: the tower, a projector, what separates rows of an image."""
    decoder = {id(parameter) for parameter in model.model.language_model.parameters()}
    for parameter in model.model.parameters():
        if id(parameter) not in decoder:
            parameter.requires_grad_(False)
