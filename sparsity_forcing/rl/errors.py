"""Why a training cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsity_forcing.scoring import ScoreError


class TrainingError(ValueError):
    """What was given does not allow the training; the message says why and what to change."""


@contextmanager
def explained_memory(advice: str) -> Iterator[None]:
    """Turns an out-of-memory error of a device into one that says which parameters to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        first = str(error).partition("\n")[0]
        on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in first
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrainingError(f"the device is out of memory; {advice} ({first})") from error


@contextmanager
def explained_score() -> Iterator[None]:
    """Says of a score function that fails which parameter names it."""
    try:
        yield
    except ScoreError as error:
        raise TrainingError(f"{error}; train.reward.correct in params.yaml names it") from error
