"""Top-p selection: budgets and masses to counts, counts and ranks to kept sets (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.backend import Impl, runs_triton
from sparsity_kernels.top_p import eager

__all__ = ["keep_highest", "top_p_count"]


def top_p_count(mass: Tensor, droppable: Tensor, p: Tensor, impl: Impl = "auto") -> Tensor:
    """Smallest count b whose b largest masses among the droppable tokens sum to at least p of their total.

    Masses are summed as integers in units of 2^-40 of the row's largest power of two, so the result does not depend on
    the order of the sum: every device and implementation finds the same count. Counts ascend with p; since
    `keep_highest` ranks independently of the count, the kept sets of ascending budgets of one mass are nested.

    Args:
        mass: (batch, length) float32, finite and not negative where droppable.
        droppable: (batch, length) bool.
        p: (batch,) or (batch, budgets) float32 budgets in (0, 1]. At p = 1 every droppable token counts, also those
            without mass.
        impl: see `sparsity_kernels.backend`.

    Returns:
        int64 counts of the shape of ``p``, at least 1; 0 where nothing is droppable.

    Raises:
        ValueError: dtypes or shapes do not fit.
    """
    _check_row("mass", mass, droppable)
    _check_budgets("p", p, torch.float32, mass)
    if runs_triton(impl, mass, droppable, p):
        from sparsity_kernels.top_p import triton

        return triton.top_p_count(mass, droppable, p)
    return eager.top_p_count(mass, droppable, p)


def keep_highest(rank: Tensor, droppable: Tensor, count: Tensor, impl: Impl = "auto") -> Tensor:
    """The ``count`` droppable tokens that rank highest; ties go to the lower index, and 0.0 ties with -0.0.

    Args:
        rank: (batch, length) float32, finite where droppable.
        droppable: (batch, length) bool.
        count: (batch,) or (batch, budgets) int64. Counts outside [0, droppable tokens] are taken as the nearest end.
        impl: see `sparsity_kernels.backend`.

    Returns:
        (batch, length) or (batch, budgets, length) bool, True for the tokens that stay; never True outside
        ``droppable``. Of two counts of one row the larger one's set contains the smaller one's.

    Raises:
        ValueError: dtypes or shapes do not fit.
    """
    _check_row("rank", rank, droppable)
    _check_budgets("count", count, torch.int64, rank)
    if runs_triton(impl, rank, droppable, count):
        from sparsity_kernels.top_p import triton

        return triton.keep_highest(rank, droppable, count)
    return eager.keep_highest(rank, droppable, count)


def _check_row(name: str, values: Tensor, droppable: Tensor) -> None:
    if values.dtype != torch.float32 or values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must be (batch, length) float32, length at least 1, got {_form(values)}")
    if droppable.dtype != torch.bool or droppable.shape != values.shape:
        raise ValueError(
            f"droppable must be bool of the shape of {name}, {tuple(values.shape)}, got {_form(droppable)}"
        )


def _check_budgets(name: str, budgets: Tensor, dtype: torch.dtype, values: Tensor) -> None:
    if budgets.dtype != dtype or budgets.ndim not in (1, 2) or budgets.shape[0] != values.shape[0]:
        allowed = f"(batch,) or (batch, budgets) {str(dtype).removeprefix('torch.')} with batch {values.shape[0]}"
        raise ValueError(f"{name} must be {allowed}, got {_form(budgets)}")


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
