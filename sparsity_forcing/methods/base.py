"""What a method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sparsity_forcing.params import SparsityParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsity_forcing.attention.stats import SparseStats


class Method(ABC):
    """A way to run a checkpoint: a row of the comparison table. Instances are small, frozen and can be pickled.

    ``name`` is what the table calls it, ``p`` its budget in (0, 1] (1: everything is kept).
    """

    name: ClassVar[str]
    p: float

    @abstractmethod
    def attend(self, model: PreTrainedModel) -> AbstractContextManager[SparseStats | None]:
        """Applies the method to ``model.generate`` inside the block.

        Yields the statistics of the last call, or None where every token is kept.
        """


@dataclass(frozen=True)
class RuleMethod(Method):
    """A selection rule at one budget. ``settings`` holds the rest: scoring rows, protection, prefill kind."""

    rule: ClassVar[str]
    p: float
    settings: SparsityParams = field(default_factory=SparsityParams)

    def attend(self, model: PreTrainedModel) -> AbstractContextManager[SparseStats]:
        from sparsity_forcing.attention.api import sparse_attention

        return sparse_attention(model, p=self.p, settings=self.settings, rule=self.rule)
