"""How sure an accuracy is."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(accuracy: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of an accuracy measured on ``n`` questions.

    Unlike accuracy +- 1.96 standard errors it stays within 0-1 and does not shrink to nothing at 0% or 100%. Scores
    between 0 and 1 are allowed too: their variance is at most that of right-or-wrong scores with the same mean, so the
    interval is then wider than needed, never narrower.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953

    Raises:
        ValueError: no questions, an accuracy outside 0-1, or a confidence outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one question, got n = {n}")
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy must be in 0-1, got {accuracy}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    shrink = 1.0 + z * z / n
    centre = (accuracy + z * z / (2 * n)) / shrink
    half_width = z / shrink * math.sqrt(accuracy * (1.0 - accuracy) / n + z * z / (4 * n * n))
    return max(0.0, min(accuracy, centre - half_width)), min(1.0, max(accuracy, centre + half_width))
