"""Attention mass, eager and Triton, against the explicit float64 attention map."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tests import DEVICE, LargestTensor
from sparsity_kernels.attention_mass import attention_mass, eager
from torch import Tensor

IMPLS = ["eager", "triton"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
HEADS = ((2, 2), (7, 1), (8, 1), (14, 2))
SHAPES = [(length, heads, kv_heads) for length in (1, 63, 111) for heads, kv_heads in HEADS]


@dataclass(frozen=True)
class Problem:
    """Arguments of `attention_mass`, and its definition in float64."""

    query: Tensor
    key: Tensor
    slots: Tensor
    valid: Tensor
    scale: float = 0.125

    def mass(self, impl: str, **options) -> Tensor:
        return attention_mass(self.query, self.key, self.slots, self.valid, self.scale, impl=impl, **options)

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, query=self.query.detach().to(dtype), key=self.key.detach().to(dtype))

    def rows(self, rows: Tensor) -> Problem:
        rows = rows.to(DEVICE)
        return replace(self, query=self.query[:, :, rows], slots=self.slots[:, rows])

    def sample(self, index: int) -> Problem:
        parts = (part[index : index + 1] for part in (self.query, self.key, self.slots, self.valid))
        return Problem(*parts, scale=self.scale)

    @property
    def visible(self) -> Tensor:
        """(batch, rows, length)"""
        return (torch.arange(self.valid.shape[1], device=DEVICE) <= self.slots[..., None]) & self.valid[:, None]

    @property
    def logits(self) -> Tensor:
        """(batch, heads, rows, length) float64, -inf where not visible; key heads repeated."""
        query, key = self.query.double(), self.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (query @ key.transpose(-1, -2) * self.scale).masked_fill(~self.visible[:, None], -torch.inf)

    @property
    def expected(self) -> Tensor:
        """(batch, length) float64, differentiable."""
        seen = self.visible[:, None]
        finite = self.logits.masked_fill(~seen, torch.finfo(torch.float64).min)
        return (finite.softmax(-1) * seen).sum(2).mean(1)

    def gradients(self, incoming: Tensor, impl: str | None = None, **options) -> tuple[Tensor, Tensor]:
        """Of query and key; of the definition where ``impl`` is None."""
        own = replace(self, query=self.query.detach().requires_grad_(), key=self.key.detach().requires_grad_())
        mass = own.expected if impl is None else own.mass(impl, **options)
        return torch.autograd.grad(mass, (own.query, own.key), incoming.to(mass.dtype))


def problem(
    length: int, heads: int, kv_heads: int, dtype=torch.float32, dim: int = 64, batch: int = 2, side: str = "left"
) -> Problem:
    """All rows are scored; the last sample is padded on one side by a third of its length."""
    generator = torch.Generator().manual_seed(length * 100 + heads)
    query = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    key = torch.randn(batch, kv_heads, length, dim, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    valid = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    padding = slice(0, length // 3) if side == "left" else slice(length - length // 3, length)
    valid[-1, padding] = False
    slots = torch.arange(length, device=DEVICE).expand(batch, -1).masked_fill(~valid, -1)
    return Problem(query, key, slots, valid, dim**-0.5)


def incoming(given: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(given.valid.shape, generator=generator, dtype=torch.float64).to(DEVICE)


@pytest.fixture
def poisoned():
    """`torch.empty` holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@every_impl
@pytest.mark.parametrize("length, heads, kv_heads", SHAPES)
def test_mass_is_the_column_sum_of_the_explicit_map(length, heads, kv_heads, impl, poisoned):
    given = problem(length, heads, kv_heads)
    mass = given.mass(impl)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), given.expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length, heads, kv_heads", SHAPES)
def test_eager_is_exact_in_float64(length, heads, kv_heads):
    given = problem(length, heads, kv_heads, torch.float64)
    torch.testing.assert_close(given.mass("eager"), given.expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given.mass("auto"), given.expected, rtol=1e-12, atol=1e-12)


@every_impl
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [[5, 40, 62], list(range(55, 63)), list(range(63)), list(range(62, -1, -1))])
def test_masses_sum_to_the_number_of_rows_that_see_something(rows, side, impl):
    given = problem(63, 7, 1, side=side).rows(torch.tensor(rows))
    mass = given.mass(impl)
    torch.testing.assert_close(mass.sum(-1), given.visible.any(-1).sum(-1).float())
    assert (mass[~given.valid] == 0).all()
    torch.testing.assert_close(mass.double(), given.expected, rtol=1e-5, atol=1e-6)


@st.composite
def problems(draw) -> Problem:
    """Any slots, also beyond the keys and in any order, and any padding."""
    length, rows, batch = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 2))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (3, 1), (4, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    key = torch.randn(batch, kv_heads, length, 16, generator=generator)
    query = torch.randn(batch, heads, rows, 16, generator=generator)
    slots = draw(st.lists(st.integers(-2, length + 1), min_size=batch * rows, max_size=batch * rows))
    valid = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    slots, valid = torch.tensor(slots).view(batch, rows), torch.tensor(valid).view(batch, length)
    return Problem(query.to(DEVICE), key.to(DEVICE), slots.to(DEVICE), valid.to(DEVICE), 0.3)


@every_impl
@settings(max_examples=15)
@given(given=problems())
def test_any_slots_and_padding(given, impl):
    torch.testing.assert_close(given.mass(impl).double(), given.expected, rtol=1e-5, atol=1e-6)
    weights = incoming(given)
    for got, expected in zip(given.gradients(weights, impl), given.to(torch.float64).gradients(weights), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, heads, kv_heads, dim", [(40, 7, 1, 64), (33, 8, 1, 80), (150, 1, 1, 128)])
def test_error_is_no_worse_than_eager_in_the_same_precision(length, heads, kv_heads, dim, dtype, impl, poisoned):
    given = problem(length, heads, kv_heads, dtype, dim)
    weights = incoming(given)
    exact = given.to(torch.float64)
    unit = torch.finfo(dtype).eps
    expected = [exact.expected, *exact.gradients(weights)]
    eager = [given.mass("eager"), *given.gradients(weights, "eager")]
    found = [given.mass(impl), *given.gradients(weights, impl)]
    rounding = [8 * torch.finfo(torch.float32).eps, *[max(unit, 8 * torch.finfo(torch.float32).eps)] * 2]
    for got, reference, true, term in zip(found, eager, expected, rounding, strict=True):
        peak = true.abs().max()
        allowed = (reference.double() - true).abs().max() + term * peak
        assert (got.double() - true).abs().max() <= allowed
        assert (reference.double() - true).abs().max() <= 2 * term * peak
    assert [part.dtype for part in found] == [torch.float32, dtype, dtype]


@every_impl
def test_keys_of_many_tiles_and_few_rows(impl):
    given = problem(2100, 2, 1, torch.bfloat16, batch=1).rows(torch.tensor([700, 1500, 2097, 2098, 2099]))
    torch.testing.assert_close(given.mass(impl).double(), given.expected, rtol=1e-5, atol=1e-6)


@every_impl
def test_small_incoming_gradients_survive_float16(impl):
    given = problem(300, 1, 1, torch.float16, batch=1)
    given = replace(
        given, query=given.query[:, :, -40:] / 128, slots=given.slots[:, -40:], key=given.key * 16, scale=1.0
    )
    weights = incoming(given) * 1e-4
    got, expected = given.gradients(weights, impl)[0], given.to(torch.float64).gradients(weights)[0]
    assert (got.double() - expected).abs().max() <= 1e-2 * expected.abs().max()


@every_impl
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (7, 1)])
def test_two_runs_are_equal_bit_for_bit(heads, kv_heads, impl, poisoned):
    given = problem(63, heads, kv_heads, torch.bfloat16)
    weights = incoming(given)
    first, second = ([given.mass(impl), *given.gradients(weights, impl)] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_impl
@pytest.mark.parametrize("index", [0, 1])
def test_a_sample_alone_is_the_sample_in_a_batch(index, impl):
    given = problem(130, 2, 2, torch.float16)
    weights, alone = incoming(given), given.sample(index)
    together = [given.mass(impl), *given.gradients(weights, impl)]
    apart = [alone.mass(impl), *alone.gradients(weights[index : index + 1], impl)]
    for one, other in zip(apart, together, strict=True):
        if impl == "triton":
            assert torch.equal(one[0], other[index])
        torch.testing.assert_close(one[0].float(), other[index].float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("room", [300, 3000, 30000])
@pytest.mark.parametrize("rows", [range(63), range(60, 63), [9, 62, 3, 33]])
def test_blocks_of_eager_do_not_matter(rows, room, monkeypatch):
    monkeypatch.setattr(eager, "_CPU_BLOCK", room)
    monkeypatch.setattr(eager, "_DEVICE_BLOCK", room)
    given = problem(63, 14, 2, torch.float64, batch=3).rows(torch.tensor(list(rows)))
    weights = incoming(given)
    torch.testing.assert_close(given.mass("eager"), given.expected)
    for got, true in zip(given.gradients(weights, "eager"), given.gradients(weights), strict=True):
        torch.testing.assert_close(got, true)


@every_impl
@pytest.mark.parametrize("rows", [range(40), range(37, 40)])
def test_a_given_lse_changes_nothing(rows, impl):
    given = problem(40, 7, 1).rows(torch.tensor(list(rows)))
    blind = ~given.visible.any(-1)
    lse = given.logits.logsumexp(-1).float().masked_fill(blind[:, None], torch.nan)
    weights = incoming(given)
    torch.testing.assert_close(given.mass(impl, lse=lse).double(), given.expected, rtol=1e-5, atol=1e-6)
    expected = given.to(torch.float64).gradients(weights)
    for got, true in zip(given.gradients(weights, impl, lse=lse), expected, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5)


def test_gradients_of_eager_are_those_of_the_formula():
    given = problem(7, 4, 2, torch.float64, dim=3)
    weights = incoming(given)

    def weighted(query, key):
        return replace(given, query=query, key=key).mass("eager") * weights

    assert torch.autograd.gradcheck(weighted, (given.query.requires_grad_(), given.key.requires_grad_()))


@every_impl
@pytest.mark.parametrize("wanted", ["query", "key"])
def test_gradient_of_one_input_alone(wanted, impl):
    given = problem(40, 4, 2, torch.float16)
    weights = incoming(given)
    both = dict(zip(("query", "key"), given.gradients(weights, impl), strict=True))
    leaf = getattr(given, wanted).clone().requires_grad_()
    replace(given, **{wanted: leaf}).mass(impl).backward(weights.float())
    assert torch.equal(leaf.grad, both[wanted])


@every_impl
def test_no_graph_without_a_gradient(impl):
    given = problem(5, 2, 1)
    assert given.mass(impl).grad_fn is None
    with torch.no_grad():
        assert replace(given, query=given.query.requires_grad_()).mass(impl).grad_fn is None


@every_impl
def test_memory_is_linear_in_the_length(impl):
    largest = []
    for length in (1024, 2048) if impl == "eager" else (512, 1024):  # the interpreter is slow
        given = problem(length, 2, 1, torch.float16, dim=16, batch=1)
        with LargestTensor() as memory:
            given.gradients(torch.ones_like(given.valid, dtype=torch.float32), impl)
        largest.append(memory.nbytes)
    assert 0 < largest[1] < 3 * largest[0]


@every_impl
def test_strides_do_not_matter(impl):
    given = problem(40, 4, 2, torch.float16)
    swapped = given.query.transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.full((2, 2, 70, 64), torch.nan, dtype=torch.float16, device=DEVICE)
    cache[:, :, :40] = given.key
    other = replace(given, query=swapped, key=cache[:, :, :40])
    weights = incoming(given)
    assert torch.equal(other.mass(impl), given.mass(impl))
    for one, two in zip(other.gradients(weights, impl), given.gradients(weights, impl), strict=True):
        torch.testing.assert_close(one, two)


@every_impl
def test_no_rows_give_no_mass(impl):
    given = problem(5, 2, 1).rows(torch.tensor([], dtype=torch.int64))
    assert given.mass(impl).tolist() == [[0.0] * 5] * 2
    assert given.gradients(incoming(given), impl)[1].abs().sum() == 0


@every_impl
def test_equal_scores_share_equally_and_a_one_hot_score_takes_all(impl):
    slots, valid = torch.tensor([[7]], device=DEVICE), torch.ones(1, 8, dtype=torch.bool, device=DEVICE)
    given = Problem(torch.ones(1, 2, 1, 64, device=DEVICE), torch.zeros(1, 1, 8, 64, device=DEVICE), slots, valid, 1.0)
    assert given.mass(impl).tolist() == [[0.125] * 8]
    given.key[0, 0, 3] = 10.0
    torch.testing.assert_close(given.mass(impl)[0].cpu(), torch.tensor([0, 0, 0, 1.0, 0, 0, 0, 0]))


@every_impl
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_shows_in_the_mass(value, impl):
    given = problem(40, 2, 1)
    given.query[0, 1, 20, 5] = value
    assert not given.mass(impl)[0].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(1, 3, 4, 16)}, "multiple of key heads"),
        ({"query": torch.zeros(1, 4, 16)}, r"query must be \(batch, heads, rows, dim\) .* got \(1, 4, 16\) float32"),
        ({"query": torch.zeros(1, 2, 4, 16).int()}, "float64, got .* int32"),
        ({"query": torch.zeros(1, 2, 16, 4).transpose(2, 3)}, "query must be contiguous in its last dimension"),
        (
            {"key": torch.zeros(1, 2, 5, 16).half()},
            r"key must be \(1, kv_heads, length, 16\) float32 .* got .* float16",
        ),
        ({"slots": torch.zeros(1, 3).long()}, r"slots must be \(1, 4\) int64, got \(1, 3\) int64"),
        ({"slots": torch.zeros(1, 4).int()}, r"slots must be .* int64, got \(1, 4\) int32"),
        ({"valid": torch.ones(1, 5)}, r"valid must be \(1, 5\) bool, got \(1, 5\) float32"),
        ({"lse": torch.zeros(1, 2, 4).double()}, r"lse must be \(1, 2, 4\) float32, got .* float64"),
        ({"valid": torch.ones(1, 5, dtype=torch.bool, device="meta")}, "one device"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "query": torch.zeros(1, 2, 4, 16),
        "key": torch.zeros(1, 2, 5, 16),
        "slots": torch.zeros(1, 4, dtype=torch.int64),
        "valid": torch.ones(1, 5, dtype=torch.bool),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        attention_mass(**(arguments | change))


@pytest.mark.parametrize(
    "dtype, dim, message",
    [(torch.float64, 64, "got .* float64"), (torch.float32, 8, "head dim must be in 16 … 256, got 8")],
)
def test_triton_refuses_what_its_kernels_do_not_take(dtype, dim, message):
    with pytest.raises(ValueError, match=message):
        problem(5, 2, 1, dtype, dim).mass("triton")
