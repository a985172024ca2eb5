import pytest
from scipy.stats import binomtest

from sparsity_forcing.evaluation.intervals import wilson_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 20), (20, 20), (9, 10), (277, 300), (2256, 2400)])
def test_equals_scipy(right, n, confidence):
    expected = binomtest(right, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(right / n, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("right, n", [(0, 7), (7, 7), (3, 7)])
def test_holds_the_accuracy_and_stays_within_0_and_1(right, n):
    low, high = wilson_interval(right / n, n)
    assert 0.0 <= low <= right / n <= high <= 1.0


@pytest.mark.parametrize("arguments", [(0.5, 0), (1.1, 10), (-0.1, 10), (float("nan"), 10), (0.5, 10, 1.0)])
def test_refuses_what_has_no_interval(arguments):
    with pytest.raises(ValueError, match=r"needs at least|must be"):
        wilson_interval(*arguments)
