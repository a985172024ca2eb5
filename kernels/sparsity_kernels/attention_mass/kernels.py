"""Triton kernels of the attention mass (README.md has the derivation and the tiling).

Flat row m of a key head is row m // GROUP of query head i_h · GROUP + m % GROUP, so flat rows ascend with the rows.
``b_`` block values, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``s_`` strides, ``i_`` program indices; BM flat
rows, BN keys, BD the head dim DIM padded to a power of two. Logits are in units of log 2: ``scale`` holds log2(e).

``until`` of a row is the last slot that it may see, -1 where it sees nothing. The row sum of such a row counts as +inf,
so that its probabilities are 0 without a mask; a row sum that is not finite for another reason spreads, as it should.
"""

# ruff: noqa: N803  constants of a kernel are in capitals

from __future__ import annotations

import triton
import triton.language as tl

from sparsity_kernels.products import dot

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["rows", "length"])
def reach_kernel(p_slots, p_valid, p_first, p_spans, rows, length, BN: tl.constexpr, SCAN: tl.constexpr):
    """The first valid key of a sample, and of a key tile the rows ``begin`` to ``end`` that see any of it and ``full``,
    from which on every row that sees a key sees all of it."""
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_s = tl.arange(0, SCAN)
    first = length
    for start in range(0, length, SCAN):
        o_n = start + o_s
        b_valid = tl.load(p_valid + i_b * length + o_n, mask=o_n < length, other=0)
        first = tl.minimum(first, tl.min(tl.where(b_valid != 0, o_n, length), 0))
    low, high = i_n * BN, tl.minimum(i_n * BN + BN, length) - 1
    begin, full, end = rows, 0, 0
    for start in range(0, rows, SCAN):
        o_r = start + o_s
        b_until = _until(p_slots + i_b * rows, o_r, o_r < rows, first, length)
        m_sees = (b_until >= low) & (high >= first)
        begin = tl.minimum(begin, tl.min(tl.where(m_sees, o_r, rows), 0))
        end = tl.maximum(end, tl.max(tl.where(m_sees, o_r + 1, 0), 0))
        full = tl.maximum(full, tl.max(tl.where((b_until >= 0) & (b_until < high), o_r + 1, 0), 0))
    p_span = p_spans + (i_b * tl.num_programs(1) + i_n) * 3
    tl.store(p_span, begin)
    tl.store(p_span + 1, full)
    tl.store(p_span + 2, end)
    if i_n == 0:
        tl.store(p_first + i_b, first)


@triton.jit(do_not_specialize=["rows", "length", "span"])
def row_sum_kernel(
    p_q, p_k, p_slots, p_valid, p_first, p_lse, s_qb, s_qh, s_qr, s_kb, s_kh, s_kn, rows, length, kv_heads, scale, span,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Natural log of the sum of exp(logit) over the visible keys among ``span`` keys (third program axis)."""
    i_b, i_h = _sample_and_head(kv_heads)
    i_m = tl.num_programs(1) - 1 - tl.program_id(1)  # late rows have most work and start first
    o_r, o_h, m_r = _flat_rows(i_m * BM, i_h, rows, GROUP, BM)
    first = tl.load(p_first + i_b)
    b_until = _until(p_slots + i_b * rows, o_r, m_r, first, length)
    start, free, stop = _key_span(b_until, first, length, BN)
    start = tl.maximum(start, tl.program_id(2) * span)
    stop = tl.minimum(stop, tl.program_id(2) * span + span)
    free = tl.maximum(start, tl.minimum(free, stop))
    b_q = _load(p_q + i_b * s_qb, o_h * s_qh + o_r.to(tl.int64) * s_qr, m_r, DIM, BD, True)  # [BM, BD]
    p_k += i_b * s_kb + i_h * s_kh
    p_valid += i_b * length
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_max, b_sum = _add_keys(
        b_max, b_sum, b_q, b_until, p_k, p_valid, s_kn, start, free, length, scale, DIM, BD, BN, False
    )
    b_max, b_sum = _add_keys(
        b_max, b_sum, b_q, b_until, p_k, p_valid, s_kn, free, stop, length, scale, DIM, BD, BN, True
    )
    b_sum = tl.where(b_max == float("-inf"), 1.0, b_sum)  # saw no key: the logarithm is -inf by b_max
    samples = tl.num_programs(0) // kv_heads
    i_out = tl.program_id(2).to(tl.int64) * samples + i_b
    heads = kv_heads * GROUP
    tl.store(p_lse + (i_out * heads + o_h) * rows + o_r, (b_max + tl.log2(b_sum)) * _LN2, mask=m_r)


@triton.jit
def _add_keys(
    b_max, b_sum, b_q, b_until, p_k, p_valid, s_kn, start, stop, length, scale,
    DIM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for i_n in range(start, stop, BN):
        b_s, _, _ = _row_logits(b_q, b_until, p_k, p_valid, s_kn, i_n, length, scale, DIM, BD, BN, MASK)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


@triton.jit(do_not_specialize=["rows", "length"])
def column_sum_kernel(
    p_q, p_k, p_slots, p_valid, p_first, p_spans, p_lse, p_mass,
    s_qb, s_qh, s_qr, s_kb, s_kh, s_kn, rows, length, kv_heads, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum of the probabilities over a key head's flat rows, over all query heads: (batch, kv_heads, length)."""
    i_b, i_h = _sample_and_head(kv_heads)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_valid = tl.load(p_valid + i_b * length + o_n, mask=o_n < length, other=0) != 0
    b_k = _load(p_k + i_b * s_kb + i_h * s_kh, o_n.to(tl.int64) * s_kn, b_valid, DIM, BD, True)  # [BN, BD]
    p_q += i_b * s_qb
    p_slots += i_b * rows
    p_lse += i_b * kv_heads * GROUP * rows
    first = tl.load(p_first + i_b)
    start, free, stop = _row_span(p_spans, i_b, GROUP, BM)
    b_sum = tl.zeros([BN], tl.float32)
    b_sum = _add_rows(
        b_sum, b_k, o_n, p_q, p_slots, p_lse, s_qh, s_qr, i_h, start, free, first, rows, length, scale,
        GROUP, DIM, BD, BM, True,
    )  # fmt: skip
    b_sum = _add_rows(
        b_sum, b_k, o_n, p_q, p_slots, p_lse, s_qh, s_qr, i_h, free, stop, first, rows, length, scale,
        GROUP, DIM, BD, BM, False,
    )  # fmt: skip
    b_mass = tl.where(b_valid, b_sum, 0.0) / (kv_heads * GROUP)
    tl.store(p_mass + (i_b * kv_heads + i_h) * length + o_n, b_mass, mask=o_n < length)


@triton.jit
def _add_rows(
    b_sum, b_k, o_n, p_q, p_slots, p_lse, s_qh, s_qr, i_h, start, stop, first, rows, length, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for i_m in range(start, stop, BM):
        b_p, _, _, _, _ = _column_probabilities(
            b_k, o_n, p_q, p_slots, p_lse, s_qh, s_qr, i_h, i_m, first, rows, length, scale, GROUP, DIM, BD, BM, MASK
        )
        b_sum += tl.sum(b_p, 1)
    return b_sum


@triton.jit(do_not_specialize=["rows", "length"])
def query_grad_kernel(
    p_q, p_k, p_slots, p_valid, p_first, p_lse, p_grad, p_unit, p_mean, p_dq,
    s_qb, s_qh, s_qr, s_kb, s_kh, s_kn, rows, length, kv_heads, scale, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Mean incoming gradient of a row under its probabilities, then the gradient of the query."""
    i_b, i_h = _sample_and_head(kv_heads)
    i_m = tl.num_programs(1) - 1 - tl.program_id(1)
    o_r, o_h, m_r = _flat_rows(i_m * BM, i_h, rows, GROUP, BM)
    first = tl.load(p_first + i_b)
    b_until = _until(p_slots + i_b * rows, o_r, m_r, first, length)
    start, free, stop = _key_span(b_until, first, length, BN)
    b_q = _load(p_q + i_b * s_qb, o_h * s_qh + o_r.to(tl.int64) * s_qr, m_r, DIM, BD, True)  # [BM, BD]
    p_k += i_b * s_kb + i_h * s_kh
    p_valid += i_b * length
    p_grad += i_b * length
    o_out = (i_b * kv_heads * GROUP + o_h) * rows + o_r
    b_lse = _row_sums(p_lse, o_out, b_until, m_r)
    b_mean = tl.zeros([BM], tl.float32)
    b_mean = _add_means(
        b_mean, b_q, b_until, b_lse, p_k, p_valid, p_grad, s_kn, start, free, length, scale, DIM, BD, BN, False
    )
    b_mean = _add_means(
        b_mean, b_q, b_until, b_lse, p_k, p_valid, p_grad, s_kn, free, stop, length, scale, DIM, BD, BN, True
    )
    tl.store(p_mean + o_out, b_mean, mask=m_r)
    b_dq = tl.zeros([BM, BD], tl.float32)
    b_dq = _add_query_grads(
        b_dq, b_mean, b_q, b_until, b_lse, p_k, p_valid, p_grad, s_kn, start, free, length, scale, DIM, BD, BN, False
    )
    b_dq = _add_query_grads(
        b_dq, b_mean, b_q, b_until, b_lse, p_k, p_valid, p_grad, s_kn, free, stop, length, scale, DIM, BD, BN, True
    )
    _store(p_dq, o_out, m_r, b_dq * (factor * tl.load(p_unit + i_b)), DIM, BD)


@triton.jit
def _add_means(
    b_mean, b_q, b_until, b_lse, p_k, p_valid, p_grad, s_kn, start, stop, length, scale,
    DIM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for i_n in range(start, stop, BN):
        b_s, _, o_n = _row_logits(b_q, b_until, p_k, p_valid, s_kn, i_n, length, scale, DIM, BD, BN, MASK)
        b_grad = tl.load(p_grad + o_n, mask=o_n < length, other=0.0)
        b_mean += tl.sum(tl.exp2(b_s - b_lse[:, None]) * b_grad[None, :], 1)
    return b_mean


@triton.jit
def _add_query_grads(
    b_dq, b_mean, b_q, b_until, b_lse, p_k, p_valid, p_grad, s_kn, start, stop, length, scale,
    DIM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for i_n in range(start, stop, BN):
        b_s, b_k, o_n = _row_logits(b_q, b_until, p_k, p_valid, s_kn, i_n, length, scale, DIM, BD, BN, MASK)
        b_grad = tl.load(p_grad + o_n, mask=o_n < length, other=0.0)
        b_ds = tl.exp2(b_s - b_lse[:, None]) * (b_grad[None, :] - b_mean[:, None])
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=["rows", "length"])
def key_grad_kernel(
    p_q, p_k, p_slots, p_valid, p_first, p_spans, p_lse, p_grad, p_unit, p_mean, p_dk,
    s_qb, s_qh, s_qr, s_kb, s_kh, s_kn, rows, length, kv_heads, scale, factor,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the key, from the row means that `query_grad_kernel` has written."""
    i_b, i_h = _sample_and_head(kv_heads)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < length
    b_valid = tl.load(p_valid + i_b * length + o_n, mask=m_n, other=0) != 0
    b_k = _load(p_k + i_b * s_kb + i_h * s_kh, o_n.to(tl.int64) * s_kn, b_valid, DIM, BD, True)  # [BN, BD]
    b_grad = tl.load(p_grad + i_b * length + o_n, mask=m_n, other=0.0)
    p_q += i_b * s_qb
    p_slots += i_b * rows
    p_lse += i_b * kv_heads * GROUP * rows
    p_mean += i_b * kv_heads * GROUP * rows
    first = tl.load(p_first + i_b)
    start, free, stop = _row_span(p_spans, i_b, GROUP, BM)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dk = _add_key_grads(
        b_dk, b_k, b_grad, o_n, p_q, p_slots, p_lse, p_mean, s_qh, s_qr, i_h, start, free, first, rows, length, scale,
        GROUP, DIM, BD, BM, True,
    )  # fmt: skip
    b_dk = _add_key_grads(
        b_dk, b_k, b_grad, o_n, p_q, p_slots, p_lse, p_mean, s_qh, s_qr, i_h, free, stop, first, rows, length, scale,
        GROUP, DIM, BD, BM, False,
    )  # fmt: skip
    b_dk = tl.where(b_valid[:, None], b_dk * (factor * tl.load(p_unit + i_b)), 0.0)
    _store(p_dk, (i_b * kv_heads + i_h) * length + o_n, m_n, b_dk, DIM, BD)


@triton.jit
def _add_key_grads(
    b_dk, b_k, b_grad, o_n, p_q, p_slots, p_lse, p_mean, s_qh, s_qr, i_h, start, stop, first, rows, length, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    for i_m in range(start, stop, BM):
        b_p, b_q, o_r, o_h, m_r = _column_probabilities(
            b_k, o_n, p_q, p_slots, p_lse, s_qh, s_qr, i_h, i_m, first, rows, length, scale, GROUP, DIM, BD, BM, MASK
        )
        b_mean = tl.load(p_mean + o_h * rows + o_r, mask=m_r, other=0.0)
        b_ds = b_p * (b_grad[:, None] - b_mean[None, :])
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk


@triton.jit
def _row_logits(
    b_q, b_until, p_k, p_valid, s_kn, i_n, length, scale,
    DIM: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] logits against the keys from i_n on, -inf for keys that are not visible, and those keys, [BN, BD]."""
    o_n = i_n + tl.arange(0, BN)
    b_valid = tl.load(p_valid + o_n, mask=o_n < length, other=0)
    b_k = _load(p_k, o_n.to(tl.int64) * s_kn, o_n < length, DIM, BD, MASK)
    b_s = dot(b_q, tl.trans(b_k), None) * scale
    b_s += tl.where(b_valid != 0, 0.0, float("-inf"))[None, :]
    if MASK:
        b_s = tl.where(o_n[None, :] <= b_until[:, None], b_s, float("-inf"))
    return b_s, b_k, o_n


@triton.jit
def _column_probabilities(
    b_k, o_n, p_q, p_slots, p_lse, s_qh, s_qr, i_h, i_m, first, rows, length, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """[BN, BM] probabilities of the keys in the flat rows from i_m on, and those rows."""
    o_r, o_h, m_r = _flat_rows(i_m, i_h, rows, GROUP, BM)
    b_until = _until(p_slots, o_r, m_r, first, length)
    b_q = _load(p_q, o_h * s_qh + o_r.to(tl.int64) * s_qr, m_r, DIM, BD, True)
    b_lse = _row_sums(p_lse, o_h * rows + o_r, b_until, m_r)
    b_p = tl.exp2(dot(b_k, tl.trans(b_q), None) * scale - b_lse[None, :])
    if MASK:
        b_p = tl.where(o_n[:, None] <= b_until[None, :], b_p, 0.0)
    return b_p, b_q, o_r, o_h, m_r


@triton.jit
def _sample_and_head(kv_heads):
    i_bh = tl.program_id(0)
    return (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)


@triton.jit
def _flat_rows(start, i_h, rows, GROUP: tl.constexpr, BM: tl.constexpr):
    o_m = start + tl.arange(0, BM)
    o_r = o_m // GROUP
    return o_r, i_h * GROUP + o_m % GROUP, o_r < rows


@triton.jit
def _until(p_slots, o_r, m_r, first, length):
    b_slot = tl.minimum(tl.load(p_slots + o_r, mask=m_r, other=-1), length - 1)
    return tl.where(b_slot >= first, b_slot, -1).to(tl.int32)


@triton.jit
def _row_sums(p_lse, o_lse, b_until, m_r):
    b_lse = tl.load(p_lse + o_lse, mask=m_r, other=0.0)
    return tl.where(b_until >= 0, b_lse * _LOG2E, float("inf"))


@triton.jit
def _key_span(b_until, first, length, BN: tl.constexpr):
    """Keys from ``start`` to ``stop`` can be visible to these rows; those before ``free`` need no causal mask."""
    start = first // BN * BN
    stop = tl.max(b_until, 0) + 1
    free = (tl.min(tl.where(b_until >= 0, b_until, length - 1), 0) + 1) // BN * BN
    return start, tl.maximum(start, tl.minimum(free, stop)), stop


@triton.jit
def _row_span(p_spans, i_b, GROUP: tl.constexpr, BM: tl.constexpr):
    """Flat rows from ``start`` to ``stop`` see a key of this tile; those from ``free`` on need no causal mask."""
    p_span = p_spans + (i_b * tl.num_programs(1) + tl.program_id(1)) * 3
    start = tl.load(p_span) * GROUP // BM * BM
    free = (tl.load(p_span + 1) * GROUP + BM - 1) // BM * BM
    stop = tl.load(p_span + 2) * GROUP
    return start, tl.maximum(start, tl.minimum(free, (stop + BM - 1) // BM * BM)), stop


@triton.jit
def _load(p, o_rows, m_rows, DIM: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr):
    o_d = tl.arange(0, BD)
    p += o_rows[:, None] + o_d[None, :]
    if MASK:
        return tl.load(p, mask=m_rows[:, None] & (o_d < DIM)[None, :], other=0.0)
    if DIM == BD:
        return tl.load(p)
    return tl.load(p, mask=(o_d < DIM)[None, :], other=0.0)


@triton.jit
def _store(p, o_rows, m_rows, b_values, DIM: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    p += o_rows.to(tl.int64)[:, None] * DIM + o_d[None, :]
    tl.store(p, b_values.to(p.dtype.element_ty), mask=m_rows[:, None] & (o_d < DIM)[None, :])
