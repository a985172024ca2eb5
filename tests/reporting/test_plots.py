"""Figures: what stands in them, not how they look."""

from __future__ import annotations

from itertools import combinations

import pytest
from report_workspace import benchmark_row

from sparsity_forcing.reporting.plots import LABEL_WIDTH, pareto


@pytest.mark.parametrize(
    "ratios, lines", [((0.1, 0.5, 0.9), 1), ((0.06, 0.09, 0.16, 0.21), 3), ((0.0, 0.1, 0.2, 0.3), 2)]
)
def test_every_budget_has_a_label_and_none_lies_on_another(ratios, lines):
    rows = [
        benchmark_row("policy", "top-p", 0.5 + place / 10, 0.9 + place / 100, ratio)
        for place, ratio in enumerate(ratios)
    ]
    labels = pareto(rows).draw().axes[0].texts
    assert sorted(label.get_text() for label in labels) == [f"p = {row.p:g}" for row in rows]
    places = [(label.xy[0], label.xyann[1]) for label in labels]
    assert len({line for _, line in places}) == lines
    for (x, line), (other_x, other_line) in combinations(places, 2):
        assert line != other_line or abs(x - other_x) >= LABEL_WIDTH
