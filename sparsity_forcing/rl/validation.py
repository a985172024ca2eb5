"""Accuracy and token ratios of greedy answers at the deployment budget, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from sparsity_forcing.data.schema import Row
from sparsity_forcing.rl.batches import share_of
from sparsity_forcing.rl.sampler import Sampler

VALIDATED = ("accuracy", "token_ratio", "visual_token_ratio")


@torch.no_grad()
def validate(
    sampler: Sampler, rows: Sequence[Row], score: Callable[[str, str], float], accelerator: Accelerator
) -> dict[str, float]:
    """Means over all ``rows``. Each process answers its share; the shares may differ in length, nobody waits inside."""
    own = share_of(rows, accelerator.process_index, accelerator.num_processes)
    size = sampler.config.validation_batch_size
    totals = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(own), size):
        part = own[start : start + size]
        found = sampler.deployed(part)
        right = sum(score(text, row.answer) for text, row in zip(sampler.texts(found), part, strict=True))
        visual = found.visual_token_ratio.nan_to_num(1.0)
        totals += torch.tensor([right, float(found.token_ratio.sum()), float(visual.sum()), len(part)])
    totals = accelerator.gather(totals[None].to(accelerator.device)).sum(0).cpu()
    return {name: float(value / totals[3]) for name, value in zip(VALIDATED, totals[:3], strict=True)}
