"""How sure a difference of two accuracies on the same questions is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import pandas as pd

from sparsity_forcing.evaluation.table import AVERAGE, BenchmarkRow


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two accuracies in -1 … 1 with its interval, over ``n`` questions that both answered."""

    difference: float
    low: float
    high: float
    n: int


def agresti_min(gained: float, lost: float, n: int, confidence: float = 0.95) -> PairedDifference:
    """Interval of (gained - lost) / n for matched pairs: Wald after half a question is added to each of four cells.

    ``gained``: questions that only the first got right, ``lost``: only the second. Far narrower than two separate
    intervals, since both answered the same questions. Source: Agresti & Min 2005, https://doi.org/10.1002/sim.1781
    """
    if n < 1 or gained < 0 or lost < 0 or gained + lost > n:
        raise ValueError(f"need 0 <= gained + lost <= n and n >= 1, got gained {gained}, lost {lost}, n {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    more, less, total = gained + 0.5, lost + 0.5, n + 2
    centre = (more - less) / total
    half_width = z * math.sqrt(more + less - (more - less) ** 2 / total) / total
    return PairedDifference((gained - lost) / n, max(-1.0, centre - half_width), min(1.0, centre + half_width), n)


def paired_difference(samples: pd.DataFrame, first: BenchmarkRow, second: BenchmarkRow) -> PairedDifference | None:
    """First minus second, from the evaluation's per-question scores; None where they share no question.

    ``samples``: columns method, checkpoint, p, benchmark, id, score.
    """
    scores = [samples_of(samples, row).set_index("id")["score"].astype("float64") for row in (first, second)]
    both = pd.concat(scores, axis=1, join="inner", keys=["first", "second"])
    if both.empty:
        return None
    change = both["first"] - both["second"]
    return agresti_min(float(change.clip(lower=0).sum()), float(-change.clip(upper=0).sum()), len(change))


def samples_of(samples: pd.DataFrame, row: BenchmarkRow) -> pd.DataFrame:
    """The per-question results behind a row of the benchmark table."""
    chosen = (samples["method"] == row.method) & (samples["checkpoint"] == row.checkpoint)
    chosen &= (samples["p"] - row.p).abs() < 1e-9
    if row.benchmark != AVERAGE:
        chosen &= samples["benchmark"] == row.benchmark
    return samples[chosen]
