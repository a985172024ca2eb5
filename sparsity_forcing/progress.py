"""Shows how far a loop of steps is: a live bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class StepProgress:
    """Progress of ``total`` steps with the figures of the last one; a context manager.

    Args:
        start: steps that an earlier run has done already.
    """

    def __init__(self, title: str, total: int, start: int = 0, console: Console | None = None) -> None:
        self.title, self.total = title, total
        self.console = console or Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, figures="")
        self._last_line = time.monotonic()

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """``step`` steps are done; ``figures`` are shown with three digits."""
        shown = " ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self._bar.update(self._task, completed=step, figures=shown)
        due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and (due or step == self.total):
            self._last_line = time.monotonic()
            self.console.print(f"{self.title}: {step:,} of {self.total:,} {shown}", highlight=False)
