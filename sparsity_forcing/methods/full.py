"""Full: dense attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from sparsity_forcing.methods.base import Method


@dataclass(frozen=True)
class Full(Method):
    """The model as it is, without any of this library's code: every layer keeps every token. Trains nothing."""

    name: ClassVar[str] = "Full"
    p: ClassVar[float] = 1.0

    def attend(self, model) -> AbstractContextManager[None]:
        return nullcontext()
