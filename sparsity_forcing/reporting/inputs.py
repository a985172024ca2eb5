"""What the stages before the report left behind. Only the benchmark table is required."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from sparsity_forcing.data.schema import Row, read_rows
from sparsity_forcing.evaluation.table import BenchmarkTable, load_table
from sparsity_forcing.inputs import BASE, POLICY, TEST

METRICS = ("prepare", "base", "profile", "train")


class ReportError(ValueError):
    """The report cannot be made; the message names the file and the stage to run."""


@dataclass(frozen=True)
class Inputs:
    """Everything the report reads.

    ``metrics``: stage -> its metrics JSON. ``missing``: what is not there -> why, in words for the reader.
    """

    table: BenchmarkTable
    metrics: dict[str, dict] = field(default_factory=dict)
    curve: pd.DataFrame | None = None
    samples: pd.DataFrame | None = None
    test_rows: list[Row] | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def metric(self, stage: str, *keys: str):
        """A value of a stage's metrics, or None where that stage or key is not there."""
        value = self.metrics.get(stage)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_inputs(root: Path) -> Inputs:
    """Reads the workspace at ``root``.

    Raises:
        TableError: ``metrics/evaluate.json`` is missing or is no benchmark table.
        ReportError: a file that is there cannot be read.
    """
    table = load_table(root / "metrics" / "evaluate.json")
    missing: dict[str, str] = {}

    def optional(relative: str, stage: str, read):
        path = root / relative
        if not path.exists():
            missing[relative] = f"{relative} is not there: run `python -m sparsity_forcing {stage}`"
            return None
        try:
            return read(path)
        except (ValueError, OSError) as error:
            raise ReportError(
                f"{path} cannot be read ({error}); run `python -m sparsity_forcing {stage}` again"
            ) from None

    metrics = {stage: optional(f"metrics/{stage}.json", stage, _read_json) for stage in METRICS}
    for model, stage in ((BASE, "base"), (POLICY, "train")):
        optional(model.as_posix(), stage, Path.iterdir)
    return Inputs(
        table=table,
        metrics={stage: values for stage, values in metrics.items() if values is not None},
        curve=optional("plots/train.csv", "train", pd.read_csv),
        samples=optional("evaluation/samples.parquet", "evaluate", pd.read_parquet),
        test_rows=optional(TEST.as_posix(), "prepare", read_rows),
        missing=missing,
    )


def _read_json(path: Path) -> dict:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, not an object")
    return value
