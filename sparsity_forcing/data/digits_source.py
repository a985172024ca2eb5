"""The `digits` source: every split the same share of every task and grid, drawn from the scans of that split."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from sparsity_forcing.data.candidates import Candidate
from sparsity_forcing.data.digits import SPLITS, load_scans, render
from sparsity_forcing.data.schema import Row
from sparsity_forcing.params import DigitsParams


def digits_candidates(params: DigitsParams, seed: int) -> Iterator[Candidate]:
    """All rows of all splits; a row depends on the seed, its split and its place alone."""
    for split in SPLITS:
        for place in range(getattr(params, f"{split}_rows")):
            yield Candidate("digits", place + 1, "", digits_row(params, seed, split, place))


def digits_row(params: DigitsParams, seed: int, split: str, place: int) -> Row:
    """Row number ``place`` of ``split``. Tasks and grids take turns, so their shares differ by one row at most.

    ``meta``: grid, relevant_cells and coloured_cells (row-major cell indices), colours and labels of the coloured ones,
    scans (indices into ``load_digits``).
    """
    kinds = list(product(params.grids, params.tasks))
    grid, task = kinds[place % len(kinds)]
    rng = np.random.default_rng([seed, list(SPLITS).index(split), place])
    canvas = render(
        rng,
        load_scans(split),
        grid,
        task,
        params.grey_share,
        params.clutter_share,
        distorted=params.distorted and split == "train",
    )
    return Row(
        id=f"digits-{split}-{place:06d}",
        split=split,
        task=task,
        question=canvas.question,
        answer=canvas.answer,
        images=[canvas.png()],
        meta={
            "grid": grid,
            "relevant_cells": list(canvas.relevant_cells),
            "coloured_cells": list(canvas.coloured_cells),
            "colours": list(canvas.colours),
            "labels": list(canvas.labels),
            "scans": [SPLITS[split].start + scan for scan in canvas.scans],
        },
    )
