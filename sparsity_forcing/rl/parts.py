"""Prompts and their rollouts, in the portions in which they go through the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparsity_forcing.data.schema import Row
from sparsity_forcing.generation.prompts import Prompts
from sparsity_forcing.rl.rollout import Rollouts
from sparsity_forcing.selection import PromptLayout


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

    def split(self, size: int | None, media_of: Callable[[Sequence[Row]], dict]) -> list[Part]:
        """Parts of at most ``size`` rows each, in order; ``media_of`` gives the pixel inputs of some rows.

        Every prompt stays padded as it is: a replay needs the slots of its rollout.
        """
        if size is None or size >= len(self.rows):
            return [self]
        return [self._between(first, first + size, media_of) for first in range(0, len(self.rows), size)]

    def _between(self, first: int, last: int, media_of: Callable[[Sequence[Row]], dict]) -> Part:
        rows = self.rows[first:last]
        copies = self.prompts.queries // len(self.rows)  # of a row's prompt
        queries = slice(first * copies, last * copies)
        answers = slice(first * copies * self.group, last * copies * self.group)
        media = media_of([row for row in rows for _ in range(copies)])
        return Part(
            rows, _some_prompts(self.prompts, queries, media), some_rollouts(self.rollouts, answers), self.group
        )


def _some_prompts(prompts: Prompts, some: slice, media: dict) -> Prompts:
    layout = prompts.layout
    return replace(
        prompts,
        input_ids=prompts.input_ids[some],
        layout=PromptLayout(layout.valid[some], layout.visual[some], layout.prefix[some], layout.seeds[some]),
        position_ids=prompts.position_ids[:, some],
        next_position=prompts.next_position[some],
        media=media,
    )


def some_rollouts(rollouts: Rollouts, some: slice) -> Rollouts:
    """The rollouts of a slice of rows."""

    def taken(name: str, value: Tensor | dict[int, Tensor]) -> Tensor | dict[int, Tensor]:
        if isinstance(value, dict):
            return {layer: of_layer[some] for layer, of_layer in value.items()}
        return value[:, some] if name in ("selection_logps", "layer_ratio", "layer_visual_ratio") else value[some]

    return Rollouts(**{name: taken(name, value) for name, value in vars(rollouts).items()})
