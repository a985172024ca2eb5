"""Decode attention over a ragged cache against an explicit softmax per row, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_tests import DEVICE
from sparsity_kernels.ragged_attention import ragged_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALE = 0.3
IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])


def problem(lengths, rows=1, heads=14, kv_heads=2, dim=64, layout="packed", dtype=torch.float32):
    """Arguments and keywords of a call. Packed rows lie in reverse, with NaN between them; behind rectangular ones are
    zeros."""
    generator = torch.Generator().manual_seed(sum(lengths) + rows * 1000 + heads)
    batch, capacity = len(lengths), max(lengths) + 5
    query = torch.randn(batch, heads, rows, dim, generator=generator, dtype=torch.float64)
    if layout == "packed":
        start, entries = [], 3
        for length in reversed(lengths):
            start.insert(0, entries)
            entries += length + 4
    else:
        start, entries = [row * capacity for row in range(batch)], batch * capacity
    key, value = torch.full((2, entries, kv_heads, dim), torch.nan if layout == "packed" else 0.0, dtype=torch.float64)
    for first, length in zip(start, lengths, strict=True):
        for buffer in (key, value):
            buffer[first : first + length] = torch.randn(length, kv_heads, dim, generator=generator)
    tensors = [tensor.to(DEVICE, dtype) for tensor in (query, key, value)]
    where = [torch.tensor(start, device=DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)]
    return (*tensors, *where, SCALE), {"rectangular": capacity if layout == "rectangular" else None}


def explicit(query, key, value, start, length, scale):
    """One softmax per query row and head over the entries it sees; 0 where there are none."""
    query, key, value = (tensor.double().cpu() for tensor in (query, key, value))
    output, group, rows = torch.zeros_like(query), query.shape[1] // key.shape[1], query.shape[2]
    for batch, (first, count) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        for row in range(rows):
            seen = slice(first, first + count - (rows - 1 - row))
            if seen.stop <= first:
                continue
            for head in range(query.shape[1]):
                keys, values = key[seen, head // group], value[seen, head // group]
                output[batch, head, row] = (keys @ query[batch, head, row] * scale).softmax(0) @ values
    return output


def assert_right(output, arguments, tolerance=1e-5):
    torch.testing.assert_close(output.double().cpu(), explicit(*arguments), rtol=tolerance, atol=tolerance)


@IMPLS
@pytest.mark.parametrize("layout", ["packed", "rectangular"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (14, 2), (8, 1)])
def test_every_row_attends_to_its_own_entries_only(impl, layout, rows, heads, kv_heads):
    arguments, keywords = problem([1, 63, 111, 2], rows, heads, kv_heads, layout=layout)
    assert_right(ragged_attention(*arguments, impl, **keywords), arguments)


@IMPLS
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_head_dims_need_not_be_powers_of_two(impl, dim):
    arguments, keywords = problem([40, 17], heads=7, kv_heads=1, dim=dim)
    assert_right(ragged_attention(*arguments, impl, **keywords), arguments)


def test_every_number_of_splits_gives_the_same():
    arguments, _ = problem([2047, 3, 200], heads=7, kv_heads=1)
    for splits in (1, 2, 3, 5, 8, None):
        assert_right(ragged_attention(*arguments, "triton", splits=splits), arguments)
    assert_right(ragged_attention(*arguments, "eager"), arguments)


@IMPLS
@pytest.mark.parametrize("layout", ["packed", "rectangular"])
@pytest.mark.parametrize("lengths", [[2, 0, 5], [0, 0, 0], [1, 1, 1]])
def test_rows_that_see_nothing_are_zero(impl, layout, lengths):
    arguments, keywords = problem(lengths, rows=4, layout=layout)
    for splits in (1, 3):
        output = ragged_attention(*arguments, impl, splits=splits, **keywords)
        assert (output[0, :, : 4 - lengths[0]] == 0).all()
        assert_right(output, arguments)


@IMPLS
def test_many_rows_of_a_wide_group(impl):
    arguments, keywords = problem([90, 21], rows=20, heads=7, kv_heads=1)
    assert_right(ragged_attention(*arguments, impl, **keywords), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, splits", [(1, 1), (1, 4), (5, 2)])
def test_low_precision_is_no_worse_than_eager(dtype, rows, splits):
    arguments, keywords = problem([300, 77], rows, dtype=dtype)
    expected = explicit(*arguments)
    errors = [
        (ragged_attention(*arguments, impl, splits=splits, **keywords).double().cpu() - expected).abs().max()
        for impl in ("triton", "eager")
    ]
    assert errors[0] <= errors[1] + torch.finfo(dtype).eps * expected.abs().max()


@IMPLS
def test_equal_scores_give_the_mean_and_a_dominant_one_its_value(impl):
    (query, key, value, *where), _ = problem([64, 70])
    mean = ragged_attention(torch.zeros_like(query), key, value, *where, impl)
    first = int(where[0][0])
    expected = value[first : first + 64].mean(0).repeat_interleave(7, dim=0)[:, None]
    torch.testing.assert_close(mean[0], expected, rtol=1e-5, atol=1e-6)
    key[first + 11] = 1000 * query[0, ::7, 0]
    output = ragged_attention(query, key, value, *where, impl)
    torch.testing.assert_close(output[0, ::7, 0], value[first + 11], rtol=0, atol=0)


@IMPLS
def test_two_runs_are_equal_and_a_row_alone_is_the_row_in_its_batch(impl):
    (query, key, value, start, length, scale), _ = problem([300, 12, 150], rows=2, heads=7, kv_heads=1)
    output = ragged_attention(query, key, value, start, length, scale, impl, splits=3)
    assert torch.equal(output, ragged_attention(query, key, value, start, length, scale, impl, splits=3))
    for row in range(3):
        own = slice(row, row + 1)
        alone = ragged_attention(query[own], key, value, start[own], length[own], scale, impl, splits=3)
        assert torch.equal(alone, output[own])


@IMPLS
def test_any_strides_but_the_last(impl):
    (query, key, value, *where), _ = problem([40, 33], rows=2)
    both = torch.stack([key, value], dim=1)
    spread = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(ragged_attention(spread, both[:, 0], both[:, 1], *where, impl), (query, key, value, *where))


def test_float64_is_eager_only():
    arguments, keywords = problem([5, 9], dtype=torch.float64)
    assert_right(ragged_attention(*arguments, **keywords), arguments, tolerance=1e-12)
    with pytest.raises(ValueError, match="triton"):
        ragged_attention(*arguments, "triton", **keywords)


def test_a_gradient_is_refused_rather_than_missing():
    (query, *others), _ = problem([5, 9])
    query.requires_grad_()
    with pytest.raises(ValueError, match="query requires one"):
        ragged_attention(query, *others)
    with torch.no_grad():
        ragged_attention(query, *others)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("query", lambda t: t[0], "query must have 4 dimensions"),
        ("query", lambda t: t.int(), "float32, bfloat16, float16, float64"),
        ("query", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "contiguous in its last dimension"),
        ("query", lambda t: t[:, :3], "do not fit"),
        ("query", lambda t: t.expand(-1, -1, 65, -1), "at most 64 rows, got 65"),
        ("key", lambda t: t.half(), "share one of"),
        ("key", lambda t: t[:0], "key must not be empty"),
        ("value", lambda t: t[:, :1], "do not fit"),
        ("start", lambda t: t.int(), "start must be torch.int64"),
        ("length", lambda t: t.long(), "length must be torch.int32"),
        ("length", lambda t: t[:1], r"shape \(2,\)"),
    ],
)
def test_bad_tensors_are_named(name, change, message):
    names = ("query", "key", "value", "start", "length", "scale")
    arguments = dict(zip(names, problem([5, 9], dim=32)[0], strict=True))
    if name == "query" and "last" in message:
        arguments["query"] = arguments["query"].expand(-1, -1, 2, -1)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        ragged_attention(**arguments)


@pytest.mark.parametrize(
    "keywords, message",
    [({"rectangular": 7}, "needs batch"), ({"splits": 0}, "splits must be in 1"), ({"impl": "cuda"}, "impl must be")],
)
def test_bad_options_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        ragged_attention(*problem([5, 9])[0], **keywords)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks")
@IMPLS
@pytest.mark.parametrize(
    "layout, start, length, message",
    [
        ("packed", [3, 17], [5, 9], r"must be in \[0, 25\], .*got start \[3, 17\] and length \[5, 9\]"),
        ("packed", [-1, 3], [5, 9], r"got start \[-1, 3\]"),
        ("packed", [26, 3], [0, 9], r"got start \[26, 3\]"),
        ("packed", [3, 3], [2**31 - 1, 9], "got start"),
        ("rectangular", [0, 13], [5, 9], r"rectangular=14 needs start\[b\] = b \* 14, got \[0, 13\]"),
        ("rectangular", [0, 14], [15, 9], r"at most rectangular=14, got \[15, 9\]"),
    ],
)
def test_entries_outside_the_buffer_are_named(impl, layout, start, length, message):
    (query, key, value, *_, scale), keywords = problem([5, 9], layout=layout)
    where = torch.tensor(start, device=DEVICE), torch.tensor(length, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        ragged_attention(query, key, value, *where, scale, impl, **keywords)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_kernel_ends_a_row_with_the_buffer(splits):
    from sparsity_kernels.ragged_attention.triton import ragged_attention_triton

    (query, key, value, *_), _ = problem([5] * 6, rows=2)
    query, (key, value) = query[:6], (tensor.nan_to_num()[10:30] for tensor in (key, value))
    around = [torch.full((300, *tensor.shape[1:]), torch.nan, device=DEVICE) for tensor in (key, value)]
    key, value = (wide[100:120].copy_(tensor) for wide, tensor in zip(around, (key, value), strict=True))
    start = torch.tensor([15, -1, 20, 2**40, -(2**40), 4], device=DEVICE)
    length = torch.tensor([9, 5, 3, 8, 8, -7], dtype=torch.int32, device=DEVICE)
    output = ragged_attention_triton(query, key, value, start, length, SCALE, 20, splits)
    owned = torch.tensor([5, 0, 0, 0, 0, 0])
    assert_right(output, (query, key, value, start.clamp(0, 20), owned, SCALE))


@pytest.mark.parametrize("dim", [8, 257])
def test_head_dims_outside_the_supported_range_are_named(dim):
    with pytest.raises(ValueError, match=f"head dim must be in 16 … 256, got {dim}"):
        ragged_attention(*problem([5, 9], dim=dim)[0])


@given(st.integers(1, 2**20), st.integers(1, 4096), st.integers(1, 256), st.sampled_from([16, 64, 128]))
def test_splits_fill_the_device_and_keep_their_size(capacity, programs, processors, block):
    from sparsity_kernels.ragged_attention.triton import choose_splits

    splits = choose_splits(capacity, programs, processors, block)
    assert 1 <= splits <= 128
    assert splits == 1 or capacity > (4 * splits - 1) * block
    assert splits == 1 or (splits - 1) * programs < 6 * processors
