"""From attention mass to the kept set: pure functions."""

from sparsity_forcing.selection.layout import PromptLayout
from sparsity_forcing.selection.rules import select
from sparsity_forcing.selection.scoring_rows import scoring_rows

__all__ = ["PromptLayout", "scoring_rows", "select"]
