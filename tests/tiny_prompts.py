"""Small exact models and mixed batches of prompts, for tests of the core."""

from __future__ import annotations

import numpy as np
import torch
from tiny_families import build_family
from torch import Tensor

from sparsity_forcing.data.digits import load_scans, render
from sparsity_forcing.models.prompts import encode_prompts

Question = tuple[str, list[bytes]]
TEXT_ONLY: Question = ("how many digits are red?", [])


def sharp_model(family: str = "qwen2_5_vl", dtype: torch.dtype = torch.float64):
    """A two-layer random model and its processor. Queries are scaled up: attention is far from uniform, so that layers,
    rows and budgets keep different sets."""
    model, processor = build_family(family)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 12
    return model.to(dtype), processor


def question(grid: int, task: str = "read", seed: int = 0, images: int = 1) -> Question:
    """A question about ``images`` canvases of ``grid`` x ``grid`` cells, one visual token per cell."""
    rng = np.random.default_rng([seed, grid])
    canvases = [render(rng, load_scans("train"), grid, task) for _ in range(images)]
    return canvases[-1].question, [canvas.png() for canvas in canvases]


def mixed_questions() -> list[Question]:
    """Other image sizes, other text lengths, two images, no image: every row is padded differently."""
    return [question(4), question(6, "sum"), question(3, "count", images=2), TEXT_ONLY]


def encode(processor, questions: list[Question], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Left-padded inputs with pixels in the model's precision."""
    inputs = encode_prompts(processor, [text for text, _ in questions], [images for _, images in questions])
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def extend(inputs: dict[str, Tensor], completions: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The inputs of prompt + completion in one pass, as plain transformers wants them."""
    mask = torch.ones_like(completions) if mask is None else mask.long()
    extended = dict(inputs)
    extended["input_ids"] = torch.cat([inputs["input_ids"], completions], dim=1)
    extended["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        extended["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(completions)], dim=1)
    return extended
