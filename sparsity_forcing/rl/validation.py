"""Accuracy and token ratios of greedy answers at the deployment budget, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from sparsity_forcing.data.schema import Row
from sparsity_forcing.models.prompts import pixels
from sparsity_forcing.rl.batches import share_of
from sparsity_forcing.rl.sampler import Sampler

VALIDATED = ("accuracy", "token_ratio", "visual_token_ratio")


@torch.no_grad()
def answered(sampler: Sampler, rows: Sequence[Row], score: Callable[[str, str], float]) -> Tensor:
    """(rows, 3) float64: score, token ratio and visual token ratio (1 without images) of every row's answer.

    Rows with images of about one size share a batch, so that little of it is padding.
    """
    size = sampler.config.validation_batch_size
    order = sorted(range(len(rows)), key=lambda place: (pixels(rows[place].images), len(rows[place].question)))
    parts = []
    for start in range(0, len(rows), size):
        part = [rows[place] for place in order[start : start + size]]
        found = sampler.deployed(part)
        scores = [score(text, row.answer) for text, row in zip(sampler.texts(found), part, strict=True)]
        visual = found.visual_token_ratio.nan_to_num(1.0)
        columns = [torch.tensor(scores), found.token_ratio.cpu(), visual.cpu()]
        parts.append(torch.stack([column.double() for column in columns], dim=1))
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    return found.index_copy(0, torch.tensor(order, dtype=torch.long), torch.cat(parts)) if parts else found


def validate(
    sampler: Sampler, rows: Sequence[Row], score: Callable[[str, str], float], accelerator: Accelerator
) -> dict[str, float]:
    """Means over all ``rows``. Each process answers its share; the shares may differ in length, nobody waits inside."""
    own = answered(sampler, share_of(rows, accelerator.process_index, accelerator.num_processes), score)
    totals = torch.cat([own.sum(0), torch.tensor([len(own)], dtype=torch.float64)])
    totals = accelerator.gather(totals[None].to(accelerator.device)).sum(0).cpu()
    return {name: float(value / totals[3]) for name, value in zip(VALIDATED, totals[:3], strict=True)}
