"""Kept tokens drawn over an image: kept cells as they are, dropped cells washed out."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

WASH = 236  # the pale grey that dropped cells fade to: readable on dark and on bright pictures
STRENGTH = 0.86
CELL_PIXELS = 16
MAX_SIDE = 256
OUTLINE = (217, 101, 13)


def cell_size(rows: int, columns: int) -> int:
    """Pixels per cell side, so that the drawing has at most ``MAX_SIDE`` pixels a side."""
    return max(2, min(CELL_PIXELS, MAX_SIDE // max(rows, columns)))


def enlarge(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """``image`` at a whole number of pixels per cell of a ``rows`` x ``columns`` grid of visual tokens."""
    cell = cell_size(rows, columns)
    size = (columns * cell, rows * cell)
    small = image.width <= size[0] and image.height <= size[1]
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def draw_kept(image: Image.Image, kept: np.ndarray) -> Image.Image:
    """Draws ``kept`` (rows, columns) bool, one value per visual token, over ``image``.

    The pixels of a kept cell are those of the enlarged image; a dropped cell loses its colour and fades.
    """
    if kept.ndim != 2:
        raise ValueError(f"kept must be (rows, columns), got shape {kept.shape}")
    pixels = np.asarray(enlarge(image, *kept.shape), dtype=np.float32)
    grey = pixels.mean(axis=-1, keepdims=True)
    washed = (1 - STRENGTH) * grey + STRENGTH * WASH
    cell = cell_size(*kept.shape)
    mask = np.kron(kept, np.ones((cell, cell), dtype=bool))[..., None]
    return Image.fromarray(np.where(mask, pixels, washed).round().astype(np.uint8))


def outline_cells(image: Image.Image, rows: int, columns: int, cells: list[int]) -> Image.Image:
    """``image`` enlarged, with a frame around each of the row-major ``cells``."""
    canvas = enlarge(image, rows, columns)
    cell = cell_size(rows, columns)
    drawing = ImageDraw.Draw(canvas)
    for index in cells:
        top, left = divmod(index, columns)
        box = (left * cell, top * cell, (left + 1) * cell - 1, (top + 1) * cell - 1)
        drawing.rectangle(box, outline=OUTLINE, width=max(1, cell // 8))
    return canvas


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
