"""Attention among kept keys and causal attention against an explicit softmax, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_tests import DEVICE, LargestTensor
from sparsity_kernels.kept_attention import causal_attention, kept_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALE = 0.3
IMPLS = pytest.mark.parametrize("impl", ["eager", "triton"])


def problem(rows, length, keys, heads, kv_heads, dim=32, dtype=torch.float32, order="random"):
    """query, key, value, index, limits of a batch of two. Entries of index beyond a row's largest limit repeat a slot
    that holds NaN."""
    generator = torch.Generator().manual_seed(rows * 1000 + length + heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(2, heads, rows, dim), draw(2, kv_heads, length, dim), draw(2, kv_heads, length, dim)
    limits = torch.randint(0, keys + 1, (2, rows), generator=generator)
    limits[0, -1] = keys
    if order != "random":
        limits = limits.sort(dim=1, descending=order == "falling").values
    index = torch.stack([torch.randperm(length, generator=generator)[:keys].sort().values for _ in range(2)])
    limits[1].clamp_(max=max(1, keys - 3))
    hidden = [slot for slot in range(length) if slot not in index[1, : limits[1].amax()]]
    if hidden:
        index[1, limits[1].amax() :] = hidden[-1]
        key[1, :, hidden], value[1, :, hidden] = torch.nan, torch.nan
    tensors = [tensor.to(DEVICE, dtype) for tensor in (query, key, value)]
    return *tensors, index.to(DEVICE), limits.to(DEVICE)


def visibility(index, limits, length):
    """(batch, rows, length) bool."""
    visible = torch.zeros(*limits.shape, length, dtype=torch.bool)
    for batch in range(limits.shape[0]):
        for row, limit in enumerate(limits[batch].tolist()):
            visible[batch, row, index[batch, :limit].cpu()] = True
    return visible


def explicit(query, key, value, visible, scale=SCALE):
    """Softmax over the visible keys; 0 where there are none. Key heads are repeated, what no row sees is 0."""
    group = query.shape[1] // key.shape[1]
    seen = visible.any(1)[:, None, :, None]
    keys, values = (t.masked_fill(~seen, 0.0).repeat_interleave(group, 1) for t in (key, value))
    mask = visible[:, None]
    logits = (query @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    weights = logits.masked_fill(~mask.any(-1, keepdim=True), 0.0).softmax(-1) * mask
    return weights @ values


def with_gradients(function, tensors, gradient):
    """Output and gradients of query, key and value, in float64 on the host."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*inputs)
    gradients = torch.autograd.grad(output, inputs, gradient.to(output))
    return [tensor.detach().double().cpu() for tensor in (output, *gradients)]


def compare(arguments, impl):
    """(what `impl` gives, what it should give): output and gradients each."""
    *tensors, index, limits = arguments
    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    visible = visibility(index, limits, tensors[1].shape[2])
    expected = with_gradients(
        lambda *qkv: explicit(*qkv, visible), [tensor.double().cpu() for tensor in tensors], gradient.to(tensors[0])
    )
    found = with_gradients(lambda *qkv: kept_attention(*qkv, index, limits, SCALE, impl), tensors, gradient)
    return found, expected


def assert_right(arguments, impl, tolerance=1e-5):
    for found, expected in zip(*compare(arguments, impl), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@IMPLS
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (7, 1), (8, 1), (14, 2)])
@pytest.mark.parametrize("rows, length, keys", [(1, 1, 1), (5, 63, 40), (12, 111, 111)])
def test_output_and_gradients_are_those_of_the_formula(impl, rows, length, keys, heads, kv_heads):
    assert_right(problem(rows, length, keys, heads, kv_heads), impl)


@IMPLS
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_many_tiles_in_any_order_of_limits(impl, order):
    assert_right(problem(63, 150, 111, 4, 2, order=order), impl)


@IMPLS
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_head_dims_need_not_be_powers_of_two(impl, dim):
    assert_right(problem(6, 40, 30, 7, 1, dim=dim), impl, tolerance=5e-5)


def test_eager_blocks_of_rows_are_exact():
    assert_right(problem(700, 90, 80, 4, 2, dtype=torch.float64, order="rising"), "eager", tolerance=1e-11)
    assert_right(problem(700, 90, 80, 4, 2, dtype=torch.float64), "auto", tolerance=1e-11)


@IMPLS
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(impl):
    *tensors, index, limits = problem(5, 9, 9, 2, 1)
    key, value = tensors[1].nan_to_num(), tensors[2].nan_to_num()
    for unseen in (limits.clone().index_fill(1, torch.tensor([1], device=DEVICE), 0), torch.zeros_like(limits)):
        inputs = [tensor.detach().requires_grad_() for tensor in (tensors[0], key, value)]
        output = kept_attention(*inputs, index, unseen, SCALE, impl)
        assert (output[:, :, 1] == 0).all()
        gradients = torch.autograd.grad(output[:, :, 1].sum(), inputs)
        assert all((gradient == 0).all() for gradient in gradients)


@IMPLS
def test_slots_that_no_row_sees_get_no_gradient(impl):
    arguments = problem(12, 60, 20, 4, 2)
    (_, _, *gradients), _ = compare(arguments, impl)
    seen = visibility(*arguments[3:], 60).any(1)
    for gradient in gradients:
        assert (gradient.transpose(1, 2)[~seen] == 0).all()
        assert (gradient.transpose(1, 2)[seen] != 0).any()


@IMPLS
def test_prompt_and_completion_apart_equal_the_call_with_the_full_mask(impl):
    """Prompt rows are causal; completion rows see the kept prompt keys and their own past."""
    prompt, completion = 40, 9
    length = prompt + completion
    query, key, value, *_ = problem(length, length, length, 4, 2)
    key, value = key.nan_to_num(), value.nan_to_num()
    kept = torch.rand(2, prompt, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[:, -1] = True
    visible = torch.ones(length, length).tril().bool().repeat(2, 1, 1)
    visible[:, prompt:, :prompt] = kept[:, None]
    counts = kept.sum(1, keepdim=True)
    stays = torch.cat([kept, torch.ones(2, completion, dtype=torch.bool)], dim=1)
    index = stays.int().argsort(dim=1, descending=True, stable=True)
    limits = counts + 1 + torch.arange(completion)

    def apart(query, key, value):
        first = causal_attention(query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], SCALE)
        second = kept_attention(query[:, :, prompt:], key, value, index.to(DEVICE), limits.to(DEVICE), SCALE, impl)
        return torch.cat([first, second], dim=2)

    tensors, gradient = (query, key, value), torch.randn(2, 4, length, 32, dtype=torch.float64)
    found = with_gradients(apart, tensors, gradient)
    expected = with_gradients(lambda *qkv: explicit(*qkv, visible), [t.double().cpu() for t in tensors], gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype):
    arguments = problem(63, 150, 111, 7, 1, dim=64, dtype=dtype, order="rising")
    for triton, eager, exact in zip(compare(arguments, "triton")[0], *compare(arguments, "eager"), strict=True):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (triton - exact).abs().max() <= (eager - exact).abs().max() + rounding


@IMPLS
def test_equal_scores_give_the_mean_and_a_dominant_one_its_value(impl):
    query, key, value, index, _ = problem(4, 60, 50, 7, 1)
    key, value = key.nan_to_num(), value.nan_to_num()
    limits = torch.tensor([[50, 20, 3, 1]] * 2, device=DEVICE)
    mean = kept_attention(torch.zeros_like(query), key, value, index, limits, SCALE, impl)
    expected = value[0, 0, index[0, :20]].mean(0)
    torch.testing.assert_close(mean[0, :, 1], expected.expand(7, -1), rtol=1e-5, atol=1e-6)
    slot = int(index[0, 2])
    key[0, 0, slot] = 1000 * query[0, 3, 2]
    output = kept_attention(query, key, value, index, limits, SCALE, impl)
    torch.testing.assert_close(output[0, 3, 2], value[0, 0, slot], rtol=0, atol=0)


@IMPLS
def test_two_runs_are_equal_and_a_sample_alone_is_the_sample_in_its_batch(impl):
    *tensors, index, limits = problem(20, 80, 70, 4, 2)
    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2))

    def run(own):
        attend = lambda *qkv: kept_attention(*qkv, index[own], limits[own], SCALE, impl)  # noqa: E731
        return with_gradients(attend, [tensor[own] for tensor in tensors], gradient[own])

    both = run(slice(0, 2))
    assert all(torch.equal(*pair) for pair in zip(both, run(slice(0, 2)), strict=True))
    for sample in range(2):
        own = slice(sample, sample + 1)
        for alone, together in zip(run(own), both, strict=True):
            exact = 0.0 if impl == "triton" else 1e-5
            torch.testing.assert_close(alone, together[own], rtol=exact, atol=exact)


@IMPLS
def test_any_strides_but_the_last(impl):
    query, key, value, index, limits = problem(6, 40, 30, 4, 2)
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    shared = limits[:1].expand(2, -1).clamp(max=27)
    assert_right((*spread, index.t().contiguous().t(), limits), impl)
    assert_right((query.nan_to_num(), key.nan_to_num(), value.nan_to_num(), index[:1].expand(2, -1), shared), impl)


@pytest.mark.parametrize("impl, size", [("eager", 1024), ("triton", 64)])
def test_memory_grows_linearly(impl, size):
    largest = []
    for length in (size, 2 * size):
        query, key, value = torch.randn(3, 1, 2, length, 16, device=DEVICE).unbind()
        index = torch.arange(length, device=DEVICE)[None]
        inputs = [tensor.requires_grad_() for tensor in (query, key[:, :1], value[:, :1])]
        with LargestTensor() as mode:
            kept_attention(*inputs, index, index + 1, SCALE, impl).sum().backward()
        largest.append(mode.nbytes)
    assert largest[1] < 3 * largest[0]


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (14, 2), (7, 1)])
@pytest.mark.parametrize("length", [1, 63])
def test_causal_attention_is_that_of_the_formula(length, heads, kv_heads):
    *tensors, _, _ = problem(length, length, length, heads, kv_heads, dtype=torch.float64)
    tensors = [tensor.nan_to_num() for tensor in tensors]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(2, -1, -1)
    gradient = torch.randn(tensors[0].shape, dtype=torch.float64)
    found = with_gradients(lambda *qkv: causal_attention(*qkv, SCALE), tensors, gradient)
    expected = with_gradients(lambda *qkv: explicit(*qkv, causal), [t.cpu() for t in tensors], gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("query", lambda t: t[0], "query must have 4 dimensions"),
        ("query", lambda t: t.int(), "float32, bfloat16, float16, float64"),
        ("query", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "contiguous in its last dimension"),
        ("query", lambda t: t[:, :3], "do not fit"),
        ("query", lambda t: t[..., :8].contiguous(), "do not fit"),
        ("key", lambda t: t.half(), "share one of"),
        ("key", lambda t: t[:, :, :0], "key must not be empty"),
        ("value", lambda t: t[:, :1], "do not fit"),
        ("index", lambda t: t.int(), "index must be int64"),
        ("index", lambda t: t[:1], "index must be int64 with two dimensions, the first of 2"),
        ("index", lambda t: t[:, :0], "at least one key"),
        ("limits", lambda t: t[:, :2], r"limits must be \(batch, rows\) = \(2, 5\), got \(2, 2\)"),
        ("limits", lambda t: t.float(), "limits must be int64"),
        ("impl", lambda t: "cuda", "impl must be"),
    ],
)
def test_bad_arguments_are_named(name, change, message):
    names = ("query", "key", "value", "index", "limits", "scale", "impl")
    arguments = dict(zip(names, (*problem(5, 9, 7, 4, 2), SCALE, "auto"), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        kept_attention(**arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks")
@IMPLS
@pytest.mark.parametrize("limit, got", [(8, "1 … 8"), (-1, "-1 … 7"), (2**40, "1 … 1099511627776")])
def test_limits_outside_the_index_are_named(impl, limit, got):
    *tensors, index, limits = problem(5, 9, 7, 4, 2)
    limits = limits.clamp(min=1)
    limits[1, 2] = limit
    with pytest.raises(ValueError, match=rf"limits must be in \[0, 7\].*got {got}"):
        kept_attention(*tensors, index, limits, SCALE, impl)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks")
@IMPLS
@pytest.mark.parametrize("slot", [-1, 9])
def test_slots_outside_the_sample_are_named_where_they_are_used(impl, slot):
    *tensors, index, limits = problem(5, 9, 7, 4, 2)
    for unused in (4, 0):
        limits[1] = limits[1].clamp(max=unused)
        expected = kept_attention(*tensors, index, limits, SCALE, impl)
        index[1, unused:] = slot
        assert torch.equal(kept_attention(*tensors, index, limits, SCALE, impl), expected)
    limits[1, 0] = 1
    with pytest.raises(ValueError, match=rf"slots in \[0, 9\) within the limits, got .*{slot}"):
        kept_attention(*tensors, index, limits, SCALE, impl)


def finite_problem():
    """(query, key, value) of 40 slots without NaN, and 30 slots of each sample from 1 on."""
    tensors = [tensor.nan_to_num() for tensor in problem(5, 40, 30, 4, 2)[:3]]
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(39, generator=generator)[:30].sort().values + 1 for _ in range(2)])
    return tensors, index.to(DEVICE)


def unchecked(tensors, index, limits):
    """What the kernels give where nobody looks at index and limits, as on a GPU."""
    from sparsity_kernels.kept_attention.triton import kept_attention_triton

    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attend = lambda *qkv: kept_attention_triton(*qkv, index, limits, SCALE)  # noqa: E731
    return with_gradients(attend, tensors, gradient.to(DEVICE)), gradient


def test_kernels_take_limits_outside_the_index_as_the_nearer_end():
    tensors, index = finite_problem()
    for tensor in tensors[1:]:
        tensor[:, :, 0] = torch.nan
    wide = torch.zeros(2, 4096, dtype=torch.int64, device=DEVICE)  # what lies beside the index in memory
    index = wide[:, 1000:1030].copy_(index)
    limits = torch.tensor([[30, 31, -1, 0, 12], [2**40, 900, -(2**40), -900, 30]], device=DEVICE)
    found, gradient = unchecked(tensors, index, limits)
    visible = visibility(index, limits.clamp(0, 30), 40)
    expected = with_gradients(lambda *qkv: explicit(*qkv, visible), [t.double().cpu() for t in tensors], gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_kernels_take_a_slot_outside_the_sample_as_a_key_of_zeros():
    tensors, index = finite_problem()
    limits = torch.tensor([[30, 3, 17, 1, 0]] * 2, device=DEVICE)
    index[0, 0], index[0, 20], index[1, 2] = -1, 40, 41
    found, gradient = unchecked(tensors, index, limits)
    visible = visibility(index + 1, limits, 43)  # slot -1 is the first, slots 40 and 41 are the last
    pad = lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 1, 2))  # noqa: E731
    attend = lambda query, key, value: explicit(query, pad(key), pad(value), visible)  # noqa: E731
    expected = with_gradients(attend, [tensor.double().cpu() for tensor in tensors], gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [8, 257])
def test_head_dims_outside_the_supported_range_are_named(dim):
    *tensors, index, limits = problem(5, 9, 7, 4, 2, dim=dim)
    with pytest.raises(ValueError, match=f"head dim must be in 16 … 256, got {dim}"):
        kept_attention(*tensors, index, limits, SCALE)
    with pytest.raises(ValueError, match="as many rows as keys, got 5 and 9"):
        causal_attention(*problem(5, 9, 7, 4, 2)[:3], SCALE)


def test_float64_is_eager_only():
    with pytest.raises(ValueError, match="triton"):
        kept_attention(*problem(5, 9, 7, 4, 2, dtype=torch.float64), SCALE, "triton")
