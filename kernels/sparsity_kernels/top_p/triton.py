"""Triton kernels of top-p selection: bisection instead of a sort, one program per row and budget (README.md)."""

# ruff: noqa: N803  (constexpr arguments are in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity_kernels.backend import device_of

_LARGEST_BLOCK = 16384  # entries that stay in registers; longer rows read the rest again at every step,
_CHUNK = 8192  # so many at a time beside those that stay


def top_p_count(mass: Tensor, droppable: Tensor, p: Tensor) -> Tensor:
    """See `sparsity_kernels.top_p.top_p_count`."""
    mass, droppable, budgets = _rows(mass), _rows(droppable), _several(p)
    count = torch.empty_like(budgets, dtype=torch.int64)
    block, warps = _block(mass.shape[1])
    with device_of(mass):
        _count_kernel[budgets.shape](
            *(mass, droppable, budgets, count),
            *(mass.shape[1], mass.stride(0), droppable.stride(0)),
            BLOCK=block,
            CHUNK=min(block, _CHUNK),
            num_warps=warps,
        )
    return count.view(p.shape)


def keep_highest(rank: Tensor, droppable: Tensor, count: Tensor) -> Tensor:
    """See `sparsity_kernels.top_p.keep_highest`."""
    rank, droppable, counts = _rows(rank), _rows(droppable), _several(count)
    kept = torch.empty(*count.shape, rank.shape[1], dtype=torch.bool, device=rank.device)
    block, warps = _block(rank.shape[1])
    with device_of(rank):
        _keep_kernel[counts.shape](
            *(rank, droppable, counts, kept),
            *(rank.shape[1], rank.stride(0), droppable.stride(0)),
            BLOCK=block,
            num_warps=warps,
        )
    return kept


def _rows(values: Tensor) -> Tensor:
    return values if values.stride(1) == 1 else values.contiguous()


def _several(budgets: Tensor) -> Tensor:
    return (budgets if budgets.ndim == 2 else budgets[:, None]).contiguous()


def _block(length: int) -> tuple[int, int]:
    """Entries in registers and warps: 16 entries a thread, so that a row of int64 units takes 32 of its registers."""
    block = min(max(triton.next_power_of_2(length), 1024), _LARGEST_BLOCK)
    return block, max(4, block // 512)


@triton.jit
def _units(p_mass, p_droppable, o_entry, length, scale):
    """Masses as int64 units, 0 where not droppable: [BLOCK].

    ``mass * scale`` is exact in float64; adding 2^52, whose last bit is worth 1, rounds it half to even and leaves the
    integer in the low bits. (A fused multiply-add gives the same, as the product is exact.)
    """
    inside = o_entry < length
    m_droppable = tl.load(p_droppable + o_entry, mask=inside, other=0).to(tl.int1)
    b_mass = tl.load(p_mass + o_entry, mask=inside & m_droppable, other=0.0).to(tl.float64)
    b_shifted = b_mass * scale + 4503599627370496.0  # 2^52
    return b_shifted.to(tl.int64, bitcast=True) - 0x4330000000000000  # the bits of 2^52


@triton.jit
def _count_kernel(
    p_mass,  # (batch, length) float32
    p_droppable,  # (batch, length) bool
    p_budget,  # (batch, budgets) float32
    p_count,  # (batch, budgets) int64
    length,
    mass_stride,
    droppable_stride,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_budget = i_row * tl.num_programs(1) + tl.program_id(1)
    p_mass += i_row * mass_stride
    p_droppable += i_row * droppable_stride
    o_entry = tl.arange(0, BLOCK)
    o_chunk = tl.arange(0, CHUNK)

    largest = 0.0
    available = 0
    for first in range(0, length, CHUNK):
        inside = first + o_chunk < length
        m_droppable = tl.load(p_droppable + first + o_chunk, mask=inside, other=0).to(tl.int1)
        b_mass = tl.load(p_mass + first + o_chunk, mask=inside & m_droppable, other=0.0)
        largest = tl.maximum(largest, tl.max(b_mass))
        available += tl.sum(m_droppable.to(tl.int32))

    # largest = m * 2^e with 0.5 <= m < 1 has the float64 exponent bits e + 1022; 2^(40 - e) has 1023 + 40 - e.
    exponent_bits = largest.to(tl.float64).to(tl.int64, bitcast=True) >> 52
    scale_bits = tl.where(largest > 0, (2085 - exponent_bits) << 52, 0)
    scale = scale_bits.to(tl.float64, bitcast=True)

    b_units = _units(p_mass, p_droppable, o_entry, length, scale)
    total = tl.sum(b_units)
    highest = tl.max(b_units)
    for first in range(BLOCK, length, CHUNK):
        b_more = _units(p_mass, p_droppable, first + o_chunk, length, scale)
        total += tl.sum(b_more)
        highest = tl.maximum(highest, tl.max(b_more))
    budget = tl.load(p_budget + i_budget)
    target = budget.to(tl.float64) * total.to(tl.float64)

    # The largest threshold whose units at or above it reach the target: that of the last token that is needed.
    low = highest * 0
    high = highest
    while low < high:
        middle = high - (high - low) // 2
        reached = tl.sum(tl.where(b_units >= middle, b_units, 0))
        for first in range(BLOCK, length, CHUNK):
            b_more = _units(p_mass, p_droppable, first + o_chunk, length, scale)
            reached += tl.sum(tl.where(b_more >= middle, b_more, 0))
        enough = reached.to(tl.float64) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)

    above = tl.sum((b_units > low).to(tl.int32))
    above_units = tl.sum(tl.where(b_units > low, b_units, 0))
    for first in range(BLOCK, length, CHUNK):
        b_more = _units(p_mass, p_droppable, first + o_chunk, length, scale)
        above += tl.sum((b_more > low).to(tl.int32))
        above_units += tl.sum(tl.where(b_more > low, b_more, 0))

    # Of the tokens at the threshold the fewest, at least one, that reach the target.
    fewest = 1
    most = tl.maximum(available - above, 1)
    while fewest < most:
        some = (fewest + most) // 2
        enough = (above_units + some.to(tl.int64) * low).to(tl.float64) >= target
        most = tl.where(enough, some, most)
        fewest = tl.where(enough, fewest, some + 1)
    count = tl.where(budget >= 1, available, tl.minimum(above + fewest, available))
    tl.store(p_count + i_budget, count.to(tl.int64))


@triton.jit
def _ordered(p_rank, p_droppable, o_entry, length):
    """Ranks as int32 in the same order, -2^31 where not droppable: [BLOCK].

    A float's bits, read as an integer, ascend with a positive value and descend with a negative one: for those all but
    the sign are flipped. -0.0 becomes 0.0 first. No finite value maps to -2^31.
    """
    inside = o_entry < length
    m_droppable = tl.load(p_droppable + o_entry, mask=inside, other=0).to(tl.int1)
    b_bits = tl.load(p_rank + o_entry, mask=inside & m_droppable, other=0.0).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits == -0x80000000, 0, b_bits)
    return tl.where(m_droppable, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _keep_kernel(
    p_rank,  # (batch, length) float32
    p_droppable,  # (batch, length) bool
    p_count,  # (batch, budgets) int64
    p_kept,  # (batch, budgets, length) bool
    length,
    rank_stride,
    droppable_stride,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_budget = i_row * tl.num_programs(1) + tl.program_id(1)
    p_rank += i_row * rank_stride
    p_droppable += i_row * droppable_stride
    p_kept += i_budget * length
    o_entry = tl.arange(0, BLOCK)

    b_rank = _ordered(p_rank, p_droppable, o_entry, length)
    available = tl.sum((b_rank != -0x80000000).to(tl.int32))
    high = tl.max(b_rank).to(tl.int64)
    low = tl.min(tl.where(b_rank == -0x80000000, 0x7FFFFFFF, b_rank)).to(tl.int64)
    for first in range(BLOCK, length, BLOCK):
        b_more = _ordered(p_rank, p_droppable, first + o_entry, length)
        available += tl.sum((b_more != -0x80000000).to(tl.int32))
        high = tl.maximum(high, tl.max(b_more).to(tl.int64))
        low = tl.minimum(low, tl.min(tl.where(b_more == -0x80000000, 0x7FFFFFFF, b_more)).to(tl.int64))
    count = tl.load(p_count + i_budget)
    wanted = tl.minimum(tl.maximum(count, 0), available.to(tl.int64)).to(tl.int32)

    # The largest rank that as many tokens as wanted reach.
    while low < high:
        middle = high - (high - low) // 2
        threshold = middle.to(tl.int32)
        reaching = tl.sum((b_rank >= threshold).to(tl.int32))
        for first in range(BLOCK, length, BLOCK):
            b_more = _ordered(p_rank, p_droppable, first + o_entry, length)
            reaching += tl.sum((b_more >= threshold).to(tl.int32))
        low = tl.where(reaching >= wanted, middle, low)
        high = tl.where(reaching >= wanted, high, middle - 1)
    threshold = low.to(tl.int32)

    above = tl.sum((b_rank > threshold).to(tl.int32))
    for first in range(BLOCK, length, BLOCK):
        b_more = _ordered(p_rank, p_droppable, first + o_entry, length)
        above += tl.sum((b_more > threshold).to(tl.int32))

    ties = wanted - above  # tokens at the threshold that stay: those of the lowest indices
    for first in range(0, length, BLOCK):
        b_more = _ordered(p_rank, p_droppable, first + o_entry, length)
        b_tie = (b_more == threshold).to(tl.int32)
        m_kept = (b_more > threshold) | ((b_tie != 0) & (tl.cumsum(b_tie, 0) <= ties))
        tl.store(p_kept + first + o_entry, m_kept, mask=first + o_entry < length)
        ties -= tl.sum(b_tie)
