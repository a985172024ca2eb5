"""Prompts and their rollouts, in the portions in which they go through the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity_forcing.data.schema import Row
from sparsity_forcing.generation.encoded_images import are_encoded
from sparsity_forcing.generation.prompts import Prompts
from sparsity_forcing.rl.rollout import Rollouts


@dataclass(frozen=True)
class Part:
    """``rows`` with their prompts and rollouts.

    ``group``: how often a pass repeats every prompt. The size of a group where its rollouts share a prefix; else 1, and
    ``prompts`` holds every row's prompt once for each of its rollouts.
    """

    rows: Sequence[Row]
    prompts: Prompts
    rollouts: Rollouts
    group: int

    def split(self, size: int | None, pixels_of: Callable[[Sequence[Row]], dict]) -> list[Part]:
        """Parts of at most ``size`` rows each, in order; ``pixels_of`` gives images of some rows that are not encoded.

        Every prompt stays padded as it is: a replay needs the slots of its rollout.
        """
        if size is None or size >= len(self.rows):
            return [self]
        return [self._between(first, first + size, pixels_of) for first in range(0, len(self.rows), size)]

    def _between(self, first: int, last: int, pixels_of: Callable[[Sequence[Row]], dict]) -> Part:
        rows = self.rows[first:last]
        copies = self.prompts.queries // len(self.rows)  # of a row's prompt
        queries = torch.arange(len(rows) * copies, device=self.prompts.input_ids.device) + first * copies
        answers = slice(first * copies * self.group, last * copies * self.group)
        encoded = are_encoded(self.prompts.media)
        media = None if encoded else pixels_of([row for row in rows for _ in range(copies)])
        return Part(rows, self.prompts.take(queries, media), some_rollouts(self.rollouts, answers), self.group)


def some_rollouts(rollouts: Rollouts, some: slice) -> Rollouts:
    """The rollouts of a slice of rows."""

    def taken(name: str, value: Tensor | dict[int, Tensor]) -> Tensor | dict[int, Tensor]:
        if isinstance(value, dict):
            return {layer: of_layer[some] for layer, of_layer in value.items()}
        return value[:, some] if name in ("selection_logps", "layer_ratio", "layer_visual_ratio") else value[some]

    by_row = {name: value for name, value in vars(rollouts).items() if name != "sigma"}
    return replace(rollouts, **{name: taken(name, value) for name, value in by_row.items()})
