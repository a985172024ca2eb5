"""How numbers are written. One place, so that the page, the Markdown and the figures agree."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0-1 as a percentage; nothing measured is said so."""
    if share is None or math.isnan(share):
        return NOT_MEASURED
    return f"{100 * share:.{digits}f}%"


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """A 95% interval of a share, in percent: ``92.1–93.6``."""
    if low is None or high is None:
        return ""
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"


def points(difference: float, digits: int = 1) -> str:
    """A difference of two shares in percentage points, with its sign."""
    value = round(100 * difference, digits)
    if value == 0:
        return f"±{0:.{digits}f}"
    return f"{'+' if value > 0 else '−'}{abs(value):.{digits}f}"


def times(ratio: float, digits: int = 2) -> str:
    """A ratio: ``0.41×``."""
    return f"{ratio:.{digits}f}×"


def amount(value: float | None) -> str:
    """A count with thousands separated."""
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def byte_size(value: float) -> str:
    """Bytes in binary units: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``48 s``, ``6 min 12 s``, ``2 h 5 min``."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
