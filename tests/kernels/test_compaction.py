"""Compaction: the kept positions, in order, in a ragged cache that grows in place."""

from __future__ import annotations

import pytest
import torch
from kernel_tests import DEVICE, LargestTensor
from sparsity_kernels import CapacityError, RaggedCache, compact
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["eager", "triton"])
def impl(request) -> str:
    return request.param


@pytest.fixture(params=["packed", "rectangular"])
def layout(request) -> str:
    return request.param


def layer(batch: int, heads: int, length: int, dim: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and a kept set whose rows differ in size; what is dropped is NaN."""
    generator = torch.Generator().manual_seed(length)
    kept = torch.rand(batch, length, generator=generator) < torch.linspace(0.1, 1.1, batch)[:, None]
    kept[:, -1] = True
    key, value = torch.randn(2, batch, heads, length, dim, generator=generator).to(dtype)
    for tensor in (key, value):
        tensor.masked_fill_(~kept[:, None, :, None], torch.nan)
    return key.to(DEVICE), value.to(DEVICE), kept.to(DEVICE)


def new_entries(batch: int, heads: int, new: int, dim: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """As a model hands them over: transposed views."""
    generator = torch.Generator().manual_seed(new)
    both = torch.randn(2, batch, new, heads, dim, generator=generator).to(DEVICE, dtype)
    return both[0].transpose(1, 2), both[1].transpose(1, 2)


def small(impl: str = "eager", layout: str = "auto", room: int = 0) -> RaggedCache:
    """Two rows of 2 and 3 kept slots, one head, dim 16."""
    key, value = torch.randn(2, 2, 1, 10, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kept = torch.zeros(2, 10, dtype=torch.bool, device=DEVICE)
    kept[0, [1, 7]] = kept[1, [0, 4, 9]] = True
    return compact(key, value, kept, room, impl, layout)


def stored(cache: RaggedCache, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """(kv_heads, length, dim) keys and values and (length,) slots of a row."""
    first = int(cache.start[row])
    entries = slice(first, first + int(cache.length[row]))
    return cache.key[entries].transpose(0, 1), cache.value[entries].transpose(0, 1), cache.slots[entries]


def check_consistent(cache: RaggedCache) -> None:
    """Rows lie one behind the other, host and device agree, and free entries are zero."""
    assert cache.start.dtype == torch.int64
    assert cache.length.dtype == cache.slots.dtype == torch.int32
    assert cache.length.tolist() == cache.lengths
    assert cache.start.tolist() == [sum(cache.capacity[:row]) for row in range(cache.batch)]
    assert len(cache.key) == len(cache.value) == len(cache.slots) == sum(cache.capacity)
    assert cache.room_left == min(c - n for c, n in zip(cache.capacity, cache.lengths, strict=True))
    for row in range(cache.batch):
        first, last = int(cache.start[row]) + cache.lengths[row], int(cache.start[row]) + cache.capacity[row]
        assert (cache.slots[first:last] == -1).all()
        assert (cache.key[first:last] == 0).all()
        assert (cache.value[first:last] == 0).all()


@pytest.mark.parametrize("heads, dim, dtype", [(1, 64, torch.bfloat16), (4, 128, torch.float32)])
@pytest.mark.parametrize("length", [1, 63, 111])
def test_kept_positions_come_out_in_ascending_order(impl, layout, length, heads, dim, dtype):
    key, value, kept = layer(4, heads, length, dim, dtype)
    cache = compact(key, value, kept, room=2, impl=impl, layout=layout)
    check_consistent(cache)
    counts = kept.sum(-1).tolist()
    assert cache.lengths == counts
    assert cache.capacity == [(count if layout == "packed" else max(counts)) + 2 for count in counts]
    assert cache.nbytes == 2 * sum(cache.capacity) * heads * dim * key.element_size()
    for row in range(4):
        keys, values, slots = stored(cache, row)
        assert torch.equal(keys, key[row][:, kept[row]])
        assert torch.equal(values, value[row][:, kept[row]])
        assert slots.tolist() == kept[row].nonzero().flatten().tolist()
    assert not cache.key.isnan().any()
    assert not cache.value.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 80])
def test_any_strides_and_dims_that_are_no_power_of_two(impl, dtype, dim):
    key, value, kept = layer(3, 7, 63, dim, dtype)
    strided = key.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([value, value], dim=-1)[..., :dim]
    expected, cache = compact(key, value, kept, impl=impl), compact(strided, wide, kept, impl=impl)
    assert torch.equal(cache.key, expected.key)
    assert torch.equal(cache.value, expected.value)


def test_auto_is_packed_under_triton_and_rectangular_under_eager():
    assert small("eager").capacity == [3, 3]
    assert small("eager", "packed").capacity == [2, 3]
    assert small("triton").capacity == [2, 3]


def test_a_rectangular_cache_is_a_plain_padded_one(impl):
    cache = small(impl, "rectangular", room=1)
    assert cache.rectangular == 4
    padded = cache.key.view(2, 4, 1, 16)
    assert padded.data_ptr() == cache.key.data_ptr()
    for row, length in enumerate([2, 3]):
        assert torch.equal(padded[row, :length].transpose(0, 1), stored(cache, row)[0])
    assert small(impl, "packed").rectangular is None
    assert small(impl, "packed").select([1, 1]).rectangular == 3


def test_a_row_alone_equals_the_row_in_a_batch_and_two_runs_are_equal(impl, layout):
    key, value, kept = layer(4, 2, 63, 16)
    cache, again = (compact(key, value, kept, impl=impl, layout=layout) for _ in range(2))
    assert torch.equal(cache.key, again.key)
    assert torch.equal(cache.slots, again.slots)
    for row in range(4):
        alone = compact(key[row : row + 1], value[row : row + 1], kept[row : row + 1], impl=impl, layout=layout)
        for one, other in zip(stored(alone, 0), stored(cache, row), strict=True):
            assert torch.equal(one, other)


def test_the_counts_may_come_from_the_host(impl, layout):
    key, value, kept = layer(3, 2, 63, 16)
    expected = compact(key, value, kept, impl=impl, layout=layout)
    cache = compact(key, value, kept, impl=impl, layout=layout, lengths=kept.sum(-1).tolist())
    assert torch.equal(cache.key, expected.key)
    assert cache.lengths == expected.lengths
    with pytest.raises(ValueError, match="lengths must be"):
        compact(key, value, kept, lengths=[1] * (3 if DEVICE == "cpu" else 2))


@pytest.mark.parametrize("heads", [1, 4])
def test_appended_entries_lie_behind_those_of_their_row_and_nothing_moves(impl, layout, heads):
    key, value, kept = layer(3, heads, 63, 64)
    cache = compact(key, value, kept, room=5, impl=impl, layout=layout)
    before = [stored(cache, row) for row in range(3)]
    addresses = [tensor.data_ptr() for tensor in (cache.key, cache.value, cache.slots, cache.start, cache.length)]
    first, second = new_entries(3, heads, 1, 64), new_entries(3, heads, 3, 64)
    cache.append(*first)
    slots = torch.tensor([[70, 71, 72]] * 3, device=DEVICE)
    cache.append(*second, slots=slots)
    assert [t.data_ptr() for t in (cache.key, cache.value, cache.slots, cache.start, cache.length)] == addresses
    assert cache.lengths == [count + 4 for count in kept.sum(-1).tolist()]
    assert cache.room_left == 1
    check_consistent(cache)
    for row, (keys, values, old_slots) in enumerate(before):
        now = stored(cache, row)
        assert torch.equal(now[0], torch.cat([keys, first[0][row], second[0][row]], dim=1))
        assert torch.equal(now[1], torch.cat([values, first[1][row], second[1][row]], dim=1))
        assert now[2].tolist() == [*old_slots.tolist(), -1, 70, 71, 72]


@pytest.mark.parametrize("heads, dim", [(3, 80), (40, 128)])
def test_triton_appends_what_eager_appends_for_any_heads(heads, dim):
    key, value, kept = layer(2, heads, 5, dim, torch.bfloat16)
    caches = [compact(key, value, kept, room=2, impl=each, layout="packed") for each in ("eager", "triton")]
    for cache in caches:
        cache.append(*new_entries(2, heads, 2, dim, torch.bfloat16))
    assert torch.equal(caches[0].key, caches[1].key)
    assert torch.equal(caches[0].value, caches[1].value)


def test_no_room_is_said_before_anything_is_written(impl, layout):
    cache = small(impl, layout, room=2)
    cache.append(*new_entries(2, 1, 1, 16))
    before = [cache.key.clone(), cache.value.clone(), cache.slots.clone(), cache.length.clone()]
    assert cache.room_left == 1
    with pytest.raises(CapacityError, match=r"no room for 2 new entries .* left for 1"):
        cache.append(*new_entries(2, 1, 2, 16))
    for old, now in zip(before, [cache.key, cache.value, cache.slots, cache.length], strict=True):
        assert torch.equal(old, now)
    assert cache.room_left == 1
    assert issubclass(CapacityError, RuntimeError)
    check_consistent(cache)


def test_a_grown_cache_is_a_copy_with_more_room(impl, layout):
    cache = small(impl, layout, room=1)
    cache.append(*new_entries(2, 1, 1, 16))
    grown = cache.grown(4)
    assert grown.room_left == 4
    assert grown.capacity == [capacity + 4 for capacity in cache.capacity]
    grown.append(*new_entries(2, 1, 4, 16))
    for each in (cache, grown):
        check_consistent(each)
    for row in range(2):
        for old, now in zip(stored(cache, row), stored(grown, row), strict=True):
            length = cache.lengths[row]
            assert torch.equal(old, now[:length] if now.ndim == 1 else now[:, :length])
    with pytest.raises(ValueError, match="must not be negative"):
        cache.grown(-1)


@pytest.mark.parametrize("chosen", [[1, 0], [0, 0, 1], [1], torch.tensor([1, 1, 0, 0])])
def test_rows_can_be_selected_and_repeated(impl, layout, chosen):
    cache = small(impl, layout, room=2)
    cache.append(*new_entries(2, 1, 1, 16))
    selected = cache.select(chosen)
    check_consistent(selected)
    selected.append(*new_entries(len(chosen), 1, 1, 16))
    check_consistent(selected)
    check_consistent(cache)
    for place, row in enumerate(torch.as_tensor(chosen).tolist()):
        for old, now in zip(stored(cache, row), stored(selected, place), strict=True):
            assert torch.equal(old, now[:-1] if now.ndim == 1 else now[:, :-1])


@pytest.mark.parametrize("chosen", [[], [2], [-1]])
def test_rows_that_do_not_exist_are_named(chosen):
    with pytest.raises(ValueError, match=r"rows must be in \[0, 2\)"):
        small().select(chosen)


def test_what_a_graph_replays_is_written_where_room_was_reserved(impl):
    cache, appended = small(impl, room=2), small(impl, room=2)
    new = new_entries(2, 1, 1, 16)
    for _ in range(2):
        cache.reserve(1)
        cache.write(*new)
        appended.append(*new)
    with pytest.raises(CapacityError):
        cache.reserve(1)
    assert torch.equal(cache.key, appended.key)
    assert cache.lengths == appended.lengths == cache.length.tolist()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks")
def test_writing_without_room_is_said_before_anything_is_written(impl, layout):
    cache = small(impl, layout, room=1)
    cache.reserve(1)
    cache.write(*new_entries(2, 1, 1, 16))
    before = [tensor.clone() for tensor in (cache.key, cache.value, cache.slots, cache.length)]
    with pytest.raises(CapacityError, match="no room for 2 new entries a row: capacities"):
        cache.write(*new_entries(2, 1, 2, 16))
    for old, now in zip(before, [cache.key, cache.value, cache.slots, cache.length], strict=True):
        assert torch.equal(old, now)


@pytest.mark.parametrize("heads", [1, 40])
def test_the_kernel_writes_no_entry_that_a_row_has_no_room_for(heads):
    key, value, kept = layer(3, heads, 20, 128)
    cache = compact(key, value, kept, room=2, impl="triton", layout="packed")
    expected = compact(key, value, kept, room=2, impl="triton", layout="packed")
    new = new_entries(3, heads, 5, 128)
    slots = torch.arange(30, 35, device=DEVICE).expand(3, -1)
    expected.append(*(tensor[:, :, :2] for tensor in new), slots[:, :2])
    buffers = [torch.cat([tensor, torch.full_like(tensor, 7)[:8]]) for tensor in (cache.key, cache.value, cache.slots)]
    cache.key, cache.value, cache.slots = (buffer[: len(cache.key)] for buffer in buffers)  # 7 lies behind them
    for _ in range(2):
        cache._write(*new, slots)  # as a graph that is replayed: nobody has looked
        assert torch.equal(cache.length, expected.length)
        for name in ("key", "value", "slots"):
            assert torch.equal(getattr(cache, name), getattr(expected, name))
        assert all((buffer[len(cache.key) :] == 7).all() for buffer in buffers)


def test_room_cannot_be_given_back_by_reserving():
    cache = small(room=1)
    with pytest.raises(ValueError, match="new must not be negative, got -5"):
        cache.reserve(-5)
    assert cache.room_left == 1


def test_float64_is_eager_only():
    given = torch.randn(2, 1, 1, 5, 16, dtype=torch.float64, device=DEVICE), torch.ones(1, 5, device=DEVICE).bool()
    assert compact(*given[0], given[1]).key.dtype == torch.float64
    with pytest.raises(ValueError, match="takes tensors of float32, bfloat16, float16, got tensors of float64"):
        compact(*given[0], given[1], impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_an_append_can_be_captured_into_a_cuda_graph():
    cache, expected = small("triton", room=4), small("triton", room=4)
    key, value = new_entries(2, 1, 1, 16)
    for each in (cache, expected):
        each.append(key, value)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(key, value)
    for step in range(3):
        key.fill_(step)
        cache.reserve(1)
        graph.replay()
        expected.append(key, value)
    assert torch.equal(cache.key, expected.key)
    assert torch.equal(cache.length, expected.length)


def test_nothing_flows_back_through_a_cache(impl):
    key, value, kept = layer(2, 1, 5, 16)
    cache = compact(key.requires_grad_(), value.requires_grad_(), kept, room=1, impl=impl)
    cache.append(key[:, :, -1:], value[:, :, -1:])
    assert not cache.key.requires_grad
    assert not cache.value.requires_grad


def test_the_largest_tensor_grows_with_the_length_and_not_with_its_square(impl):
    largest = []
    for length in (1024, 2048):
        key, value, kept = layer(1, 1, length, 16)
        with LargestTensor() as watched:
            compact(key, value, kept, impl=impl).select([0, 0])
        largest.append(watched.nbytes)
    assert largest[1] < 3 * largest[0]


def test_a_row_that_keeps_nothing_is_named(impl):
    kept = torch.tensor([[True], [False]], device=DEVICE)
    with pytest.raises(ValueError, match="row 1 keeps no token"):
        compact(torch.zeros(2, 1, 1, 16, device=DEVICE), torch.zeros(2, 1, 1, 16, device=DEVICE), kept, impl=impl)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"key": torch.zeros(2, 1, 6, 16)}, r"one shape .*got \(2, 1, 6, 16\)"),
        ({"value": torch.zeros(2, 1, 5, 16).long()}, "one dtype .*int64"),
        ({"key": torch.zeros(2, 1, 5, 16).bfloat16()}, "one dtype .*bfloat16"),
        ({"kept": torch.ones(2, 5)}, "kept must be .*bool.*float32"),
        ({"kept": torch.ones(2, 4, dtype=torch.bool)}, r"\(2, 5\) bool and not empty, got \(2, 4\)"),
        ({"value": torch.zeros(2, 1, 16, 5).transpose(2, 3)}, "value must be contiguous in its last dim"),
        ({"room": -1}, "room must not be negative"),
        ({"layout": "dense"}, "layout must be one of auto, packed, rectangular, got 'dense'"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
)
def test_bad_input_is_named(changed, message):
    given = {name: torch.zeros(2, 1, 5, 16) for name in ("key", "value")}
    given |= {"kept": torch.ones(2, 5, dtype=torch.bool)} | changed
    with pytest.raises(ValueError, match=message):
        compact(**given)


@pytest.mark.parametrize(
    "key, slots, message",
    [
        (torch.zeros(2, 2, 1, 16), None, r"key must be .*\(2, 1, new, 16\).*got \(2, 2, 1, 16\)"),
        (torch.zeros(2, 1, 1, 16).half(), None, "float32.*got.*float16"),
        (torch.zeros(2, 1, 16, 1).transpose(2, 3).expand(2, 1, 2, 16), None, "one shape"),
        (torch.zeros(2, 1, 16, 2).transpose(2, 3), None, "contiguous in its last dim"),
        (torch.zeros(2, 1, 1, 16), torch.zeros(2, 2).long(), r"slots must be .*\(2, 1\)"),
        (torch.zeros(2, 1, 1, 16), torch.zeros(2, 1), "int32 or int64.*float32"),
    ],
)
def test_bad_entries_are_named_and_take_no_room(key, slots, message):
    cache = small(room=3)
    with pytest.raises(ValueError, match=message):
        cache.append(
            key.to(DEVICE), torch.zeros(2, 1, 1, 16, device=DEVICE), None if slots is None else slots.to(DEVICE)
        )
    assert cache.room_left == 3
    check_consistent(cache)
