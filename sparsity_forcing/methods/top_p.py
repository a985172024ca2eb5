"""Top-p: the share of the attention mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsity_forcing.methods.base import RuleMethod


@dataclass(frozen=True)
class TopP(RuleMethod):
    """Each layer keeps the smallest set of prompt tokens that holds the share ``p`` of its attention mass.

    How many tokens that takes differs by layer and question, so a model whose attention is more concentrated keeps
    fewer: this is the rule that Sparsity Forcing trains for, and the one the policy is deployed with. It trains nothing
    itself. Source: ZipVL, He et al. 2024, https://arxiv.org/abs/2410.08584
    """

    name: ClassVar[str] = "top-p"
    rule: ClassVar[str] = "top_p"
