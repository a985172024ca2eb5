"""Threshold: every token near the maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsity_forcing.methods.base import RuleMethod


@dataclass(frozen=True)
class Threshold(RuleMethod):
    """Each layer keeps the prompt tokens with at least ``1 - p`` of the largest attention mass.

    The count differs by layer and question as under top-p, but it follows the peak of the distribution instead of its
    tail, and needs no sorting. It trains nothing.
    """

    name: ClassVar[str] = "threshold"
    rule: ClassVar[str] = "threshold"
