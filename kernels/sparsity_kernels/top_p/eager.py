"""Eager reference of top-p selection (README.md has the definition). Sorts once for all budgets of a row."""

from __future__ import annotations

import torch
from torch import Tensor

_FRACTION_BITS = 40


def top_p_count(mass: Tensor, droppable: Tensor, p: Tensor) -> Tensor:
    """See `sparsity_kernels.top_p.top_p_count`."""
    budgets = (p if p.ndim == 2 else p[:, None]).double()
    available = droppable.sum(-1, keepdim=True)
    masked = mass.double().masked_fill(~droppable, 0.0)
    exponent = torch.frexp(masked.amax(-1, keepdim=True)).exponent
    units = (masked * _power_of_two(_FRACTION_BITS - exponent)).round().long()
    reached = units.sort(dim=-1, descending=True).values.cumsum(-1).double()
    target = budgets * reached[:, -1:]
    count = torch.searchsorted(reached, target) + 1  # sums below the target, and the one that reaches it
    return torch.where(budgets >= 1, available, torch.minimum(count, available)).view(p.shape)


def keep_highest(rank: Tensor, droppable: Tensor, count: Tensor) -> Tensor:
    """See `sparsity_kernels.top_p.keep_highest`."""
    order = rank.masked_fill(~droppable, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(rank.shape[-1], device=rank.device).expand_as(order))
    place.masked_fill_(~droppable, rank.shape[-1])
    counts = count.clamp(max=rank.shape[-1])
    return place < counts[:, None] if count.ndim == 1 else place[:, None] < counts[..., None]


def _power_of_two(exponent: Tensor) -> Tensor:
    """float64 2^exponent for -1022 <= exponent <= 1023, from its bits: exact on every device, as pow need not be."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)
