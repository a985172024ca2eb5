import numpy as np
import pytest
from report_workspace import LAYERS, digit_rows

from sparsity_forcing.data.schema import Row
from sparsity_forcing.methods import TopP
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.reporting.kept import (
    ASKED,
    BACKGROUND,
    OTHER_DIGITS,
    KeptRow,
    first_of_each,
    kept_by_kind,
    measure_kept,
)


def test_cells_are_the_kept_sets_of_the_visual_tokens(model, processor):
    rows = digit_rows(3)
    method = TopP(p=0.6)
    found = measure_kept(model, processor, rows, method, max_new_tokens=2, batch_size=2)
    assert [item.row.id for item in found.rows] == [row.id for row in rows]
    inputs = encode_prompts(processor, [rows[2].question], [rows[2].images])
    with method.attend(model) as stats:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    alone = found.rows[2]
    for layer in range(LAYERS):
        assert (alone.cells[layer].ravel() == stats.kept(layer)[0, stats.visual[0]].numpy()).all()
    assert alone.cells.shape == (LAYERS, 6, 6)
    assert alone.visual_token_ratio == pytest.approx(alone.cells.mean(), abs=1e-6)
    assert alone.visual_tokens == 36


def test_a_row_without_picture_has_no_cells(model, processor):
    row = Row("a", "test", "read", "which digit is red?", "1", [])
    both = [digit_rows(1)[0], row, digit_rows(2)[1]]
    found = measure_kept(model, processor, both, TopP(p=0.6), max_new_tokens=1)
    assert found.rows[1].cells is None
    assert found.rows[1].visual_tokens == 0
    assert found.rows[2].cells.shape == (LAYERS, 6, 6)


def test_shares_by_what_a_cell_shows():
    cells = np.array([[[1, 1], [0, 0]], [[1, 0], [1, 0]]], dtype=bool)
    meta = {"relevant_cells": [0], "coloured_cells": [0, 1]}
    row = Row("a", "test", "read", "q", "1", [], meta=meta)
    found = kept_by_kind([KeptRow(row, "", 4, 0.5, cells)])
    assert found == {ASKED: [1.0, 1.0], OTHER_DIGITS: [1.0, 0.0], BACKGROUND: [0.0, 0.5]}
    assert kept_by_kind([KeptRow(Row("b", "test", "t", "q", "1", []), "", 4, 0.5, cells)]) == {}


def test_rows_are_taken_in_turn_from_every_task():
    rows = [Row(f"{task}{i}", "test", task, "q", "a", []) for i, task in enumerate("aaabbc")]
    assert [row.id for row in first_of_each(rows, 4, key=lambda row: row.task)] == ["a0", "b3", "c5", "a1"]
    assert len(first_of_each(rows, 100, key=lambda row: row.task)) == 6
