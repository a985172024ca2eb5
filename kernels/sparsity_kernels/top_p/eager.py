"""Eager reference of top-p selection (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor

_FRACTION_BITS = 40


def top_p_count(mass: Tensor, droppable: Tensor, p: Tensor) -> Tensor:
    """Smallest count b whose b largest masses among the droppable tokens sum to at least p of their total.

    Masses are summed as integers in units of 2^-40 of the row's largest power of two, so the result does not depend on
    the order of the sum: every device finds the same count.

    Args:
        mass: (batch, length) float32, finite and not negative where droppable.
        droppable: (batch, length) bool.
        p: (batch,) float32 budgets in (0, 1]. At p = 1 every droppable token counts, also those without mass.

    Returns:
        (batch,) int64 counts, at least 1; 0 where nothing is droppable.
    """
    available = droppable.sum(-1)
    masked = mass.double().masked_fill(~droppable, 0.0)
    exponent = torch.frexp(masked.amax(-1, keepdim=True)).exponent
    units = torch.ldexp(masked, _FRACTION_BITS - exponent).round().long()
    ordered = units.sort(dim=-1, descending=True).values.cumsum(-1)
    target = p.double()[:, None] * ordered[:, -1:].double()
    count = (ordered.double() < target).sum(-1) + 1
    count = torch.where(p >= 1, available, torch.minimum(count, available))
    return torch.where(available > 0, count.clamp_min(1).minimum(available), available)


def keep_highest(rank: Tensor, droppable: Tensor, count: Tensor) -> Tensor:
    """The ``count`` droppable tokens that rank highest; ties go to the lower index.

    Args:
        rank: (batch, length) float32. droppable: (batch, length) bool. count: (batch,) int64.

    Returns:
        (batch, length) bool, True for the tokens that stay; never True outside ``droppable``.
    """
    order = rank.masked_fill(~droppable, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(rank.shape[-1], device=rank.device).expand_as(order))
    return (place < count[:, None]) & droppable
