"""What the freshly trained default model can do: its answers to questions about held-out scans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin

from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import Row
from sparsity_forcing.models.prompts import encode_prompts, to_device
from sparsity_forcing.params import DigitsParams, Phase
from sparsity_forcing.scoring import exact_match

BATCH_SIZE, MAX_NEW_TOKENS = 32, 16


def validation_questions(phase: Phase, count: int, seed: int) -> list[Row]:
    """``count`` questions about validation scans, the same share of every task and grid of ``phase``."""
    params = DigitsParams(
        grids=phase.grids, tasks=phase.tasks, grey_share=phase.grey_share, clutter_share=phase.clutter_share
    )
    return [digits_row(params, seed, "validation", place) for place in range(count)]


def validate(model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Scores (0 or 1) of the dense model's greedy answers to ``rows``, by label (task and grid)."""
    scores: dict[str, list[float]] = defaultdict(list)
    ordered = sorted(rows, key=lambda row: row.label)  # prompts of one length share a batch
    for start in range(0, len(ordered), BATCH_SIZE):
        batch = ordered[start : start + BATCH_SIZE]
        for row, answer in zip(batch, generate_answers(model, processor, batch), strict=True):
            scores[row.label].append(exact_match(answer, row.answer))
    return dict(scores)


def generate_answers(model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Row]) -> list[str]:
    """Greedy answers of the dense model to one batch of questions."""
    inputs = to_device(encode_prompts(processor, [row.question for row in rows], [row.images for row in rows]), model)
    with torch.no_grad():
        sequences = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
