"""Progress of long work: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_SECONDS = 15.0


class Progress:
    """``with Progress("train", 350) as progress: progress.advance(step, reward=1.2)``."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self._live: RichProgress | None = None
        if sys.stderr.isatty():
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self._task = self._live.add_task(name, total=total, numbers="")
        self._last_line = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def grow(self, total: int) -> None:
        """The work turned out to be ``total`` long."""
        if total == self.total:
            return
        self.total = total
        if self._live is not None:
            self._live.update(self._task, total=total)

    def advance(self, done: int, **numbers: float) -> None:
        """``done`` of the total are finished; ``numbers`` are shown beside it."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._live is not None:
            self._live.update(self._task, completed=done, numbers=text)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS or done >= self.total:
            self._last_line = now
            line = f"{self.name} {done}/{self.total}  {text}  ({now - self._started:.0f} s)"
            print(line, file=sys.stderr, flush=True)
