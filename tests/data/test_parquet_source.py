"""The user's own parquet file."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsity_forcing.data.candidates import BadRow, Reason, SplitRule
from sparsity_forcing.data.parquet_source import parquet_candidates
from sparsity_forcing.data.schema import Row, SchemaError, write_rows

RULE = SplitRule(seed=0, validation_share=0.1, test_share=0.2)


def found(path) -> list[Row | BadRow]:
    return [candidate.row for candidate in parquet_candidates(path, RULE)]


def test_prepared_rows_come_through_unchanged(tmp_path, png):
    rows = [Row(str(i), "test", "vqa", "q", "a", [png], 2.0 if i else None, {"i": i}) for i in range(300)]
    write_rows(rows, tmp_path / "rows.parquet")
    assert found(tmp_path / "rows.parquet") == rows


def test_a_pandas_table_with_the_needed_columns_is_enough(tmp_path, png):
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"id": [1, 2], "question": ["p", "q"], "answer": ["a", "b"], "images": [[png], []]}).to_parquet(path)
    assert found(path) == [
        Row("1", RULE("1", [png]), "user", "p", "a", [png], None, {}),
        Row("2", RULE("2"), "user", "q", "b", [], None, {}),
    ]


def test_large_types_are_converted(tmp_path, png):
    table = pa.table({"id": ["1"], "question": ["q"], "answer": ["a"], "images": [[png]]})
    large = {"id": pa.large_string(), "question": pa.large_string(), "images": pa.large_list(pa.large_binary())}
    for name, kind in large.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert found(tmp_path / "rows.parquet")[0].images == [png]


def test_bad_values_are_reasons_and_raw_holds_the_row_without_bytes(tmp_path, png):
    path = tmp_path / "rows.parquet"
    columns = {"id": ["1", "2"], "question": ["q", "r"], "answer": ["a", "b"], "images": [[None], [png]]}
    pq.write_table(pa.table({**columns, "meta": ["{}", '{"x": NaN}']}), path)
    candidates = list(parquet_candidates(path, RULE))
    assert [candidate.row.reason for candidate in candidates] == [Reason.MISSING_IMAGE, Reason.MALFORMED_JSON]
    assert [candidate.line for candidate in candidates] == [1, 2]
    assert f"{len(png)} bytes" in candidates[1].raw


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"id": ["1"], "question": ["q"]}, r"lacks the column\(s\) answer, images"),
        ({"id": ["1"], "question": ["q"], "answer": ["a"], "images": ["a.png"]}, "'images' is string"),
        (
            {"id": ["1"], "question": ["q"], "answer": ["a"], "images": [[b""]], "frames_per_second": ["fast"]},
            "'frames_per_second' is string, must be double",
        ),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(SchemaError, match=message):
        found(tmp_path / "rows.parquet")
