"""The kernels of attention among kept keys (README.md has the derivation).

Rows of a tile are flat: m = row * GROUP + i for query head g * GROUP + i of key head g, so that a key is read once for
its group and the rows of a tile stay in the order of the query. Keys and values are gathered through the index on load.
Names: i_ program ids, o_ offsets, m_ masks, p_ pointers, b_ block values. [M] flat rows, [N] kept keys, [D] dim.
"""

# ruff: noqa: N803 (what is known when a kernel compiles is in capitals)

from __future__ import annotations

import triton
import triton.language as tl

from sparsity_kernels.products import dot

_INFINITE = tl.constexpr(float("inf"))
_NO_LIMIT = tl.constexpr(2**31 - 1)


@triton.jit
def load_rows(pointers, m_rows, m_dim, MASK_DIM: tl.constexpr):
    """[rows, D] values, 0 outside the masks; no mask of the dim where it is a power of two."""
    if MASK_DIM:
        return tl.load(pointers, mask=m_rows[:, None] & m_dim[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=m_rows[:, None], other=0.0)


@triton.jit
def load_limits(p_limits, o_row, m_row, stride_lr, keys):
    """[M] int32 limits of rows, 0 outside the mask. Clamped to 0 … keys: beyond them there is no index to read."""
    b_limit = tl.load(p_limits + o_row.to(tl.int64) * stride_lr, mask=m_row, other=0)
    return tl.minimum(tl.maximum(b_limit, 0), keys).to(tl.int32)


@triton.jit
def load_keys(
    p_key, p_value, p_index, stride_kn, stride_vn, stride_in, o_n, high, length,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[N, D] keys and values of the kept keys o_n, their slots, and where those are slots of the sample, [N].

    Without MASKED all of o_n lie below ``high``. A slot outside [0, length) is never read: key and value are 0.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    p_slot = p_index + o_n * stride_in
    b_slot = tl.load(p_slot, mask=o_n < high, other=-1) if MASKED else tl.load(p_slot)
    m_slot = (b_slot >= 0) & (b_slot < length)
    b_k = load_rows(p_key + b_slot[:, None] * stride_kn + o_d[None, :], m_slot, m_d, DIM < BLOCK_D)
    b_v = load_rows(p_value + b_slot[:, None] * stride_vn + o_d[None, :], m_slot, m_d, DIM < BLOCK_D)
    return b_k, b_v, b_slot, m_slot


@triton.jit
def row_offsets(o_m, i_g, stride_h, stride_r, GROUP: tl.constexpr):
    """[M] offsets of flat rows of key head i_g."""
    return (o_m // GROUP).to(tl.int64) * stride_r + (i_g * GROUP + o_m % GROUP).to(tl.int64) * stride_h


@triton.jit
def _forward_tiles(
    b_acc, b_sum, b_max, b_q, b_limit, p_key, p_value, p_index, stride_kn, stride_vn, stride_in, low, high, length,
    scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the kept keys low … high - 1; without MASKED all rows see them and their number fits."""
    for start in range(low, high, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k, b_v, _, _ = load_keys(
            p_key, p_value, p_index, stride_kn, stride_vn, stride_in, o_n, high, length, DIM, BLOCK_D, MASKED
        )
        b_s = dot(b_q, tl.trans(b_k), None) * scale_log2  # [M, N]
        if MASKED:
            b_s = tl.where(o_n[None, :] < b_limit[:, None], b_s, -_INFINITE)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_base = tl.where(b_new == -_INFINITE, 0.0, b_new)  # -inf - (-inf) where nothing is seen yet
        b_p = tl.exp2(b_s - b_base[:, None])
        b_shrink = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None])
        b_max = b_new
    return b_acc, b_sum, b_max


@triton.jit(do_not_specialize=["stride_ib", "stride_lb", "kv_heads", "flat_rows", "keys", "length"])
def forward_kernel(
    query, key, value, index, limits, output, lse, stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ib, stride_in, stride_lb, stride_lr, stride_ob, stride_oh, stride_or,
    scale_log2, kv_heads, flat_rows, keys, length,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program, the last tile first: under causality it has the most keys."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bg = tl.program_id(1)
    i_b = (i_bg // kv_heads).to(tl.int64)
    i_g = i_bg % kv_heads
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < flat_rows
    m_d = o_d < DIM
    m_md = m_m[:, None] & m_d[None, :]
    o_q = row_offsets(o_m, i_g, stride_qh, stride_qr, GROUP)
    b_q = tl.load(query + i_b * stride_qb + o_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
    b_limit = load_limits(limits + i_b * stride_lb, o_m // GROUP, m_m, stride_lr, keys)
    common = tl.min(tl.where(m_m, b_limit, _NO_LIMIT), 0) // BLOCK_N * BLOCK_N
    longest = tl.max(b_limit, 0)

    p_key = key + i_b * stride_kb + i_g.to(tl.int64) * stride_kh
    p_value = value + i_b * stride_vb + i_g.to(tl.int64) * stride_vh
    p_index = index + i_b * stride_ib
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], -_INFINITE, dtype=tl.float32)
    b_acc, b_sum, b_max = _forward_tiles(
        b_acc, b_sum, b_max, b_q, b_limit, p_key, p_value, p_index, stride_kn, stride_vn, stride_in, 0, common,
        length, scale_log2, DIM, BLOCK_D, BLOCK_N, MASKED=False,
    )  # fmt: skip
    b_acc, b_sum, b_max = _forward_tiles(
        b_acc, b_sum, b_max, b_q, b_limit, p_key, p_value, p_index, stride_kn, stride_vn, stride_in, common,
        longest, length, scale_log2, DIM, BLOCK_D, BLOCK_N, MASKED=True,
    )  # fmt: skip
    sees = b_limit > 0
    b_sum = tl.where(sees, b_sum, 1.0)
    b_acc = b_acc / b_sum[:, None]
    b_lse = tl.where(sees, b_max + tl.log2(b_sum), _INFINITE)  # exp2(s - inf) = 0 in the backward pass
    o_o = row_offsets(o_m, i_g, stride_oh, stride_or, GROUP)
    p_output = output + i_b * stride_ob + o_o[:, None] + o_d[None, :]
    tl.store(p_output, b_acc.to(output.dtype.element_ty), mask=m_md)
    tl.store(lse + i_bg.to(tl.int64) * flat_rows + o_m, b_lse, mask=m_m)


@triton.jit(do_not_specialize=["kv_heads", "flat_rows"])
def delta_kernel(
    gradient, output, delta, stride_gb, stride_gh, stride_gr, stride_ob, stride_oh, stride_or, kv_heads, flat_rows,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = sum over dim of gradient * output, per flat row."""
    i_bg = tl.program_id(1)
    i_b = (i_bg // kv_heads).to(tl.int64)
    i_g = i_bg % kv_heads
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < flat_rows
    m_md = m_m[:, None] & (o_d < DIM)[None, :]
    o_g = row_offsets(o_m, i_g, stride_gh, stride_gr, GROUP)
    o_o = row_offsets(o_m, i_g, stride_oh, stride_or, GROUP)
    b_g = tl.load(gradient + i_b * stride_gb + o_g[:, None] + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
    b_o = tl.load(output + i_b * stride_ob + o_o[:, None] + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
    tl.store(delta + i_bg.to(tl.int64) * flat_rows + o_m, tl.sum(b_g * b_o, 1), mask=m_m)


@triton.jit
def _grad_query_tiles(
    b_dq, b_q, b_do, b_lse, b_delta, b_limit, p_key, p_value, p_index, stride_kn, stride_vn, stride_in, low, high,
    length, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds ds k over the kept keys low … high - 1; MASKED as in the forward pass."""
    for start in range(low, high, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k, b_v, _, _ = load_keys(
            p_key, p_value, p_index, stride_kn, stride_vn, stride_in, o_n, high, length, DIM, BLOCK_D, MASKED
        )
        b_s = dot(b_q, tl.trans(b_k), None) * scale_log2  # [M, N]
        b_p = tl.exp2(b_s - b_lse[:, None])
        if MASKED:
            b_p = tl.where(o_n[None, :] < b_limit[:, None], b_p, 0.0)
        b_dp = dot(b_do, tl.trans(b_v), None)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=["stride_ib", "stride_lb", "kv_heads", "flat_rows", "keys", "length"])
def grad_query_kernel(
    query, key, value, index, limits, gradient, lse, delta, grad_query, stride_qb, stride_qh, stride_qr, stride_kb,
    stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ib, stride_in, stride_lb, stride_lr, stride_gb,
    stride_gh, stride_gr, stride_ob, stride_oh, stride_or, scale, scale_log2, kv_heads, flat_rows, keys, length,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows per program, the last tile first, as in the forward pass."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bg = tl.program_id(1)
    i_b = (i_bg // kv_heads).to(tl.int64)
    i_g = i_bg % kv_heads
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < flat_rows
    m_md = m_m[:, None] & (o_d < DIM)[None, :]
    o_q = row_offsets(o_m, i_g, stride_qh, stride_qr, GROUP)
    o_g = row_offsets(o_m, i_g, stride_gh, stride_gr, GROUP)
    b_q = tl.load(query + i_b * stride_qb + o_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
    b_do = tl.load(gradient + i_b * stride_gb + o_g[:, None] + o_d[None, :], mask=m_md, other=0.0)
    b_lse = tl.load(lse + i_bg.to(tl.int64) * flat_rows + o_m, mask=m_m, other=_INFINITE)
    b_delta = tl.load(delta + i_bg.to(tl.int64) * flat_rows + o_m, mask=m_m, other=0.0)
    b_limit = load_limits(limits + i_b * stride_lb, o_m // GROUP, m_m, stride_lr, keys)
    common = tl.min(tl.where(m_m, b_limit, _NO_LIMIT), 0) // BLOCK_N * BLOCK_N
    longest = tl.max(b_limit, 0)

    p_key = key + i_b * stride_kb + i_g.to(tl.int64) * stride_kh
    p_value = value + i_b * stride_vb + i_g.to(tl.int64) * stride_vh
    p_index = index + i_b * stride_ib
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dq = _grad_query_tiles(
        b_dq, b_q, b_do, b_lse, b_delta, b_limit, p_key, p_value, p_index, stride_kn, stride_vn, stride_in, 0,
        common, length, scale_log2, DIM, BLOCK_D, BLOCK_N, MASKED=False,
    )  # fmt: skip
    b_dq = _grad_query_tiles(
        b_dq, b_q, b_do, b_lse, b_delta, b_limit, p_key, p_value, p_index, stride_kn, stride_vn, stride_in, common,
        longest, length, scale_log2, DIM, BLOCK_D, BLOCK_N, MASKED=True,
    )  # fmt: skip
    o_o = row_offsets(o_m, i_g, stride_oh, stride_or, GROUP)
    p_output = grad_query + i_b * stride_ob + o_o[:, None] + o_d[None, :]
    tl.store(p_output, (b_dq * scale).to(grad_query.dtype.element_ty), mask=m_md)


@triton.jit(do_not_specialize=["stride_ib", "stride_lb", "kv_heads", "rows", "keys", "length"])
def grad_key_kernel(
    query, key, value, index, limits, gradient, lse, delta, grad_key, grad_value, stride_qb, stride_qh, stride_qr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ib, stride_in, stride_lb, stride_lr,
    stride_gb, stride_gh, stride_gr, stride_ob, stride_oh, stride_on, scale, scale_log2, kv_heads, rows, keys,
    length,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """One tile of kept keys per program, over the rows from the first to the last that sees one of them.

    Every kept slot has one owner and is stored once. grad_key and grad_value are zero elsewhere and share strides.
    """
    i_bg = tl.program_id(1)
    i_b = (i_bg // kv_heads).to(tl.int64)
    i_g = i_bg % kv_heads
    first_key = tl.program_id(0) * BLOCK_N
    p_limits = limits + i_b * stride_lb
    first, last, longest = _rows_that_see(p_limits, stride_lr, first_key, rows, keys, SCAN)

    o_n = first_key + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    b_k, b_v, b_slot, m_slot = load_keys(
        key + i_b * stride_kb + i_g.to(tl.int64) * stride_kh,
        value + i_b * stride_vb + i_g.to(tl.int64) * stride_vh,
        index + i_b * stride_ib,
        stride_kn,
        stride_vn,
        stride_in,
        o_n,
        longest,
        length,
        DIM,
        BLOCK_D,
        MASKED=True,
    )
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    p_query = query + i_b * stride_qb
    p_gradient = gradient + i_b * stride_gb
    first_flat = i_bg.to(tl.int64) * rows * GROUP
    end = last * GROUP
    for start in range(first * GROUP // BLOCK_M * BLOCK_M, end, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        o_q = row_offsets(o_m, i_g, stride_qh, stride_qr, GROUP)
        o_g = row_offsets(o_m, i_g, stride_gh, stride_gr, GROUP)
        b_q = load_rows(p_query + o_q[:, None] + o_d[None, :], m_m, m_d, DIM < BLOCK_D)
        b_do = load_rows(p_gradient + o_g[:, None] + o_d[None, :], m_m, m_d, DIM < BLOCK_D)
        b_lse = tl.load(lse + first_flat + o_m, mask=m_m, other=_INFINITE)
        b_delta = tl.load(delta + first_flat + o_m, mask=m_m, other=0.0)
        b_limit = load_limits(p_limits, o_m // GROUP, m_m, stride_lr, keys)
        b_s = dot(b_k, tl.trans(b_q), None) * scale_log2  # [N, M]
        b_p = tl.where(o_n[:, None] < b_limit[None, :], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = dot(b_p.to(b_do.dtype), b_do, b_dv)
        b_dp = dot(b_v, tl.trans(b_do), None)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    m_nd = m_slot[:, None] & m_d[None, :]
    o_o = i_b * stride_ob + i_g.to(tl.int64) * stride_oh + b_slot[:, None] * stride_on + o_d[None, :]
    tl.store(grad_key + o_o, (b_dk * scale).to(grad_key.dtype.element_ty), mask=m_nd)
    tl.store(grad_value + o_o, b_dv.to(grad_value.dtype.element_ty), mask=m_nd)


@triton.jit
def _rows_that_see(p_limits, stride_lr, first_key, rows, keys, SCAN: tl.constexpr):
    """The first row whose limit passes ``first_key``, one past the last such row, and the largest limit of all rows."""
    first = rows
    last = 0
    longest = 0
    for start in range(0, rows, SCAN):
        o_r = start + tl.arange(0, SCAN)
        b_limit = load_limits(p_limits, o_r, o_r < rows, stride_lr, keys)
        sees = b_limit > first_key
        first = tl.minimum(first, tl.min(tl.where(sees, o_r, rows), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, o_r + 1, 0), 0))
        longest = tl.maximum(longest, tl.max(b_limit, 0))
    return first, last, longest
