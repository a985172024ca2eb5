"""Split-KV flash decoding over a ragged cache (README.md has the derivation).

Rows of a tile are flat: m = row * GROUP + i for query head g * GROUP + i of key head g, so that an entry is read once
for its group. Names: i_ program ids, o_ offsets, m_ masks, p_ pointers, b_ block values. [M] flat rows, [N] entries,
[D] dim, [S] splits.
"""

# ruff: noqa: N803 (what is known when a kernel compiles is in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity_kernels.backend import device_of
from sparsity_kernels.products import dot

_LOG2E = 1.4426950408889634
_MOST_SPLITS = 128
_PROGRAMS_PER_PROCESSOR = 6  # two rounds of three resident programs: short rows make room for long ones
_TILES_PER_SPLIT = 4  # fewer do not pay for a partial result
_INTERPRETED_PROCESSORS = 8


def ragged_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    capacity: int,
    splits: int | None,
) -> Tensor:
    """See `sparsity_kernels.ragged_attention.ragged_attention`, which checks the arguments.

    Can be captured in a CUDA graph: nothing here depends on the values of ``start`` and ``length``, and the kernel
    clamps them, so that nothing outside the buffer is read.

    Args:
        capacity: entries a batch row may own (for a packed buffer their mean); only the choice of splits uses it.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    flat_rows = rows * heads // kv_heads
    block_d = triton.next_power_of_2(dim)
    block_m, block_n, warps = _tiles(flat_rows, block_d, query.element_size())
    row_tiles = triton.cdiv(flat_rows, block_m)
    if splits is None:
        splits = choose_splits(capacity, batch * kv_heads * row_tiles, _processors(query.device), block_n)

    output = torch.empty(batch, rows, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    parts = (batch, kv_heads, splits, flat_rows) if splits > 1 else (0,)
    partial = torch.empty(*parts, dim if splits > 1 else 0, dtype=torch.float32, device=query.device)
    maxima = torch.empty(parts, dtype=torch.float32, device=query.device)
    sums = torch.empty(parts, dtype=torch.float32, device=query.device)
    constants = {"GROUP": heads // kv_heads, "DIM": dim, "BLOCK_D": block_d}
    with device_of(query):
        _split_kernel[(batch * row_tiles, kv_heads, splits)](
            *(query, key, value, start, length, output, partial, maxima, sums),
            *query.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
            *output.stride()[:3],
            scale * _LOG2E,
            *(rows, row_tiles, key.shape[0]),
            **constants,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            DIRECT=splits == 1,
            num_warps=warps,
            num_stages=3,
        )
        if splits > 1:
            _combine_kernel[(flat_rows, batch * kv_heads)](
                *(output, partial, maxima, sums),
                *output.stride()[:3],
                *(kv_heads, flat_rows, splits),
                **constants,
                BLOCK_S=16,
                MOST_SPLITS=max(16, triton.next_power_of_2(splits)),
                num_warps=4,
            )
    return output


def choose_splits(capacity: int, programs: int, processors: int, block: int) -> int:
    """Parts of a row's entries, so that the grid fills the device and a full row still has a few tiles for each part.

    Args:
        capacity: entries of a full row. programs: the grid without splits. processors: SMs of the device.
        block: entries of a tile.
    """
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * processors, programs)
    most = triton.cdiv(capacity, block) // _TILES_PER_SPLIT
    return max(1, min(wanted, most, _MOST_SPLITS))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(flat_rows: int, block_d: int, bytes_of_number: int) -> tuple[int, int, int]:
    """Rows and entries of a tile, and warps. Three programs fit into the shared memory of a Hopper processor."""
    block_n = max(16, min(128, 16_384 // (block_d * bytes_of_number)))
    if bytes_of_number == 4:  # no tensor cores: more rows only cost registers
        return 16, min(64, block_n), 8
    return min(64, max(16, triton.next_power_of_2(flat_rows))), block_n, 4


@triton.jit(do_not_specialize=["rows", "row_tiles", "entries"])
def _split_kernel(
    query,
    key,
    value,
    start,
    length,
    output,
    partial,
    maxima,
    sums,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_oh,
    stride_or,
    scale_log2,
    rows,
    row_tiles,
    entries,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One share of the entries of one batch row and key head, for one tile of query rows.

    A row's valid tiles are dealt out evenly over the splits; a split that gets none writes max = -inf, sum = 0.
    """
    i_b = (tl.program_id(0) // row_tiles).to(tl.int64)
    i_m = tl.program_id(0) % row_tiles
    i_g = tl.program_id(1)
    i_s = tl.program_id(2)
    splits = tl.num_programs(2)
    flat_rows = rows * GROUP

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < flat_rows
    m_d = o_d < DIM
    m_md = m_m[:, None] & m_d[None, :]
    o_row = o_m // GROUP
    o_head = i_g * GROUP + o_m % GROUP
    o_q = i_b * stride_qb + o_row.to(tl.int64) * stride_qr + o_head.to(tl.int64) * stride_qh
    b_q = tl.load(query + o_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
    first = tl.load(start + i_b)
    owned = tl.minimum(tl.load(length + i_b), entries - first)  # a row ends with the buffer whatever its length says
    owned = tl.where(first < 0, 0, tl.maximum(owned, 0)).to(tl.int32)
    b_limit = tl.where(m_m, owned - (rows - 1) + o_row, 0)
    longest = tl.maximum(tl.max(b_limit, 0), 0)
    tiles = tl.cdiv(longest, BLOCK_N)
    low = tiles * i_s // splits * BLOCK_N
    high = tl.minimum(tiles * (i_s + 1) // splits * BLOCK_N, longest)

    p_key = key + first * stride_kn + i_g.to(tl.int64) * stride_kh
    p_value = value + first * stride_vn + i_g.to(tl.int64) * stride_vh
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    for begin in range(low, high, BLOCK_N):
        o_n = begin + tl.arange(0, BLOCK_N)
        m_nd = (o_n < high)[:, None] & m_d[None, :]  # what lies beyond is not the row's own: it is never loaded
        b_k = tl.load(p_key + o_n.to(tl.int64)[:, None] * stride_kn + o_d[None, :], mask=m_nd, other=0.0)
        b_v = tl.load(p_value + o_n.to(tl.int64)[:, None] * stride_vn + o_d[None, :], mask=m_nd, other=0.0)
        b_s = dot(b_q, tl.trans(b_k), None) * scale_log2  # [M, N]
        b_s = tl.where(o_n[None, :] < b_limit[:, None], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)  # -inf - (-inf) where nothing is seen yet
        b_p = tl.exp2(b_s - b_base[:, None])
        b_shrink = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None])
        b_max = b_new

    if DIRECT:
        b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        o_o = i_b * stride_ob + o_row.to(tl.int64) * stride_or + o_head.to(tl.int64) * stride_oh
        tl.store(output + o_o[:, None] + o_d[None, :], b_out.to(output.dtype.element_ty), mask=m_md)
    else:
        o_p = ((i_b * tl.num_programs(1) + i_g) * splits + i_s) * flat_rows + o_m
        tl.store(partial + o_p[:, None] * DIM + o_d[None, :], b_acc, mask=m_md)
        tl.store(maxima + o_p, b_max, mask=m_m)
        tl.store(sums + o_p, b_sum, mask=m_m)


@triton.jit(do_not_specialize=["kv_heads", "flat_rows", "splits"])
def _combine_kernel(
    output,
    partial,
    maxima,
    sums,
    stride_ob,
    stride_oh,
    stride_or,
    kv_heads,
    flat_rows,
    splits,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """The output of one flat row: its splits' sums brought to their common maximum, added up and normalised."""
    i_m = tl.program_id(0)
    i_bg = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    o_all = tl.arange(0, MOST_SPLITS)
    p_first = i_bg * splits * flat_rows + i_m
    b_all = tl.load(maxima + p_first + o_all * flat_rows, mask=o_all < splits, other=-float("inf"))
    highest = tl.max(b_all, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    b_sum = tl.load(sums + p_first + o_all * flat_rows, mask=o_all < splits, other=0.0)
    total = tl.sum(tl.exp2(b_all - base) * b_sum, 0)

    b_out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for begin in range(0, splits, BLOCK_S):
        o_s = begin + tl.arange(0, BLOCK_S)
        m_s = o_s < splits
        o_p = p_first + o_s * flat_rows
        b_weight = tl.exp2(tl.load(maxima + o_p, mask=m_s, other=-float("inf")) - base)
        b_part = tl.load(partial + o_p[:, None] * DIM + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_out += tl.sum(b_weight[:, None] * b_part, 0)
    b_out = b_out / tl.where(total > 0, total, 1.0)
    i_b = i_bg // kv_heads
    i_head = (i_bg % kv_heads) * GROUP + i_m % GROUP
    p_output = output + i_b * stride_ob + i_head * stride_oh + (i_m // GROUP).to(tl.int64) * stride_or + o_d
    tl.store(p_output, b_out.to(output.dtype.element_ty), mask=m_d)
