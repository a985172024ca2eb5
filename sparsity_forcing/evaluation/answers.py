"""One batch of questions through a model under a method: the answers, and what was kept for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity_forcing.methods import Method
from sparsity_forcing.models.families import visual_token_ids
from sparsity_forcing.models.prompts import encode_messages, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from sparsity_forcing.attention.stats import SparseStats


@dataclass(frozen=True)
class Answer:
    """What a model generated for one question. Token counts leave padding out; ratios are in 0-1.

    ``layer_ratio`` and ``layer_visual_ratio`` hold one ratio per decoder layer, ``token_ratio`` and
    ``visual_token_ratio`` their means. Visual ratios are None for a prompt without visual tokens.
    ``new_tokens`` counts the end token where there is one.
    """

    text: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    token_ratio: float
    visual_token_ratio: float | None
    layer_ratio: tuple[float, ...]
    layer_visual_ratio: tuple[float, ...] | None


def answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Sequence[Sequence[dict]],
    method: Method,
    generation: Mapping[str, object],
) -> list[Answer]:
    """Generates one answer per conversation with ``method``.

    Args:
        conversations: messages as `models.prompts.encode_messages` takes them.
        generation: keyword arguments of ``model.generate``, e.g. ``max_new_tokens``.
    """
    inputs = to_device(encode_messages(processor, conversations), model)
    with method.attend(model) as stats:
        sequences = model.generate(**inputs, **generation)
    prompt = inputs["input_ids"].shape[1]
    new_ids = sequences[:, prompt:].cpu()
    lengths = _lengths(new_ids, model)
    texts = processor.tokenizer.batch_decode(
        [row[:length] for row, length in zip(new_ids, lengths, strict=True)],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    valid = inputs["attention_mask"].bool()
    visual = valid & torch.isin(inputs["input_ids"], torch.tensor(visual_token_ids(model.config), device=valid.device))
    layers = model.config.get_text_config().num_hidden_layers
    ratios = _layer_ratios(stats, layers, len(texts))
    return [
        _answer(text, *counts, *layer_ratios)
        for text, counts, layer_ratios in zip(
            texts,
            zip(valid.sum(1).tolist(), visual.sum(1).tolist(), lengths, strict=True),
            ratios,
            strict=True,
        )
    ]


def _answer(
    text: str, prompt_tokens: int, visual_tokens: int, new_tokens: int, ratio: list[float], visual_ratio: list[float]
) -> Answer:
    return Answer(
        text=text,
        prompt_tokens=prompt_tokens,
        visual_tokens=visual_tokens,
        new_tokens=new_tokens,
        token_ratio=sum(ratio) / len(ratio),
        visual_token_ratio=sum(visual_ratio) / len(visual_ratio) if visual_tokens else None,
        layer_ratio=tuple(ratio),
        layer_visual_ratio=tuple(visual_ratio) if visual_tokens else None,
    )


def _layer_ratios(stats: SparseStats | None, layers: int, batch: int) -> list[tuple[list[float], list[float]]]:
    """Per question its ratios of all and of visual tokens, one per layer; ones where everything is kept."""
    if stats is None:
        return [([1.0] * layers, [1.0] * layers)] * batch
    both = (stats.layer_ratio, stats.layer_visual_ratio)  # (layers, batch) each
    return list(zip(*(ratio.T.tolist() for ratio in both), strict=True))


def _lengths(new_ids: Tensor, model: PreTrainedModel) -> list[int]:
    """Generated tokens of each row of (batch, new), up to and with the first end token."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return [new_ids.shape[1]] * len(new_ids)
    ended = torch.isin(new_ids, torch.tensor(ends)).int()
    first = ended.argmax(1) + 1
    return torch.where(ended.any(1), first, new_ids.shape[1]).tolist()
