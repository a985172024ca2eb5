import pandas as pd
import pytest

from sparsity_forcing.evaluation.table import benchmark_table
from sparsity_forcing.reporting.intervals import agresti_min, paired_difference


def samples(first: list[float], second: list[float]) -> pd.DataFrame:
    rows = [
        {"method": method, "checkpoint": checkpoint, "p": p, "benchmark": "read", "id": str(i), "score": score}
        | {"token_ratio": 1.0, "visual_token_ratio": 1.0}
        for method, checkpoint, p, scores in (("top-p", "policy", 0.975, first), ("Full", "base", 1.0, second))
        for i, score in enumerate(scores)
    ]
    return pd.DataFrame(rows)


def test_hand_computed_interval():
    # n = 100, 8 gained, 4 lost: centre (8.5 - 4.5) / 102, variance (8.5 + 4.5 - 16 / 102) / 102**2
    found = agresti_min(gained=8, lost=4, n=100)
    assert found.difference == pytest.approx(0.04)
    centre, half = 4 / 102, 1.959964 * (13 - 16 / 102) ** 0.5 / 102
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_no_change_still_has_a_width():
    found = agresti_min(0, 0, 50)
    assert found.difference == 0
    assert found.low < 0 < found.high


@pytest.mark.parametrize("arguments", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts(arguments):
    with pytest.raises(ValueError, match="gained"):
        agresti_min(*arguments)


def test_questions_are_matched_by_id_whatever_their_order():
    frame = samples([1, 1, 0, 0], [1, 0, 1, 1])
    table = benchmark_table(frame)
    after, dense = table.find("top-p", "policy", 0.975), table.find("Full", "base", 1.0)
    found = paired_difference(frame, after, dense)
    assert found == agresti_min(1, 2, 4)
    assert paired_difference(frame.sample(frac=1, random_state=3), after, dense) == found


def test_nothing_in_common():
    frame = samples([1], [1])
    table = benchmark_table(frame)
    frame.loc[0, "id"] = "other"
    assert paired_difference(frame, table.find("top-p", "policy", 0.975), table.find("Full", "base", 1.0)) is None
