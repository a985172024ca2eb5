"""Signal and noise of gradients, against draws whose mean and variance are known."""

from __future__ import annotations

import pytest
import torch

from sparsity_forcing.evidence.gradient import signal_of


def draws(mean: float, count: int, seed: int, weights: int = 50) -> torch.Tensor:
    noise = torch.randn(count, weights, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + 2 * noise


def test_the_estimates_are_those_of_the_distribution_on_average():
    found = [signal_of(draws(0.3, 10, seed)) for seed in range(400)]
    signals = torch.tensor([one.signal for one in found])
    assert signals.mean() == pytest.approx(50 * 0.09, rel=0.1)
    assert torch.tensor([one.noise for one in found]).mean() == pytest.approx(50 * 4, rel=0.02)


def test_without_a_mean_there_is_no_signal():
    found = [signal_of(draws(0.0, 20, seed)) for seed in range(400)]
    signals = torch.tensor([one.signal for one in found])
    assert abs(signals.mean()) < 0.2
    assert signals.min() < 0 < signals.max()
    errors = torch.tensor([one.error for one in found])
    assert errors.square().mean().sqrt() == pytest.approx(signals.std().item(), rel=0.1)
    assert 0.9 < (torch.tensor([abs(one.z) for one in found]) < 2).float().mean() < 0.99


def test_the_same_draw_every_time_is_signal_alone():
    found = signal_of(torch.full((4, 9), 2.0))
    assert (found.signal, found.noise, found.error, found.z) == (36.0, 0.0, 0.0, None)


def test_the_error_is_that_of_no_signal_whatever_the_signal():
    without, with_mean = (signal_of(draws(mean, 40, seed=1)) for mean in (0.0, 5.0))
    assert with_mean.error == pytest.approx(without.error)
    assert with_mean.z > 100


def test_one_draw_tells_nothing():
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        signal_of(torch.ones(1, 3))
