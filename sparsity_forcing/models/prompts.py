"""Rows to model inputs: the one place where questions and images become tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_pil(image: bytes | Image.Image) -> Image.Image:
    """A PNG or JPEG byte string, or an image, in RGB and upright: turned as its EXIF orientation says."""
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    return ImageOps.exif_transpose(image).convert("RGB")


def pixels(images: Sequence[bytes | Image.Image]) -> int:
    """Pixels of all images together, read from their headers."""
    opened = [Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image for image in images]
    return sum(image.width * image.height for image in opened)


def question_messages(question: str, images: Sequence[bytes | Image.Image]) -> list[dict]:
    """The conversation of one question: images first, then the question."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def encode_prompts(processor, questions: Sequence[str], images: Sequence[Sequence[bytes | Image.Image]]) -> dict:
    """Left-padded model inputs of a batch of questions with their images, as `encode_messages` gives them."""
    return encode_messages(processor, [question_messages(*row) for row in zip(questions, images, strict=True)])


def encode_messages(processor, conversations: Sequence[Sequence[dict]]) -> dict:
    """Left-padded model inputs of a batch of conversations, each ending before the assistant's turn.

    A message is ``{"role": …, "content": text or parts}``, a part ``{"type": "text", "text": …}`` or ``{"type":
    "image", "image": bytes or image}``. The family's chat template is applied; images keep their places.

    Returns the processor's tensors: ``input_ids`` and ``attention_mask`` (batch, prompt), and the family's own
    (``pixel_values``, ``image_grid_thw``, ``mm_token_type_ids``, …).
    """
    templates, images = [], []
    for conversation in conversations:
        template = []
        for message in conversation:
            parts = message["content"]
            if not isinstance(parts, str):
                images += [to_pil(part["image"]) for part in parts if part["type"] == "image"]
                parts = [{"type": "image"} if part["type"] == "image" else part for part in parts]
            template.append({"role": message["role"], "content": parts})
        templates.append(processor.apply_chat_template(template, add_generation_prompt=True, tokenize=False))
    inputs = processor(text=templates, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    return dict(inputs)


def to_device(inputs: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The inputs on the model's device, floating-point ones (pixels) in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def append_answers(processor, inputs: dict, answers: Sequence[str]) -> tuple[dict, torch.Tensor]:
    """Prompts followed by their answers and the end token, with labels for supervised training.

    Returns the inputs with ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` extended to (batch, prompt +
    answer), and labels of the same shape: -100 everywhere but on answer tokens.
    """
    answer, valid = answer_tokens(processor.tokenizer, answers)
    mask = inputs["attention_mask"]
    extended = dict(inputs)
    extended["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    extended["attention_mask"] = torch.cat([mask, valid.to(mask.dtype)], dim=1)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        extended["mm_token_type_ids"] = torch.cat([types, types.new_zeros(answer.shape)], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer.masked_fill(~valid, -100)], dim=1)
    return extended, labels


def answer_tokens(tokenizer, answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, longest) ids of the answers, each with its end token and then padding; bool, where they are real."""
    ids = [[*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for answer in answers]
    tokens = torch.full((len(ids), max(map(len, ids))), tokenizer.pad_token_id, dtype=torch.long)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    for row, answer in enumerate(ids):
        tokens[row, : len(answer)] = torch.tensor(answer)
        valid[row, : len(answer)] = True
    return tokens, valid
