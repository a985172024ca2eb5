"""The selection policy: what is sampled, its log-density and the gradient of that, by hand."""

from __future__ import annotations

import pytest
import torch

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout, select

VISUAL, LENGTH, SIGMA, SCALE = 9, 14, 0.5, 0.25
SETTINGS = SparsityParams(protect_first=2)


@pytest.fixture
def layout() -> PromptLayout:
    ids = torch.tensor([[1, 2, *[VISUAL] * 8, 3, 4, 5, 6], [0, 0, 0, 1, 2, *[VISUAL] * 5, 3, 4, 5, 6]])
    return PromptLayout.from_tokens(ids, (ids > 0).long(), (VISUAL,))


@pytest.fixture
def attention() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of 4 heads and keys of 2, over the whole prompt."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(2, heads, LENGTH, 8, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(4).requires_grad_(), draw(2).requires_grad_()


def run(layout: PromptLayout, attention, **options) -> tuple[SparseContext, torch.Tensor]:
    context = SparseContext(SETTINGS, layout, torch.tensor([0.6, 0.8]), **options)
    return context, context.choose(0, *attention, 0, SCALE)


def masses(layout: PromptLayout, attention) -> torch.Tensor:
    """(batch, prompt) mass of the text rows, from an explicit map."""
    query, key = attention
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * SCALE
    visible = torch.ones(LENGTH, LENGTH).tril().bool() & layout.valid[:, None, None, :]
    maps = logits.masked_fill(~visible, -1e30).softmax(-1)
    return maps[:, :, -4:].sum(2).mean(1)


def log_shares(layout: PromptLayout, attention) -> torch.Tensor:
    """log of the mass of each droppable token over that of all; 0 elsewhere."""
    mass = masses(layout, attention)
    droppable = layout.droppable(SETTINGS)
    total = torch.where(droppable, mass, 0.0).sum(-1, keepdim=True)
    return torch.where(droppable, mass / total, 1.0).log()


def test_without_noise_the_rule_acts_on_the_mass(layout, attention):
    context, kept = run(layout, attention)
    droppable = layout.droppable(SETTINGS)
    seen_by = torch.full((2, LENGTH), 4)
    expected = select(masses(layout, attention), seen_by, droppable, context.p) | (layout.valid & ~droppable)
    assert torch.equal(kept, expected)
    assert context.perturbed == {}
    assert context.stacked_selection_logps().shape == (0, 2)


def test_with_noise_the_rule_acts_on_the_perturbed_mass(layout, attention):
    context, kept = run(layout, attention, sigma=SIGMA, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, LENGTH, generator=torch.Generator().manual_seed(1))
    sample = log_shares(layout, attention) + SIGMA * noise
    torch.testing.assert_close(context.perturbed[0], sample, rtol=1e-6, atol=1e-6)
    droppable = layout.droppable(SETTINGS)
    expected = select(sample.exp(), torch.full((2, LENGTH), 4), droppable, context.p) | (layout.valid & ~droppable)
    assert torch.equal(kept, expected)
    assert not torch.equal(kept, run(layout, attention)[1])


def test_density_of_a_sample_and_its_gradient(layout, attention):
    sampled, kept = run(layout, attention, sigma=SIGMA, generator=torch.Generator().manual_seed(1))
    sample = sampled.perturbed[0].detach()
    replay, again = run(layout, attention, sigma=SIGMA, replay={0: kept}, perturbed={0: sample})
    assert torch.equal(again, kept)

    shares, droppable = log_shares(layout, attention), layout.droppable(SETTINGS)
    by_hand = torch.stack([-((sample[i] - shares[i])[droppable[i]] ** 2).sum() / (2 * SIGMA**2) for i in range(2)])
    found = replay.stacked_selection_logps()
    torch.testing.assert_close(found, by_hand[None])
    torch.testing.assert_close(found, sampled.stacked_selection_logps())
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    gradients = torch.autograd.grad((found[0] * weights).sum(), attention, retain_graph=True)
    expected = torch.autograd.grad((by_hand * weights).sum(), attention)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
        assert gradient.abs().max() > 1e-3


def test_a_sample_keeps_its_kept_set_when_the_attention_has_moved(layout, attention):
    sampled, kept = run(layout, attention, sigma=SIGMA, generator=torch.Generator().manual_seed(1))
    moved = (attention[0] * 3, attention[1])
    replay, again = run(layout, moved, sigma=SIGMA, replay={0: kept}, perturbed=sampled.perturbed)
    assert torch.equal(again, kept)
    assert not torch.allclose(replay.stacked_selection_logps(), sampled.stacked_selection_logps())


def test_the_rows_of_the_suffix_are_enough(layout, attention):
    """After a shared prefix only the rows after it are at hand, and only they score."""
    whole, kept = run(layout, attention)
    context = SparseContext(SETTINGS, layout, whole.p)
    query, key = attention
    assert torch.equal(context.choose(0, query[:, :, -4:], key, LENGTH - 4, SCALE), kept)


def test_scoring_rows_inside_a_shared_prefix_are_refused(layout, attention):
    settings = SETTINGS.model_copy(update={"scoring_rows": "all"})
    context = SparseContext(settings, layout, torch.tensor([0.6, 0.8]))
    with pytest.raises(RuntimeError, match="scoring rows 'all' reach into the shared prefix"):
        context.choose(0, attention[0][:, :, -4:], attention[1], LENGTH - 4, SCALE)


def test_one_budget_per_row(layout):
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        SparseContext(SETTINGS, layout, torch.ones(3))


@pytest.mark.parametrize("p", [0.0, -0.5, 1.5, float("nan")])
def test_a_budget_out_of_range_is_refused(layout, p):
    with pytest.raises(ValueError, match=r"budgets p must be in \(0, 1\], got \[0.5, "):
        SparseContext(SETTINGS, layout, torch.tensor([0.5, p]))


def test_a_sampled_selection_needs_a_generator(layout):
    with pytest.raises(ValueError, match=r"sampling a selection with sigma 0\.5 needs a generator"):
        SparseContext(SETTINGS, layout, torch.ones(2), sigma=0.5)


def test_what_is_not_finite_is_said_as_often_as_asked(layout, attention):
    query, key = attention
    context = SparseContext(SETTINGS, layout, torch.ones(2))
    for _ in range(2):
        with pytest.raises(ValueError, match="attention mass is not finite"):
            context.choose(0, query * torch.nan, key, 0, SCALE)
        with pytest.raises(ValueError, match="attention mass is not finite"):
            context.check()
