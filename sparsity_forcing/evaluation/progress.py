"""Shows how far an evaluation is: live bars in a terminal, one line per finished row elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(frozen=True)
class Advance:
    """``questions`` more of the row ``title`` are answered; ``done`` says how, once all are."""

    title: str
    questions: int
    done: str | None = None


class RowProgress:
    """Bars for rows with known numbers of questions; a context manager."""

    def __init__(self, totals: Mapping[str, int], console: Console) -> None:
        self.totals, self.console = totals, console
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TimeRemainingColumn()),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._ids = {title: self._bars.add_task(title, total=total) for title, total in totals.items()}

    def __enter__(self) -> RowProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, step: Advance) -> None:
        self._bars.advance(self._ids[step.title], step.questions)
        if step.done is not None and not self.console.is_terminal:
            self.console.print(f"{step.title}: {self.totals[step.title]:,} questions {step.done}")
