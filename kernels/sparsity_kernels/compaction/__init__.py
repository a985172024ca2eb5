"""Compaction: the kept keys and values of a layer, in a ragged cache that grows in place (README.md)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsity_kernels.backend import TRITON_DTYPES, Impl, runs_triton
from sparsity_kernels.checks import DTYPES, form
from sparsity_kernels.compaction.ragged import CapacityError, RaggedCache, extents, implementation, on_device

__all__ = ["CapacityError", "RaggedCache", "compact"]

Layout = Literal["auto", "packed", "rectangular"]
_LAYOUTS = ("auto", "packed", "rectangular")


@torch.no_grad()
def compact(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    room: int = 0,
    impl: Impl = "auto",
    layout: Layout = "auto",
    lengths: list[int] | None = None,
) -> RaggedCache:
    """The kept positions of a layer's keys and values, in ascending order, in storage of their own.

    Args:
        key, value: (batch, kv_heads, length, dim) float32, bfloat16 or float16 (eager also float64), last dim
            contiguous. The copy is detached: nothing flows back through it.
        kept: (batch, length) bool.
        room: free entries behind every row, for `RaggedCache.append`.
        impl: see `sparsity_kernels.backend` (float64: eager); also what the cache itself uses.
        layout: ``packed``: a row owns its kept entries and ``room``. ``rectangular``: every row owns as many entries as
            the longest needs, so that the buffer is also a plain padded cache. ``auto``: packed under Triton,
            rectangular under eager.
        lengths: ``kept.sum(-1).tolist()`` where the caller has it on the host already: the buffer is sized from it, and
            without it a GPU makes the host wait once. With it nothing waits under Triton; eager does.

    Returns:
        the cache; entries that are not stored are zero.

    Raises:
        ValueError: a row keeps nothing, or shapes, dtypes, devices or strides do not fit. On the CPU also if
            ``lengths`` are not those of ``kept``; on a GPU wrong lengths give a wrong cache, but stay inside it.
    """
    _check(key, value, kept, room, layout)
    on_triton = runs_triton(impl, key, value, kept, dtypes=TRITON_DTYPES)
    if lengths is None or not kept.is_cuda:
        counted = kept.sum(-1).tolist()
        if lengths is not None and list(lengths) != counted:
            raise ValueError(f"lengths must be those of kept, {counted}, got {list(lengths)}")
        lengths = counted
    lengths = list(lengths)
    if len(lengths) != len(kept):
        raise ValueError(f"lengths must be one for each of {len(kept)} rows, got {len(lengths)}")
    for row, stored in enumerate(lengths):
        if stored < 1:
            raise ValueError(f"row {row} keeps no token; protect at least the last one")
    packed = on_triton if layout == "auto" else layout == "packed"
    capacity = [(stored if packed else max(lengths)) + room for stored in lengths]
    owned, start = extents(capacity, key.device)
    length = on_device(lengths, torch.int32, key.device)
    source = _source(kept, start, length, sum(capacity))
    gathered = implementation(on_triton).gather_entries(key, value, source)
    slots = torch.where(source < 0, -1, source.remainder(kept.shape[1])).int()
    return RaggedCache(*gathered, slots, start, length, owned, capacity, lengths, impl)


def _source(kept: Tensor, start: Tensor, length: Tensor, entries: int) -> Tensor:
    """(entries,) int64: which b * length + slot each entry of the cache comes from, -1 for free ones."""
    place = kept.cumsum(-1) - 1
    stored = kept & (place < length[:, None])
    entry = torch.where(stored, start[:, None] + place, entries)  # one more entry takes those that are not kept
    source = torch.full((entries + 1,), -1, dtype=torch.int64, device=kept.device)
    source.scatter_(0, entry.view(-1), torch.arange(kept.numel(), device=kept.device))
    return source[:entries]


def _check(key: Tensor, value: Tensor, kept: Tensor, room: int, layout: Layout) -> None:
    if key.ndim != 4 or key.shape != value.shape or key.dtype != value.dtype or key.dtype not in DTYPES:
        allowed = "(batch, kv_heads, length, dim) of one shape and one dtype of float32, bfloat16, float16, float64"
        raise ValueError(f"key and value must be {allowed}, got {form(key)}, {form(value)}")
    if kept.dtype != torch.bool or kept.shape != (key.shape[0], key.shape[2]) or kept.numel() == 0:
        shape = (key.shape[0], key.shape[2])
        raise ValueError(f"kept must be (batch, length) = {shape} bool and not empty, got {form(kept)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {tensor.stride()}")
    if room < 0:
        raise ValueError(f"room must not be negative, got {room}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
