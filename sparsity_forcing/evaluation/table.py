"""The benchmark table: one row per method, checkpoint, budget and benchmark, as ``metrics/evaluate.json`` holds it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich import box
from rich.table import Table

from sparsity_forcing.evaluation.intervals import wilson_interval
from sparsity_forcing.methods.full import Full
from sparsity_forcing.params import Budget, Share

AVERAGE = "average"  # the benchmark that pools every question
Checkpoint = Literal["base", "policy"]
ROW_KEYS = ["method", "checkpoint", "p"]


class TableError(ValueError):
    """``metrics/evaluate.json`` is missing or is not a benchmark table; the message names the file and the fix."""


class BenchmarkRow(BaseModel):
    """How one method with one checkpoint did on one benchmark. Accuracies and ratios are in 0-1.

    ``p`` is 1 for methods that keep everything. ``visual_token_ratio`` is None where no prompt had a visual token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Annotated[str, Field(min_length=1)]
    checkpoint: Checkpoint
    p: Budget
    benchmark: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1)]
    accuracy: Share
    accuracy_low: Share
    accuracy_high: Share
    token_ratio: Share
    visual_token_ratio: Share | None

    @model_validator(mode="after")
    def _interval_holds_the_accuracy(self) -> Self:
        if not self.accuracy_low <= self.accuracy <= self.accuracy_high:
            raise ValueError(f"accuracy {self.accuracy} is outside {self.accuracy_low}-{self.accuracy_high}")
        return self


class BenchmarkTable(BaseModel):
    """Every row of the comparison; ``average`` rows pool all questions of a method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: tuple[BenchmarkRow, ...]

    @model_validator(mode="after")
    def _no_row_twice(self) -> Self:
        keys = [(row.method, row.checkpoint, row.p, row.benchmark) for row in self.rows]
        if len(set(keys)) != len(keys):
            raise ValueError(f"rows are there twice: {sorted({key for key in keys if keys.count(key) > 1})}")
        return self

    def averages(self) -> tuple[BenchmarkRow, ...]:
        """The pooled row of every method and checkpoint."""
        return tuple(row for row in self.rows if row.benchmark == AVERAGE)

    def find(self, method: str, checkpoint: Checkpoint, p: float, benchmark: str = AVERAGE) -> BenchmarkRow:
        """The one row with these keys.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.method, row.checkpoint, row.benchmark) == (method, checkpoint, benchmark) and math.isclose(
                row.p, p
            ):
                return row
        raise KeyError(f"the benchmark table has no row {method} {checkpoint} p={p} {benchmark}")

    def sparsest(self, checkpoint: Checkpoint, loss: float) -> BenchmarkRow:
        """The row of ``checkpoint`` that keeps the fewest visual tokens (all tokens where there are none) and is at
        most ``loss`` less accurate than the dense base, whatever its method and budget."""
        rows = self.averages()
        dense = self.find(Full.name, "base", Full.p)
        near = [row for row in rows if row.checkpoint == checkpoint and row.accuracy >= dense.accuracy - loss]
        return min(near or [row for row in rows if row.checkpoint == checkpoint], key=kept_share)


def kept_share(row: BenchmarkRow) -> float:
    """Share of the visual tokens that were kept, of all tokens where no prompt had a visual one."""
    return row.token_ratio if row.visual_token_ratio is None else row.visual_token_ratio


def benchmark_table(samples: pd.DataFrame) -> BenchmarkTable:
    """The table of per-question results, rows in the order of the samples.

    ``samples`` has the columns method, checkpoint, p, benchmark, score, token_ratio, visual_token_ratio.
    """
    rows = []
    for keys, of_method in samples.groupby(ROW_KEYS, sort=False):
        groups = [*of_method.groupby("benchmark", sort=False), (AVERAGE, of_method)]
        rows += [_row(dict(zip(ROW_KEYS, keys, strict=True)), str(name), group) for name, group in groups]
    return BenchmarkTable(rows=tuple(rows))


def _row(keys: dict, benchmark: str, samples: pd.DataFrame) -> BenchmarkRow:
    accuracy, n = float(samples["score"].mean()), len(samples)
    low, high = wilson_interval(accuracy, n)
    visual = samples["visual_token_ratio"].astype("float64").mean()  # questions without visual tokens are left out
    return BenchmarkRow(
        **keys,
        benchmark=benchmark,
        n=n,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        token_ratio=float(samples["token_ratio"].astype("float64").mean()),
        visual_token_ratio=None if math.isnan(visual) else float(visual),
    )


def load_table(path: str | Path) -> BenchmarkTable:
    """Reads ``metrics/evaluate.json``.

    Raises:
        TableError: the file is missing or does not hold a benchmark table.
    """
    try:
        return BenchmarkTable.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TableError(f"{path} does not exist: run the evaluate stage first") from None
    except (ValidationError, json.JSONDecodeError) as error:
        raise TableError(f"{path} is not a benchmark table, run the evaluate stage again: {error}") from None


def rich_table(table: BenchmarkTable) -> Table:
    """The pooled rows for the terminal, in 80 columns."""
    shown = Table(
        title="All questions (accuracy with its 95% interval)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("method", "checkpoint"):
        shown.add_column(column)
    for column in ("p", "accuracy", "τ", "τ visual", "n"):
        shown.add_column(column, justify="right")
    for row in table.averages():
        visual = "-" if row.visual_token_ratio is None else f"{row.visual_token_ratio:.3f}"
        accuracy = f"{row.accuracy:.1%} ({100 * row.accuracy_low:.1f}-{100 * row.accuracy_high:.1f})"
        cells = (f"{row.p:g}", accuracy, f"{row.token_ratio:.3f}", visual, f"{row.n:,}")
        shown.add_row(row.method, row.checkpoint, *cells)
    return shown
