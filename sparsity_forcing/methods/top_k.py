"""Top-k: the same share of the tokens in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsity_forcing.methods.base import RuleMethod


@dataclass(frozen=True)
class TopK(RuleMethod):
    """Each layer keeps the share ``p`` of the prompt tokens that may be dropped, those with the most attention mass.

    The token ratio is fixed beforehand, whatever the layer or the question needs. It trains nothing.
    The rule of H2O (Zhang et al. 2023, https://arxiv.org/abs/2306.14048) and its successors, on prompts.
    """

    name: ClassVar[str] = "top-k"
    rule: ClassVar[str] = "top_k"
