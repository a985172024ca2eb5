"""The schema's reader and writer."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_forcing.data.schema import SCHEMA, Row, RowWriter, SchemaError, read_rows, write_rows

texts = st.text(st.characters(codec="utf-8"), max_size=20)
json_values = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
)
rows = st.builds(
    Row,
    id=texts,
    split=st.sampled_from(["train", "validation", "test"]),
    task=texts,
    question=texts,
    answer=texts,
    images=st.lists(st.binary(max_size=30), max_size=3),
    frames_per_second=st.none() | st.floats(min_value=0.01, max_value=120),
    meta=st.dictionaries(texts, json_values | texts | st.lists(json_values, max_size=3), max_size=3),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(rows, max_size=6))
def test_rows_come_back_as_they_were_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    write_rows(written, path)
    assert read_rows(path) == written


def test_same_rows_give_the_same_bytes(tmp_path):
    many = [Row(str(i), "train", "read", "q", "a", [bytes([i % 256]) * 50], None, {"b": i, "a": 0}) for i in range(700)]
    write_rows(many, tmp_path / "first.parquet")
    write_rows(
        [Row(**{**vars(row), "meta": {"a": 0, "b": row.meta["b"]}}) for row in many], tmp_path / "second.parquet"
    )
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()


def test_large_images_start_a_row_group_early(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsity_forcing.data.schema.GROUP_BYTES", 1000)
    with RowWriter(tmp_path / "rows.parquet") as writer:
        for i in range(10):
            writer.add(Row(str(i), "train", "t", "q", "a", [b"x" * 400]))
    assert pq.ParquetFile(tmp_path / "rows.parquet").num_row_groups == 4


def test_a_failing_source_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.parquet"
    good = [Row("1", "train", "t", "q", "a", [])]
    write_rows(good, path)

    def failing():
        yield Row("2", "train", "t", "q", "a", [])
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_rows(failing(), path)
    assert read_rows(path) == good
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.parquet"]


def test_meta_without_a_json_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_rows([Row("1", "train", "t", "q", "a", [], None, {"x": float("nan")})], tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    "table, message",
    [
        (pa.table({"id": ["1"]}), "no column 'split'"),
        (pa.Table.from_pylist([], schema=SCHEMA.set(5, pa.field("images", pa.string()))), "'images' is string"),
    ],
)
def test_a_file_of_another_schema_is_named(tmp_path, table, message):
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(SchemaError, match=rf"other\.parquet.*{message}"):
        read_rows(tmp_path / "other.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(SchemaError, match="not a readable parquet file"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(FileNotFoundError, match=r"missing\.parquet does not exist"):
        read_rows(tmp_path / "missing.parquet")


@pytest.mark.parametrize("meta, label", [({"grid": 8}, "read_8x8"), ({}, "read"), ({"grid": "../x"}, "read")])
def test_label(meta, label):
    assert Row("1", "test", "read", "q", "a", [], None, meta).label == label
