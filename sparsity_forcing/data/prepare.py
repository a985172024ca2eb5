"""Candidates to prepared splits: every row that is in the source ends in a split or in quarantine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_forcing.data.candidates import BadRow, Candidate, Reason, SplitRule
from sparsity_forcing.data.chat_jsonl import chat_jsonl_candidates
from sparsity_forcing.data.checks import Limits, check_row
from sparsity_forcing.data.digits_source import digits_candidates
from sparsity_forcing.data.parquet_source import parquet_candidates
from sparsity_forcing.data.schema import SPLITS, Row, RowWriter
from sparsity_forcing.files import replace_file
from sparsity_forcing.params import DataParams

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
    ]
)


MIN_OWN_VALIDATION_ROWS = 3  # the profile takes the user's own in thirds by prompt length


class DataError(ValueError):
    """The data as a whole cannot be used: too much of it is in quarantine, or a split has too few rows."""


@dataclass
class Summary:
    """What came of the candidates. ``rows``: (split, label) -> count; ``reasons``: reason -> count."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    image_bytes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def rows_in(self) -> int:
        return self.rows.total() + self.reasons.total()

    @property
    def quarantined_fraction(self) -> float:
        return self.reasons.total() / self.rows_in if self.rows_in else 0.0

    @property
    def why(self) -> str:
        """The reasons of the quarantine with their counts, the most common first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())

    def metrics(self) -> dict[str, Any]:
        """As in metrics/prepare.json: counts, bytes of the encoded images, sides in pixels."""
        return {
            "rows_in": self.rows_in,
            "rows": {
                split: {
                    "total": sum(count for (of, _), count in self.rows.items() if of == split),
                    "tasks": {label: count for (of, label), count in sorted(self.rows.items()) if of == split},
                    "image_bytes": self.image_bytes[split],
                }
                for split in SPLITS
            },
            "quarantined": {
                "total": self.reasons.total(),
                "fraction": self.quarantined_fraction,
                "reasons": dict(sorted(self.reasons.items())),
            },
            "images": {
                "count": self.sizes.total(),
                "width": _spread(width for width, _ in self.sizes.elements()),
                "height": _spread(height for _, height in self.sizes.elements()),
            },
        }


def _spread(values: Iterable[int]) -> dict[str, float] | None:
    values = list(values)
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def open_source(params: DataParams, seed: int, root: Path) -> Iterator[Candidate]:
    """The candidates of the source that ``params`` names; the user's path is relative to ``root``."""
    if params.source == "digits":
        return digits_candidates(params.digits, seed)
    path = root / params.user.path
    split_rule = SplitRule(seed, params.user.validation_share, params.user.test_share)
    if params.source == "parquet":
        return parquet_candidates(path, split_rule)
    return chat_jsonl_candidates(path, split_rule, params.user.max_video_frames)


def prepare_rows(candidates: Iterable[Candidate], limits: Limits, directory: Path, quarantine: Path) -> Summary:
    """Writes ``directory``/{train,validation,test}.parquet and the ``quarantine`` file, one row in memory at a time.

    Of two rows with one id the first good one stays.
    """
    summary, seen = Summary(), set()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(RowWriter(directory / f"{split}.parquet")) for split in SPLITS}
        rejected = stack.enter_context(_QuarantineWriter(stack.enter_context(replace_file(quarantine))))
        for candidate in candidates:
            try:
                row, sizes = _checked(candidate, limits, seen)
            except BadRow as reason:
                rejected.add(candidate, reason)
                summary.reasons[str(reason.reason)] += 1
                continue
            writers[row.split].add(row)
            summary.rows[row.split, row.label] += 1
            summary.image_bytes[row.split] += sum(map(len, row.images))
            summary.sizes.update(sizes)
    return summary


def _checked(candidate: Candidate, limits: Limits, seen: set[str]) -> tuple[Row, list[tuple[int, int]]]:
    if isinstance(candidate.row, BadRow):
        raise candidate.row
    sizes = check_row(candidate.row, limits)
    if candidate.row.id in seen:
        raise BadRow(Reason.DUPLICATE_ID, f"another row has the id {candidate.row.id!r}")
    seen.add(candidate.row.id)
    return candidate.row, sizes


def require_usable(
    summary: Summary, max_quarantine_fraction: float, quarantine: Path, min_validation_rows: int = 1
) -> None:
    """Raises DataError when too many rows are in quarantine, a split has none, or validation too few."""
    if not summary.rows_in:
        raise DataError("the source holds no rows")
    if summary.quarantined_fraction > max_quarantine_fraction:
        raise DataError(
            f"{summary.reasons.total()} of {summary.rows_in} rows are in quarantine "
            f"({summary.quarantined_fraction:.1%}, data.max_quarantine_fraction allows {max_quarantine_fraction:.1%}): "
            f"{summary.why}. {quarantine} names file, line and reason of each"
        )
    empty = [split for split in SPLITS if not any(of == split for of, _ in summary.rows)]
    if empty:
        raise DataError(
            f"no rows in split(s) {', '.join(empty)}; add rows, name a split in them, "
            "or raise data.user.validation_share / data.user.test_share"
        )
    validation = sum(count for (of, _), count in summary.rows.items() if of == "validation")
    if validation < min_validation_rows:
        raise DataError(
            f"the split validation has {validation} row(s), at least {min_validation_rows} are needed; add rows, name "
            "the split in them, or raise data.user.validation_share"
        )


class _QuarantineWriter:
    """Writes rejected rows as they come, so that nothing is lost when the stage is stopped by their number."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, QUARANTINE_SCHEMA, compression="zstd")
        self._pending: list[dict[str, Any]] = []

    def add(self, candidate: Candidate, why: BadRow) -> None:
        self._pending.append(
            {
                "file": candidate.file,
                "line": candidate.line,
                "reason": str(why.reason),
                "detail": why.detail,
                "raw": candidate.raw,
            }
        )
        if len(self._pending) == 256:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=QUARANTINE_SCHEMA))
        self._pending = []

    def __enter__(self) -> _QuarantineWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._pending:
                self._flush()
        finally:
            self._writer.close()
