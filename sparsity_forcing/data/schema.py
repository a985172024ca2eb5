"""The one schema of the pipeline's data, and its reader and writer.

A row is a question about zero or more images (or the frames of one video) and its answer. Image bytes are inside the
parquet file, so a split is one file. Writing the same rows twice gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_forcing.files import replace_file

SPLITS = ("train", "validation", "test")
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("frames_per_second", pa.float64()),
        pa.field("meta", pa.string(), nullable=False),
    ]
)
GROUP_ROWS, GROUP_BYTES = 256, 64 * 2**20  # a row group is written when either is reached: memory stays bounded


class SchemaError(ValueError):
    """A parquet file is unreadable or lacks the columns of the schema; the message names the file and the column."""


@dataclass(frozen=True)
class Row:
    """One question.

    ``images``: encoded PNG or JPEG files, in prompt order; the frames of a video where ``frames_per_second`` is set. A
    prompt shows frames as it shows images, one after the other; ``frames_per_second`` is a record, no model is told it.
    ``meta``: whatever the source knows besides; JSON values only.
    """

    id: str
    split: str
    task: str
    question: str
    answer: str
    images: list[bytes]
    frames_per_second: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The task as results name it: with the grid where the row has one, as in ``read_8x8``."""
        grid = self.meta.get("grid")
        return f"{self.task}_{grid}x{grid}" if isinstance(grid, int) else self.task


class RowWriter:
    """Writes rows to a parquet file as they come; used as a context manager.

    Writes exactly to ``path``: the caller gives a temporary name and renames (see `write_rows`).
    """

    def __init__(self, path: str | Path) -> None:
        self.rows = 0
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._pending: list[dict] = []
        self._pending_bytes = 0

    def add(self, row: Row) -> None:
        record = {name: getattr(row, name) for name in SCHEMA.names}
        record["meta"] = json.dumps(row.meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self._pending.append(record)
        self._pending_bytes += sum(map(len, row.images))
        self.rows += 1
        if len(self._pending) >= GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._pending, schema=SCHEMA))
        self._pending, self._pending_bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._pending:
                self._flush()
        finally:
            self._writer.close()


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Writes ``rows`` to ``path`` under a temporary name, then renames: the file is whole or the old one."""
    with replace_file(path) as temporary, RowWriter(temporary) as writer:
        for row in rows:
            writer.add(row)


def iterate_rows(path: str | Path) -> Iterator[Row]:
    """The rows of ``path``, one row group in memory at a time.

    Raises:
        FileNotFoundError: no such file.
        SchemaError: the file is not parquet, or a column is missing or of another type.
    """
    file = open_parquet(path)
    for name in SCHEMA.names:
        require_column(file, path, name, SCHEMA.field(name).type)
    for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=SCHEMA.names):
        for record in batch.to_pylist():
            yield Row(**{**record, "meta": json.loads(record["meta"])})


def read_rows(path: str | Path) -> list[Row]:
    """All rows of ``path``; raises as `iterate_rows`."""
    return list(iterate_rows(path))


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Opens a parquet file; raises FileNotFoundError or SchemaError with the path in the message."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(f"{path} is not a readable parquet file: {error}") from None


def require_column(file: pq.ParquetFile, path: str | Path, name: str, kind: pa.DataType) -> None:
    """Raises SchemaError unless ``file`` has a column ``name`` of type ``kind``."""
    schema = file.schema_arrow
    if name not in schema.names:
        raise SchemaError(f"{path} has no column {name!r}; columns: {', '.join(schema.names)}")
    found = schema.field(name).type
    if found != kind and not pa.types.is_null(found):
        raise SchemaError(f"{path}: column {name!r} is {found}, must be {kind}")
