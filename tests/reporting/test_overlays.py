import numpy as np
import pytest
from PIL import Image

from sparsity_forcing.reporting.overlays import OUTLINE, cell_size, draw_kept, enlarge, outline_cells


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("seed", range(4))
def test_exactly_the_kept_cells_show_the_picture(image, seed):
    """Every pixel of a kept cell is the picture's own; no pixel of a dropped cell is."""
    kept = np.random.default_rng(seed).random((3, 4)) < 0.5
    drawn = np.asarray(draw_kept(image, kept))
    original = np.asarray(enlarge(image, 3, 4))
    cell = cell_size(3, 4)
    for row in range(3):
        for column in range(4):
            area = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            same = (drawn[area] == original[area]).all(axis=-1)
            assert same.all() if kept[row, column] else not same.any()


def test_dropped_cells_are_pale_and_without_colour(image):
    drawn = np.asarray(draw_kept(image, np.zeros((3, 4), dtype=bool)))
    assert drawn.min() > 190
    assert (drawn == drawn[..., :1]).all()


def test_picture_is_scaled_by_whole_pixels_when_it_is_small(image):
    assert enlarge(image, 3, 4).size == (4 * cell_size(3, 4), 3 * cell_size(3, 4))


def test_large_grids_stay_within_the_page():
    drawn = draw_kept(Image.new("RGB", (600, 600)), np.ones((64, 64), dtype=bool))
    assert max(drawn.size) <= 256


def test_frames_surround_the_named_cells_only(image):
    cell = cell_size(3, 4)
    framed = np.asarray(outline_cells(image, 3, 4, [6]))  # row 1, column 2
    changed = (framed != np.asarray(enlarge(image, 3, 4))).any(axis=-1)
    assert tuple(framed[cell, 2 * cell]) == OUTLINE
    changed[cell : 2 * cell, 2 * cell : 3 * cell] = False
    assert not changed.any()


def test_kept_must_be_a_grid(image):
    with pytest.raises(ValueError, match=r"rows, columns"):
        draw_kept(image, np.ones(12, dtype=bool))
