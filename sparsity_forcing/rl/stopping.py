"""Asked to stop: what is done is saved at the next chance, and the process exits."""

from __future__ import annotations

import signal

import torch
from accelerate import Accelerator


class StoppedError(Exception):
    """The run ends here, as one of its processes was sent the signal ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


class StopSignal:
    """``with StopSignal() as stop:`` SIGTERM is noted instead of followed; a second one ends the process at once."""

    def __enter__(self) -> StopSignal:
        self._number = 0
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @property
    def noted(self) -> bool:
        """Whether this process was sent the signal: what it is at is not wanted any more."""
        return self._number != 0

    def look(self, accelerator: Accelerator) -> None:
        """Raises StoppedError if any process was sent the signal. All processes look at the same places, and agree."""
        number = self._number
        if accelerator.num_processes > 1:
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        if number:
            raise StoppedError(number)

    def _note(self, number: int, _frame: object) -> None:
        self._number = number
        signal.signal(number, self._before)
