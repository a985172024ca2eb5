"""Top-p selection: budgets and masses to counts, counts and ranks to kept sets (README.md has the definition)."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from sparsity_kernels.backend import Impl, runs_triton
from sparsity_kernels.checks import dtype_name, form
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
        ValueError: dtypes, shapes or devices do not fit; on the CPU also a value is not as above. On a GPU that is
            the caller's to see to, as looking would make the host wait: other values give any counts in [0, length].
    """
    _check_forms("mass", mass, droppable, "p", p, torch.float32)
    if not mass.is_cuda and p.numel():
        least, most = _ends(p)
        if not (least > 0 and most <= 1):
            raise ValueError(f"p must be in (0, 1], got {least} … {most}")
    _check_finite("mass", mass, droppable, smallest=0)
    return _module(impl, mass, droppable, p).top_p_count(mass, droppable, p)


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
        ValueError: dtypes, shapes or devices do not fit; on the CPU also a value is not as above. On a GPU that is
            the caller's to see to, as looking would make the host wait: other values give any set of droppable tokens.
    """
    _check_forms("rank", rank, droppable, "count", count, torch.int64)
    _check_finite("rank", rank, droppable, smallest=-math.inf)
    return _module(impl, rank, droppable, count).keep_highest(rank, droppable, count)


def _module(impl: Impl, *tensors: Tensor) -> ModuleType:
    if runs_triton(impl, *tensors):
        from sparsity_kernels.top_p import triton

        return triton
    return eager


def _check_forms(
    name: str, values: Tensor, droppable: Tensor, budgets_name: str, budgets: Tensor, dtype: torch.dtype
) -> None:
    if values.dtype != torch.float32 or values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must be (batch, length) float32, length at least 1, got {form(values)}")
    if droppable.dtype != torch.bool or droppable.shape != values.shape:
        raise ValueError(f"droppable must be bool of the shape of {name}, {tuple(values.shape)}, got {form(droppable)}")
    if budgets.dtype != dtype or budgets.ndim not in (1, 2) or budgets.shape[0] != values.shape[0]:
        allowed = f"(batch,) or (batch, budgets) {dtype_name(dtype)} with batch {values.shape[0]}"
        raise ValueError(f"{budgets_name} must be {allowed}, got {form(budgets)}")


def _check_finite(name: str, values: Tensor, droppable: Tensor, smallest: float) -> None:
    """On the CPU: values that count are finite and not below ``smallest``."""
    if values.is_cuda or not values.numel():
        return
    least, most = _ends(values.masked_fill(~droppable, 0.0))
    if not (least >= smallest and -math.inf < least and most < math.inf):
        least_allowed = "" if smallest < 0 else f" and at least {smallest}"
        raise ValueError(f"{name} must be finite{least_allowed} where droppable, got {least} … {most}")


def _ends(values: Tensor) -> tuple[float, float]:
    """Smallest and largest; both NaN where one is."""
    least, most = torch.aminmax(values.detach())
    return float(least), float(most)
