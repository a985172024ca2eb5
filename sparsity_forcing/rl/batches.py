"""Which rows a step trains on, and which of them a process takes: pure functions of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsity_forcing.data.schema import Row


def rows_of_step(rows: Sequence[Row], step: int, per_step: int, seed: int) -> list[Row]:
    """The ``per_step`` rows of step ``step`` (from 0): every epoch is a new permutation, its remainder is dropped."""
    steps_per_epoch = len(rows) // per_step
    epoch, place = divmod(step, steps_per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    return [rows[int(i)] for i in order[place * per_step : (place + 1) * per_step]]


def share_of(rows: Sequence[Row], process: int, processes: int) -> Sequence[Row]:
    """The rows of one process: contiguous and in order; the shares differ by one row at most."""
    first, last = (len(rows) * index // processes for index in (process, process + 1))
    return rows[first:last]
