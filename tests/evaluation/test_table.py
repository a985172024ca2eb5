import json

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from rich.console import Console

from sparsity_forcing.evaluation.intervals import wilson_interval
from sparsity_forcing.evaluation.table import (
    BenchmarkTable,
    TableError,
    benchmark_table,
    load_table,
    rich_table,
)
from sparsity_forcing.files import write_json_atomic


def samples() -> pd.DataFrame:
    full = pd.DataFrame(
        {
            "method": "Full",
            "checkpoint": "base",
            "p": 1.0,
            "benchmark": ["read", "read", "read", "text"],
            "score": [1.0, 1.0, 0.0, 1.0],
            "token_ratio": 1.0,
            "visual_token_ratio": [1.0, 1.0, 1.0, np.nan],
        }
    )
    sparse = full.assign(method="top-p", p=0.975, score=[0.0, 1.0, 0.0, 1.0], token_ratio=[0.5, 0.6, 0.7, 1.0]).assign(
        visual_token_ratio=[0.3, 0.4, 0.5, np.nan]
    )
    return pd.concat([full, sparse], ignore_index=True)


def test_a_row_per_benchmark_and_a_pooled_one_per_method():
    table = benchmark_table(samples())
    assert [(row.method, row.benchmark, row.n) for row in table.rows] == [
        ("Full", "read", 3),
        ("Full", "text", 1),
        ("Full", "average", 4),
        ("top-p", "read", 3),
        ("top-p", "text", 1),
        ("top-p", "average", 4),
    ]
    pooled = table.find("top-p", "base", 0.975)
    assert pooled.accuracy == 0.5
    assert (pooled.accuracy_low, pooled.accuracy_high) == wilson_interval(0.5, 4)
    assert pooled.token_ratio == pytest.approx(0.7)
    assert pooled.visual_token_ratio == pytest.approx(0.4)  # the text-only question has none
    assert table.find("top-p", "base", 0.975, "text").visual_token_ratio is None
    assert [row.method for row in table.averages()] == ["Full", "top-p"]
    with pytest.raises(KeyError, match="no row top-p policy"):
        table.find("top-p", "policy", 0.975)


def test_the_sparsest_row_that_keeps_the_accuracy():
    table = benchmark_table(samples())
    assert table.sparsest("base", 0.1).method == "Full"
    assert table.sparsest("base", 0.25).method == "top-p"  # 0.5 against 0.75
    text_only = benchmark_table(samples().assign(visual_token_ratio=np.nan))
    assert text_only.sparsest("base", 0.25).token_ratio == pytest.approx(0.7)


def test_the_file_is_read_back_as_written(tmp_path):
    table = benchmark_table(samples())
    path = tmp_path / "evaluate.json"
    write_json_atomic(path, table.model_dump(mode="json"))
    assert load_table(path) == table
    assert set(json.loads(path.read_text())["rows"][0]) == {
        *("method", "checkpoint", "p", "benchmark", "n", "accuracy", "accuracy_low", "accuracy_high"),
        *("token_ratio", "visual_token_ratio"),
    }


def test_a_missing_or_broken_file_names_itself_and_the_stage(tmp_path):
    path = tmp_path / "evaluate.json"
    with pytest.raises(TableError, match=r"evaluate\.json does not exist: run the evaluate stage"):
        load_table(path)
    for text in ["{", "[]", '{"rows": [{"method": "Full"}]}']:
        path.write_text(text)
        with pytest.raises(TableError, match=r"evaluate\.json is not a benchmark table"):
            load_table(path)


@pytest.mark.parametrize(
    "change", [{"accuracy": 1.2}, {"accuracy_low": 0.9}, {"checkpoint": "other"}, {"p": 0.0}, {"n": 0}, {"extra": 1}]
)
def test_rows_that_cannot_be_are_refused(change):
    row = benchmark_table(samples()).find("top-p", "base", 0.975).model_dump()
    with pytest.raises(ValidationError):
        BenchmarkTable.model_validate({"rows": [{**row, **change}]})


def test_a_row_twice_is_refused():
    row = benchmark_table(samples()).rows[0].model_dump()
    with pytest.raises(ValidationError, match="there twice"):
        BenchmarkTable.model_validate({"rows": [row, row]})


def test_the_terminal_table_shows_pooled_numbers_in_80_columns():
    console = Console(record=True, width=80)
    console.print(rich_table(benchmark_table(samples())))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["top-p", "base", "0.975", "50.0%", "(15.0-85.0)", "0.700", "0.400", "4"] in lines
    assert ["Full", "base", "1", "75.0%", "(30.1-95.4)", "1.000", "1.000", "4"] in lines
