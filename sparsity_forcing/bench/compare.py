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
    figures of the case. ``baseline``: the arm that ``speedup`` is against; ``speedups`` has all of them.
    """

    name: str
    setting: dict
    subject: str
    baseline: str
    seconds: dict[str, list[float]]
    checked: list[dict]
    notes: dict = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Baseline time over subject time: the median of the ratios within repetitions."""
        return self.speedups[self.baseline]["median"]

    @property
    def speedups(self) -> dict[str, dict]:
        """The same against every other arm, with the range of the ratios."""
        found = {}
        for arm in self.seconds:
            if arm != self.subject:
                pairs = zip(self.seconds[arm], self.seconds[self.subject], strict=True)
                ratios = [other / own for other, own in pairs]
                found[arm] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        return found

    def as_json(self) -> dict:
        return {
            "name": self.name,
            "setting": self.setting,
            "subject": self.subject,
            "baseline": self.baseline,
            "speedups": self.speedups,
            "median_seconds": {arm: statistics.median(samples) for arm, samples in self.seconds.items()},
            "seconds": self.seconds,
            "checked": self.checked,
            "notes": self.notes,
        }


def fastest(seconds: dict[str, list[float]], besides: str) -> str:
    """The arm with the lowest median, ``besides`` left out: the baseline that is hardest to beat."""
    return min((arm for arm in seconds if arm != besides), key=lambda arm: statistics.median(seconds[arm]))


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


def captured(run: Callable[[], torch.Tensor], device: torch.device | str) -> Callable[[], torch.Tensor]:
    """``run`` as a CUDA graph on a GPU, so that no arm waits for its own launches; as it is elsewhere.

    A replay fills the same output again.
    """
    if torch.device(device).type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


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
