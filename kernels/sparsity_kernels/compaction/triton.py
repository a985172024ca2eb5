"""Triton kernels of compaction (README.md has the layout). Same functions as `eager`; no host sync."""

# ruff: noqa: N803  (constexpr arguments are in capitals)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity_kernels.backend import device_of

if TYPE_CHECKING:
    from sparsity_kernels.compaction.ragged import RaggedCache

_TILE = 4096  # elements of K, and as many of V, that a program moves at once


def gather_entries(key: Tensor, value: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """See `sparsity_kernels.compaction.eager.gather_entries`."""
    _, heads, length, dim = key.shape
    entries = len(source)
    new_key = torch.empty(entries, heads, dim, dtype=key.dtype, device=key.device)
    new_value = torch.empty_like(new_key)
    block_dim = triton.next_power_of_2(dim)
    block = max(1, min(_TILE // block_dim, 64))
    with device_of(key):
        _gather_kernel[(triton.cdiv(entries, block), heads)](
            *(key, value, source, new_key, new_value, entries, length),
            *key.stride()[:3],
            *value.stride()[:3],
            HEADS=heads,
            DIM=dim,
            BLOCK=block,
            BLOCK_DIM=block_dim,
            num_warps=4,
        )
    return new_key, new_value


def write_entries(cache: RaggedCache, key: Tensor, value: Tensor, slots: Tensor | None) -> None:
    """Writes (batch, kv_heads, new, dim) behind the stored entries of every row, as far as its capacity goes."""
    batch, heads, new, dim = key.shape
    block_dim = triton.next_power_of_2(dim)
    block_heads = max(1, min(triton.next_power_of_2(heads), _TILE // block_dim))
    with_slots = slots is not None
    with device_of(key):
        _write_kernel[(new, batch, triton.cdiv(heads, block_heads))](
            *(cache.key, cache.value, cache.slots, cache.start, cache.length, cache.owned),
            *(key, value, slots if with_slots else cache.slots),
            *key.stride()[:3],
            *value.stride()[:3],
            *(slots.stride() if with_slots else (0, 0)),
            HEADS=heads,
            DIM=dim,
            BLOCK_HEADS=block_heads,
            BLOCK_DIM=block_dim,
            WITH_SLOTS=with_slots,
            num_warps=4 if block_heads * block_dim > 1024 else 2,
        )


@triton.jit(do_not_specialize=["entries", "length"])
def _gather_kernel(
    p_key,  # (batch, heads, length, dim), any strides but the last
    p_value,
    p_source,  # (entries,) int64
    p_new_key,  # (entries, heads, dim)
    p_new_value,
    entries,
    length,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    i_head = tl.program_id(1).to(tl.int64)
    o_entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_dim = tl.arange(0, BLOCK_DIM)
    b_source = tl.load(p_source + o_entry, mask=o_entry < entries, other=-1)  # [BLOCK]
    m_stored = b_source >= 0
    b_row = tl.where(m_stored, b_source, 0) // length
    b_slot = tl.where(m_stored, b_source, 0) - b_row * length
    m_dim = (o_dim < DIM)[None, :]
    m_load = m_stored[:, None] & m_dim
    o_key = b_row * key_stride_b + b_slot * key_stride_n + i_head * key_stride_h
    b_key = tl.load(p_key + o_key[:, None] + o_dim[None, :], mask=m_load, other=0.0)  # [BLOCK, BLOCK_DIM]
    o_value = b_row * value_stride_b + b_slot * value_stride_n + i_head * value_stride_h
    b_value = tl.load(p_value + o_value[:, None] + o_dim[None, :], mask=m_load, other=0.0)
    o_new = (o_entry * HEADS + i_head)[:, None] * DIM + o_dim[None, :]
    m_new = (o_entry < entries)[:, None] & m_dim
    tl.store(p_new_key + o_new, b_key, mask=m_new)
    tl.store(p_new_value + o_new, b_value, mask=m_new)


@triton.jit
def _write_kernel(
    p_key,  # (entries, heads, dim)
    p_value,
    p_slots,  # (entries,) int32
    p_start,  # (batch,) int64
    p_length,  # (batch,) int32
    p_owned,  # (batch,) int32
    p_new_key,  # (batch, heads, new, dim), any strides but the last
    p_new_value,
    p_new_slots,  # (batch, new) int32 or int64
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    slots_stride_b,
    slots_stride_n,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WITH_SLOTS: tl.constexpr,
):
    i_new = tl.program_id(0).to(tl.int64)
    i_row = tl.program_id(1).to(tl.int64)
    o_head = (tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    o_dim = tl.arange(0, BLOCK_DIM)[None, :]
    place = tl.load(p_length + i_row) + i_new
    has_room = place < tl.load(p_owned + i_row)  # behind it lie the entries of the next row
    m_new = (o_head < HEADS) & (o_dim < DIM) & has_room
    entry = tl.load(p_start + i_row) + place
    o_key = i_row * key_stride_b + o_head * key_stride_h + i_new * key_stride_n + o_dim
    b_key = tl.load(p_new_key + o_key, mask=m_new)  # [BLOCK_HEADS, BLOCK_DIM]
    o_value = i_row * value_stride_b + o_head * value_stride_h + i_new * value_stride_n + o_dim
    b_value = tl.load(p_new_value + o_value, mask=m_new)
    o_entry = (entry * HEADS + o_head) * DIM + o_dim
    tl.store(p_key + o_entry, b_key, mask=m_new)
    tl.store(p_value + o_entry, b_value, mask=m_new)
    if WITH_SLOTS:
        slot = tl.load(p_new_slots + i_row * slots_stride_b + i_new * slots_stride_n)
        tl.store(p_slots + entry, slot.to(tl.int32), mask=has_room & (tl.program_id(2) == 0))
