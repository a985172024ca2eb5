"""The rules that turn attention mass into a kept set."""

from __future__ import annotations

import torch
from sparsity_kernels import Impl, keep_highest, top_p_count
from torch import Tensor

from sparsity_forcing.params import RankBy, Rule


def select(
    mass: Tensor,
    seen_by: Tensor,
    droppable: Tensor,
    p: Tensor,
    rule: Rule = "top_p",
    rank_by: RankBy = "normalized",
    impl: Impl = "auto",
) -> Tensor:
    """The droppable tokens that a layer keeps.

    - ``top_p``: b tokens, b the smallest count whose largest raw masses reach p of the droppable mass.
    - ``top_k``: ceil(p · |D|) tokens, D the droppable ones.
    - ``threshold``: the tokens with at least (1 − p) of the largest droppable mass.

    Under ``top_p`` and ``top_k`` the kept tokens are those that rank highest: ``normalized`` ranks by mass divided by
    the number of scoring rows that see the token (ZipVL, arXiv 2410.08584), ``raw`` by mass. Ties go to the lower
    index. At p = 1 every rule keeps everything.

    Args:
        mass: (batch, length), finite where droppable; taken as float32.
        seen_by: (batch, length) number of scoring rows that see the token.
        droppable: (batch, length) bool.
        p: (batch,) float32 in (0, 1], or (batch, budgets): several budgets for one mass.

    Returns:
        (batch, length) or (batch, budgets, length) bool, never True outside ``droppable``. On a GPU nobody waits for
        it: that mass is finite and p in range is the caller's to see to (`SparseContext` does).

    Raises:
        ValueError: on the CPU, a mass is not finite or p is outside (0, 1].
    """
    mass, p = mass.float(), p.float()  # the same sets on every device and whatever the model's precision
    if not mass.is_cuda:
        if not bool(((p > 0) & (p <= 1)).all()):
            raise ValueError(f"budget p must be in (0, 1], got {p.tolist()}")
        if not bool(torch.isfinite(mass.masked_fill(~droppable, 0)).all()):
            raise ValueError("attention mass is not finite: the model's attention logits hold NaN or infinity")
    budgets = p if p.ndim == 2 else p[:, None]
    if rule == "threshold":
        largest = mass.masked_fill(~droppable, 0).amax(-1)
        kept = droppable[:, None] & (mass[:, None] >= ((1 - budgets) * largest[:, None])[..., None])
        return kept if p.ndim == 2 else kept[:, 0]
    if rule == "top_k":
        rounding = 1 - torch.finfo(torch.float32).eps / 2  # 0.1 in float32 is above a tenth: not a token more for that
        count = torch.ceil(budgets.double() * rounding * droppable.sum(-1, keepdim=True)).long().view_as(p)
    else:
        count = top_p_count(mass, droppable, p, impl)
    rank = mass / seen_by.clamp_min(1) if rank_by == "normalized" else mass
    return keep_highest(rank, droppable, count, impl)
