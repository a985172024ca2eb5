"""The images of a batch of prompts: encoded once, then taken along with their prompts."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

FEATURES = "mm_encoder_outputs"  # transformers' name of what is encoded already, by modality
READ = ("pooler_output", "deepstack_features")  # what models read of it


def takes_encoded(model) -> bool:
    """Whether the model's class takes encoded images; those of older transformers do not."""
    return FEATURES in inspect.signature(model.forward).parameters


@torch.no_grad()
def encode(model, media: dict) -> dict:
    """Replaces pixels by image features, where the model takes them: beside a video's pixels it does not."""
    if "pixel_values" not in media or "pixel_values_videos" in media or not takes_encoded(model):
        return media
    accepted = inspect.signature(model.model.get_image_features).parameters
    found = model.model.get_image_features(**{name: value for name, value in media.items() if name in accepted})
    read = {name: getattr(found, name, None) for name in READ}
    features = type(found)(**{name: value for name, value in read.items() if value is not None})
    rest = {name: value for name, value in media.items() if name not in accepted}
    return {**rest, FEATURES: {"image": features}}


def are_encoded(media: dict) -> bool:
    """Whether nothing is left to encode."""
    return set(media) <= {FEATURES}


def take(media: dict, visual_tokens: Tensor, queries: Tensor) -> dict:
    """The encoded images of some prompts.

    Args:
        media: of all prompts, as `encode` gives it.
        visual_tokens: (queries,) of every prompt: an image has a feature for each of its tokens.
        queries: which prompts; one may come more than once.

    Raises:
        ValueError: the images are not encoded.
    """
    if not are_encoded(media):
        raise ValueError(f"only encoded images can be divided over prompts, got {', '.join(sorted(media))}")
    if not media or not int(visual_tokens[queries].sum()):
        return {}
    features = media[FEATURES]["image"]

    def taken(of_images) -> list[Tensor] | Tensor:
        """In the container that models expect: of one (tokens, hidden) tensor a list, or a batch."""
        every = torch.cat([image.reshape(-1, image.shape[-1]) for image in of_images])
        by_prompt = every.split(visual_tokens.tolist())
        some = torch.cat([by_prompt[query] for query in queries.tolist()])
        return some[None] if isinstance(of_images, Tensor) else [some]

    found = {"pooler_output": taken(features["pooler_output"])}
    if (layers := features.get("deepstack_features")) is not None:
        found["deepstack_features"] = [taken(layer) for layer in layers]
    return {FEATURES: {"image": type(features)(**found)}}
