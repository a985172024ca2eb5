"""The `parquet` source: the user's rows, already in the columns of the schema.

``id``, ``question``, ``answer`` and ``images`` must be there. A missing or empty ``split`` is drawn by the split rule,
a missing ``task`` is `user`. Types that mean the same (large strings, lists of large binaries) are converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsity_forcing.data.candidates import DEFAULT_TASK, BadRow, Candidate, Reason, SplitRule, parse_json_object
from sparsity_forcing.data.schema import GROUP_ROWS, SCHEMA, Row, SchemaError, open_parquet

REQUIRED = ("id", "question", "answer", "images")


def parquet_candidates(path: Path, split_rule: SplitRule) -> Iterator[Candidate]:
    """The rows of a parquet file.

    Raises:
        FileNotFoundError, SchemaError: the file as a whole cannot be used.
    """
    file = open_parquet(path)
    names = file.schema_arrow.names
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise SchemaError(f"{path} lacks the column(s) {', '.join(missing)}; columns: {', '.join(names)}")
    columns = [name for name in SCHEMA.names if name in names]
    line = 0
    for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=columns):
        for record in _converted(batch, columns, path).to_pylist():
            line += 1
            yield Candidate(str(path), line, _raw(record), _row_or_reason(record, split_rule))


def _converted(batch: pa.RecordBatch, columns: list[str], path: Path) -> pa.Table:
    converted = {}
    for name in columns:
        column, kind = batch.column(name), SCHEMA.field(name).type
        try:
            converted[name] = column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise SchemaError(f"{path}: column {name!r} is {column.type}, must be {kind}") from None
    return pa.table(converted)


def _row_or_reason(record: dict[str, Any], split_rule: SplitRule) -> Row | BadRow:
    row_id = record["id"] or ""
    images = record["images"] or []
    if any(image is None for image in images):
        return BadRow(Reason.MISSING_IMAGE, "an entry of images is null")
    try:
        meta = parse_json_object(record.get("meta") or "{}")
    except BadRow as error:
        return BadRow(error.reason, f"meta: {error.detail}")
    return Row(
        id=row_id,
        split=record.get("split") or split_rule(row_id, images),
        task=record.get("task") or DEFAULT_TASK,
        question=record["question"] or "",
        answer=record["answer"] or "",
        images=images,
        frames_per_second=record.get("frames_per_second"),
        meta=meta,
    )


def _raw(record: dict[str, Any]) -> str:
    sizes = [len(image) if image is not None else None for image in record["images"] or []]
    return json.dumps({**record, "images": [f"{size} bytes" for size in sizes]}, ensure_ascii=False)
