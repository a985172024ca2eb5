"""Accuracy and token ratios of greedy answers at the deployment budget, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch
from accelerate import Accelerator
from torch import Tensor

from sparsity_forcing.data.schema import Row
from sparsity_forcing.models.prompts import pixels
from sparsity_forcing.rl.batches import share_of
from sparsity_forcing.rl.sampler import Sampler

VALIDATED = ("accuracy", "token_ratio", "visual_token_ratio")


@torch.no_grad()
def answered(
    sampler: Sampler,
    rows: Sequence[Row],
    score: Callable[[str, str], float],
    after_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """(rows, 3) float64: score, token ratio and visual token ratio (1 without images) of every row's answer.

    Rows with images of about one size share a batch, so that little of it is padding.
    """
    size = sampler.config.validation_batch_size
    order = sorted(range(len(rows)), key=lambda place: (pixels(rows[place].images), len(rows[place].question)))
    parts = []
    for start in range(0, len(rows), size):
        part = [rows[place] for place in order[start : start + size]]
        found = sampler.deployed(part)
        after_batch()
        scores = [score(text, row.answer) for text, row in zip(sampler.texts(found), part, strict=True)]
        visual = found.visual_token_ratio.nan_to_num(1.0)
        columns = [torch.tensor(scores), found.token_ratio.cpu(), visual.cpu()]
        parts.append(torch.stack([column.double() for column in columns], dim=1))
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    return found.index_copy(0, torch.tensor(order, dtype=torch.long), torch.cat(parts)) if parts else found


def validate(
    sampler: Sampler,
    rows: Sequence[Row],
    score: Callable[[str, str], float],
    accelerator: Accelerator,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over all ``rows``. Each process answers its share, and the shares may differ in length; ``after_batch`` is
    called equally often in all of them."""
    world, size = accelerator.num_processes, sampler.config.validation_batch_size
    share = share_of(rows, accelerator.process_index, world)
    own = answered(sampler, share, score, after_batch)
    for _ in range(ceil(ceil(len(rows) / world) / size) - ceil(len(share) / size)):
        after_batch()  # another process has a batch more
    totals = torch.cat([own.sum(0), torch.tensor([len(own)], dtype=torch.float64)])
    totals = accelerator.gather(totals[None].to(accelerator.device)).sum(0).cpu()
    return {name: float(value / totals[3]) for name, value in zip(VALIDATED, totals[:3], strict=True)}
