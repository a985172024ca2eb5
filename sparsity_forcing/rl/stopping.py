"""Asked to stop: the running step ends, is saved, and the process exits."""

from __future__ import annotations

import signal

import torch
from accelerate import Accelerator


class StopSignal:
    """``with StopSignal() as stop:`` SIGTERM is noted instead of followed; a second one ends the process at once."""

    def __enter__(self) -> StopSignal:
        self._number = 0
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def number(self, accelerator: Accelerator) -> int:
        """The signal that any process was sent, 0 if none: all processes get the same answer at the same step."""
        if accelerator.num_processes == 1:
            return self._number
        return int(accelerator.gather(torch.tensor([self._number], device=accelerator.device)).max())

    def _note(self, number: int, _frame: object) -> None:
        self._number = number
        signal.signal(number, self._before)
