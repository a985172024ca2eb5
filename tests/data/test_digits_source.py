"""The digits source: fair shares, apart by scan, the same for the same seed."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from sparsity_forcing.data.candidates import BadRow
from sparsity_forcing.data.checks import Limits, check_row
from sparsity_forcing.data.digits import (
    CELL,
    COLOURED_DIGITS,
    COLOURS,
    ROTATION,
    SCALE,
    SHIFT,
    SLANT,
    SPLITS,
    distort,
    load_scans,
    questions_about,
    render,
)
from sparsity_forcing.data.digits_source import digits_candidates, digits_row
from sparsity_forcing.params import DigitsParams

PARAMS = DigitsParams(grids=(4, 6), train_rows=13, validation_rows=7, test_rows=12)


def rows(params=PARAMS, seed=0):
    return [candidate.row for candidate in digits_candidates(params, seed)]


def test_every_scan_belongs_to_one_split():
    covered = [index for part in SPLITS.values() for index in range(part.start, part.stop)]
    assert sorted(covered) == list(range(len(load_digits().target)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), place=st.integers(0, 10**5), split=st.sampled_from(sorted(SPLITS)))
def test_a_row_shows_scans_of_its_own_split_only(seed, place, split):
    row = digits_row(PARAMS, seed, split, place)
    part = SPLITS[split]
    assert all(part.start <= scan < part.stop for scan in row.meta["scans"])


def test_no_handwriting_sample_is_in_two_splits():
    pixels = load_digits().images
    seen = {split: {pixels[i].tobytes() for i in range(part.start, part.stop)} for split, part in SPLITS.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


class Drawn:
    """A generator that draws what it is given, in the order of `distort`: turn, slant, scale, shift."""

    def __init__(self, turn=0.0, slant=0.0, scale=0.0, shift=(0.0, 0.0)):
        self.values = iter(((turn, ROTATION), (slant, SLANT), (scale, SCALE), (np.array(shift), SHIFT)))

    def uniform(self, low, high, size=None):
        value, most = next(self.values)
        assert (low, high, size) == (-most, most, np.shape(value)[0] if np.ndim(value) else None)
        return value


def test_distortions_move_pixels_where_they_should():
    scan = load_scans("train").pixels[0]
    assert np.array_equal(distort(scan, Drawn()), scan)
    down = np.pad(scan, ((1, 0), (0, 0)))[:CELL]
    assert np.allclose(distort(scan, Drawn(shift=(1.0, 0.0))), down, atol=1e-6)
    assert np.allclose(distort(scan, Drawn(shift=(0.5, 0.0))), (scan + down) / 2, atol=1e-6)
    assert np.allclose(distort(scan, Drawn(turn=90.0)), np.rot90(scan, -1), atol=1e-5)
    stroke = np.zeros((CELL, CELL), np.float32)
    stroke[:, 3] = 1.0
    slanted = distort(stroke, Drawn(slant=SLANT))
    assert np.allclose(slanted.sum(1), 1.0, atol=1e-6)  # rows keep their ink
    assert np.allclose(np.diff(slanted @ np.arange(CELL)), -SLANT, atol=1e-5)  # and move by the slant
    assert np.allclose(distort(stroke.T, Drawn(slant=SLANT))[:, 2:-2], stroke.T[:, 2:-2], atol=1e-6)


def test_a_scaled_and_shifted_dot_lies_where_it_should():
    dot = np.zeros((CELL, CELL), np.float32)
    dot[2, 2] = 1.0
    moved = distort(dot, Drawn(scale=1.0, shift=(1.5, 0.5)))
    rows, columns = np.nonzero(moved == moved.max())
    assert (set(rows), set(columns)) == ({2}, {1})  # 3.5 - 2 * 1.5 + 1.5 and 3.5 - 2 * 1.5 + 0.5


def test_a_classifier_can_read_distorted_scans_of_handwriting_it_has_not_seen():
    rng, known, asked = np.random.default_rng(0), load_scans("train"), load_scans("validation")
    distorted = [np.stack([distort(scan, rng) for scan in known.pixels]) for _ in range(4)]
    reader = SVC(C=10).fit(np.concatenate(distorted).reshape(-1, CELL**2), np.tile(known.labels, 4))
    shown = np.stack([distort(scan, rng) for scan in asked.pixels])
    assert shown.dtype == np.float32
    assert 0 <= shown.min() <= shown.max() <= 1
    assert reader.score(shown.reshape(-1, CELL**2), asked.labels) > 0.92


def test_a_canvas_with_distorted_scans_is_the_same_otherwise():
    scans = load_scans("train")
    plain, distorted = (render(np.random.default_rng(4), scans, 8, "sum", distorted=choice) for choice in (False, True))
    assert asdict(replace(plain, pixels=None)) == asdict(replace(distorted, pixels=None))
    differ = (plain.pixels != distorted.pixels).reshape(8, CELL, 8, CELL, 3).any((1, 3, 4))
    assert differ.sum() == COLOURED_DIGITS + 6 + 10  # of 64 cells, 10% are grey digits and 16% clutter
    assert differ.flat[list(plain.coloured_cells)].all()


def test_distorted_scans_are_for_training_alone():
    both = list(zip(rows(), rows(PARAMS.model_copy(update={"distorted": True})), strict=True))
    assert all(one == other for one, other in both if one.split != "train")
    assert all(one.images != other.images for one, other in both if one.split == "train")
    assert all(replace(one, images=()) == replace(other, images=()) for one, other in both)


def test_tasks_and_grids_have_the_same_share():
    counts = Counter((row.split, row.label) for row in rows())
    for split, total in (("train", 13), ("validation", 7), ("test", 12)):
        of_split = [count for (of, _), count in counts.items() if of == split]
        assert sum(of_split) == total
        assert len(of_split) == 6
        assert max(of_split) - min(of_split) <= 1


def test_rows_depend_on_the_seed_and_not_on_the_number_of_rows():
    assert rows() == rows()
    assert rows(seed=1)[0] != rows(seed=0)[0]
    longer = rows(PARAMS.model_copy(update={"train_rows": 20}))
    assert longer[:13] == rows()[:13]


def test_every_row_passes_the_checks_and_is_as_large_as_its_grid():
    for row in rows():
        side = row.meta["grid"] * CELL
        assert check_row(row, Limits(4000, PARAMS.tasks)) == [(side, side)]
    assert len({row.id for row in rows()}) == 32


@pytest.mark.parametrize("task", ["read", "count", "sum"])
def test_the_answer_is_what_the_canvas_shows(task):
    """Reads the answer back from the pixels: nearest scan under the colour that was asked for."""
    scans = load_scans("test")
    tints = {"red": 0, "green": 1}
    for seed in range(60):
        canvas = render(np.random.default_rng(seed), scans, 6, task, grey_share=0.1, clutter_share=0.0)
        cells = canvas.pixels.reshape(6, CELL, 6, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(36, CELL, CELL, 3)
        for colour, channel in tints.items():
            if task == "sum" or f" {colour}?" not in canvas.question:
                continue
            found = [cells[cell].astype(float) for cell in canvas.relevant_cells]
            assert all(cell[..., channel].mean() > cell.mean() * 1.2 for cell in found)
            if task == "count":
                assert canvas.answer == str(len(found))
            else:
                shape = found[0][..., channel] / 207
                nearest = np.abs(scans.pixels - shape).mean((1, 2)).argmin()
                assert canvas.answer == str(scans.labels[nearest])
        if task == "sum":
            first, second, total = (int(number) for number in re.findall(r"\d+", canvas.answer))
            assert first + second == total
            named = re.findall("|".join(COLOURS), canvas.answer)
            assert canvas.question == f"what is the sum of {named[0]} and {named[1]}?"
            assert len(canvas.relevant_cells) >= 2


def test_what_meta_says_of_the_coloured_digits_is_what_the_canvas_shows():
    """Every colour asked for is told apart by its channels, every label by the nearest scan."""
    scans = load_scans("test")
    for seed in range(30):
        canvas = render(np.random.default_rng(seed), scans, 6, "read", clutter_share=0.0)
        cells = canvas.pixels.reshape(6, CELL, 6, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(36, CELL, CELL, 3) / 207
        assert canvas.coloured_cells == tuple(sorted(canvas.coloured_cells))
        for cell, colour, label in zip(canvas.coloured_cells, canvas.colours, canvas.labels, strict=True):
            fits = {name: np.abs(scans.pixels[..., None] * tint - cells[cell]) for name, tint in COLOURS.items()}
            errors = {name: error.mean((1, 2, 3)).min() for name, error in fits.items()}
            assert min(errors, key=errors.get) == colour
            assert scans.labels[fits[colour].mean((1, 2, 3)).argmin()] == label


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), place=st.integers(0, 10**5))
def test_the_questions_about_a_canvas_hold_the_one_it_was_drawn_for(seed, place):
    row = digits_row(PARAMS, seed, "test", place)
    asked = questions_about(row.meta["colours"], row.meta["labels"])
    assert (row.task, row.question, row.answer) in asked
    assert len({question for _, question, _ in asked}) == len(asked) >= 2
    drawn = dict(zip(row.meta["colours"], row.meta["labels"], strict=True))
    for task, question, answer in asked:
        named = re.findall("|".join(COLOURS), question)
        if task == "count":
            assert answer == str(row.meta["colours"].count(named[0]))
        else:
            assert [row.meta["colours"].count(name) for name in named] == [1] * len(named)
            assert str(sum(drawn[name] for name in named)) in answer


def test_the_image_is_the_canvas():
    canvas = render(np.random.default_rng(0), load_scans("train"), 5, "read")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(canvas.png()))), canvas.pixels)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task 'draw' is unknown to the digits source"):
        render(np.random.default_rng(0), load_scans("train"), 5, "draw")
    with pytest.raises(BadRow, match=r"unknown_task: task 'read'; one of count"):
        check_row(rows()[0], Limits(4000, ("count",)))
