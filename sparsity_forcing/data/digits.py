"""The `digits` source: questions about real handwritten digits on a cluttered canvas.

Every digit is a scan of scikit-learn's ``load_digits`` (UCI Optical Recognition of Handwritten Digits, 8x8 pixels).
A canvas is a grid of cells, one scan or one piece of clutter per cell, so that one visual token of the default model
(8x8 pixels) sees one cell. A few digits are coloured, the rest is grey: most visual tokens do not matter for a
question, and which ones matter depends on the question.

Splits are by scan: no scan, and so no handwriting sample, is in two splits. A model soon knows the thousand training
scans by heart. Distorted ones stand in for handwriting that it has not seen, in training questions alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image

from sparsity_forcing.params import COLOURED_DIGITS

CELL = 8  # pixels per cell side: the size of one scan
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.25, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
TASKS = ("read", "count", "sum")
SPLITS = {"train": slice(0, 1097), "validation": slice(1097, 1297), "test": slice(1297, 1797)}


ROTATION, SLANT, SCALE, SHIFT = 12.0, 0.15, 0.12, 0.6  # of `distort`, at most: degrees, pixels a row, share, pixels


@dataclass(frozen=True)
class Scans:
    """Scans of one split. ``pixels``: (n, 8, 8) float32 in [0, 1]; ``labels``: (n,) digit 0-9."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@cache
def load_scans(split: str) -> Scans:
    """The scans of ``train``, ``validation`` or ``test``."""
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; one of {sorted(SPLITS)}")
    digits = load_digits()
    part = SPLITS[split]
    return Scans((digits.images[part] / 16.0).astype(np.float32), digits.target[part].astype(np.int64))


def distort(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``scan`` (8, 8) turned, slanted, scaled and shifted about its centre: another scan of the same label.

    Linear interpolation, which blurs; ink that leaves the cell is lost.
    """
    from scipy.ndimage import affine_transform

    turn, slant = np.deg2rad(rng.uniform(-ROTATION, ROTATION)), rng.uniform(-SLANT, SLANT)
    scale, shift = 1 + rng.uniform(-SCALE, SCALE), rng.uniform(-SHIFT, SHIFT, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[1.0, 0.0], [slant, 1.0]]) / scale  # from (row, column) here to that of the scan
    centre = np.full(2, (CELL - 1) / 2)
    moved = affine_transform(scan, matrix, centre - matrix @ (centre + shift), order=1, mode="grid-constant")
    return moved.astype(np.float32)


@dataclass(frozen=True)
class Canvas:
    """One rendered question.

    ``pixels``: (8 * grid, 8 * grid, 3) uint8. ``relevant_cells``: row-major cell indices the question needs;
    ``coloured_cells``: all coloured digits; ``colours``, ``labels``: their colours and what they are, in that order.
    """

    pixels: np.ndarray
    task: str
    question: str
    answer: str
    relevant_cells: tuple[int, ...]
    coloured_cells: tuple[int, ...]
    colours: tuple[str, ...]
    labels: tuple[int, ...]
    scans: tuple[int, ...]

    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(
            buffer, format="PNG", compress_level=3
        )  # smaller and twice as fast as the default
        return buffer.getvalue()


def render(
    rng: np.random.Generator,
    scans: Scans,
    grid: int,
    task: str,
    grey_share: float = 0.1,
    clutter_share: float = 0.16,
    coloured: int = COLOURED_DIGITS,
    distorted: bool = False,
) -> Canvas:
    """Draws one canvas of ``grid`` x ``grid`` cells and a question of ``task`` about it.

    ``grey_share`` and ``clutter_share`` are the shares of cells that hold a grey digit or scrambled strokes,
    ``coloured`` is the number of coloured digits (at least 2; fewer make an easier canvas). Where ``distorted``,
    every scan goes through `distort`; the same generator draws the same canvas otherwise.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown to the digits source; one of {list(TASKS)}")
    cells = grid * grid
    grey, clutter = round(grey_share * cells), round(clutter_share * cells)
    if cells < coloured + grey + clutter:
        raise ValueError(f"a {grid}x{grid} grid has {cells} cells, too few for {coloured + grey + clutter}")
    places = rng.permutation(cells)[: coloured + grey + clutter]
    scan_ids = rng.integers(len(scans), size=len(places))
    colours, asked = _draw_colours(rng, task, coloured)
    labels, strokes = scans.labels[scan_ids], scans.pixels[scan_ids]
    if distorted:
        [own] = rng.spawn(1)  # leaves the draws below as they are
        strokes = [distort(scan, own) for scan in strokes]

    pixels = np.zeros((grid, grid, CELL, CELL, 3), np.float32)
    for order, (place, scan) in enumerate(zip(places, strokes, strict=True)):
        if order >= coloured + grey:  # clutter: the same strokes, scrambled
            scan = rng.permutation(scan.ravel()).reshape(CELL, CELL) * 0.7
        tint = COLOURS[colours[order]] if order < coloured else (0.65, 0.65, 0.65)
        pixels[place // grid, place % grid] = scan[..., None] * np.asarray(tint, np.float32)
    image = pixels.transpose(0, 2, 1, 3, 4).reshape(grid * CELL, grid * CELL, 3)
    noise = rng.integers(0, 4, size=(grid * CELL, grid * CELL, 1)) * 12  # few levels: PNG stays small
    image = np.clip(np.rint(image * 207) + noise, 0, 255).astype(np.uint8)

    in_order = sorted(range(coloured), key=lambda order: places[order])  # of their cells
    return Canvas(
        pixels=image,
        task=task,
        question=question_text(task, asked),
        answer=answer_text(task, asked, colours, labels),
        relevant_cells=tuple(int(places[i]) for i in in_order if colours[i] in asked),
        coloured_cells=tuple(int(places[i]) for i in in_order),
        colours=tuple(colours[i] for i in in_order),
        labels=tuple(int(labels[i]) for i in in_order),
        scans=tuple(int(i) for i in scan_ids),
    )


def _draw_colours(rng: np.random.Generator, task: str, coloured: int) -> tuple[list[str], tuple[str, ...]]:
    """Colours of the coloured digits, and those a question of ``task`` asks for: the first ones."""
    names = list(COLOURS)
    rng.shuffle(names)
    if task == "count":
        times = 1 if rng.integers(2) else coloured - 1  # neighbouring counts take the default model too long to learn
        others = [names[1 + int(i)] for i in rng.integers(len(names) - 1, size=coloured - times)]
        return [names[0]] * times + others, (names[0],)
    asked = 1 if task == "read" else 2
    others = [names[asked + int(i)] for i in rng.integers(len(names) - asked, size=coloured - asked)]
    return names[:asked] + others, tuple(names[:asked])


def question_text(task: str, asked: Sequence[str]) -> str:
    """What ``task`` asks about one colour, about two for ``sum``."""
    if task == "sum":
        return f"what is the sum of {asked[0]} and {asked[1]}?"
    return f"how many digits are {asked[0]}?" if task == "count" else f"which digit is {asked[0]}?"


def answer_text(task: str, asked: Sequence[str], colours: Sequence[str], labels: Sequence[int]) -> str:
    """The answer to `question_text` about digits of these colours and labels; but for ``count``, each asked colour is
    that of one digit."""
    if task == "count":
        return str(list(colours).count(asked[0]))
    digits = [int(labels[list(colours).index(colour)]) for colour in asked]
    if task == "read":
        return str(digits[0])
    return f"{asked[0]}{digits[0]} {asked[1]}{digits[1]} sum{sum(digits)}"


def questions_about(colours: Sequence[str], labels: Sequence[int]) -> list[tuple[str, str, str]]:
    """(task, question, answer) of every question that a canvas with these coloured digits could have been drawn for."""
    times = {name: list(colours).count(name) for name in COLOURS}
    single = [name for name, count in times.items() if count == 1]
    asked = [
        *(("read", (name,)) for name in single),
        *(("count", (name,)) for name, count in times.items() if count in (1, len(colours) - 1)),
        *(("sum", pair) for pair in permutations(single, 2)),
    ]
    return [(task, question_text(task, about), answer_text(task, about, colours, labels)) for task, about in asked]


def corpus() -> list[str]:
    """Every question and the words of every answer: what the tokenizer of the default model is trained on."""
    pairs = list(permutations(COLOURS, 2))
    questions = [question_text(task, (name,)) for task in ("read", "count") for name in COLOURS]
    questions += [question_text("sum", pair) for pair in pairs]
    return questions + [answer_text("sum", pair, pair, (7, 5)) for pair in pairs]
