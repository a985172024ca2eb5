"""Side-by-side timing: every repetition runs all arms in turn, and no speed-up is given without its check."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


class BenchError(RuntimeError):
    """A result is wrong, so its speed means nothing."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    ``seconds``: raw samples per arm, one a repetition, in the order they were taken. ``setting``: shapes, dtype and
    what else a reader needs. ``checked``: what was compared before the timing, and how well it agreed. ``notes``: other
    figures of the case.
    """

    name: str
    setting: dict
    subject: str
    baseline: str
    seconds: dict[str, list[float]]
    checked: dict
    notes: dict = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Baseline time over subject time: the median of the ratios within repetitions."""
        return statistics.median(self._ratios())

    def as_json(self) -> dict:
        return {
            "name": self.name,
            "setting": self.setting,
            "subject": self.subject,
            "baseline": self.baseline,
            "speedup": self.speedup,
            "speedup_range": [min(self._ratios()), max(self._ratios())],
            "median_seconds": {arm: statistics.median(samples) for arm, samples in self.seconds.items()},
            "seconds": self.seconds,
            "checked": self.checked,
            "notes": self.notes,
        }

    def _ratios(self) -> list[float]:
        pairs = zip(self.seconds[self.baseline], self.seconds[self.subject], strict=True)
        return [dense / sparse for dense, sparse in pairs]


def time_arms(
    arms: dict[str, Callable[[], object]], repetitions: int, inner: int = 1, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of every arm: ``repetitions`` samples, each the mean of ``inner`` calls.

    The order rotates from repetition to repetition, so that a slow moment of the machine hits all arms alike.
    """
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for run in arms.values():
        for _ in range(warm_up):
            run()
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in (*names[turn:], *names[:turn]):
            synchronise()
            started = time.perf_counter()
            for _ in range(inner):
                arms[name]()
            synchronise()
            seconds[name].append((time.perf_counter() - started) / inner)
    return seconds


def require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> dict:
    """What `Case.checked` says of a comparison: the largest error relative to the largest expected value.

    Raises:
        BenchError: it is above ``tolerance``, or not a number.
    """
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= tolerance:
        raise BenchError(f"{what}: the largest relative error is {error:.2e}, allowed are {tolerance:.0e}")
    return {"what": what, "largest_relative_error": error, "allowed": tolerance}


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str) -> dict:
    """As `require_close`, for what must agree exactly.

    Raises:
        BenchError: something differs.
    """
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise BenchError(f"{what}: not equal")
    return {"what": what, "equal": True}
