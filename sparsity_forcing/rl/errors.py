"""Why a training cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingError(ValueError):
    """What was given does not allow the training; the message says why and what to change."""


@contextmanager
def explained_memory(advice: str) -> Iterator[None]:
    """Turns an out-of-memory error of a device into one that says which parameters to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise TrainingError(f"the device is out of memory; {advice} ({first})") from error
