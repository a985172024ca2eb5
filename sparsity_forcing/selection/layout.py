"""Where things are in a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_forcing.params import SparsityParams

_PRIME = 2**31 - 1


@dataclass(frozen=True)
class PromptLayout:
    """The prompts of a batch. ``valid``, ``visual`` and ``prefix`` are (batch, prompt) bool.

    ``valid``: not padding. ``visual``: visual tokens. ``prefix``: the visual prefix, everything up to the last visual
    token (empty for a text-only prompt). ``seeds``: (batch,) int64, one number per prompt from its token ids.
    """

    valid: Tensor
    visual: Tensor
    prefix: Tensor
    seeds: Tensor

    @classmethod
    def from_tokens(cls, input_ids: Tensor, attention_mask: Tensor | None, visual_ids: tuple[int, ...]) -> PromptLayout:
        """Reads the layout off (batch, prompt) token ids and a (batch, prompt) mask, 1 where a token is real."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if valid.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(valid.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
            )
        visual = torch.isin(input_ids, torch.tensor(visual_ids, device=input_ids.device)) & valid
        after_or_at_last = visual.flip(-1).cumsum(-1).flip(-1) > 0
        return cls(valid, visual, after_or_at_last & valid, _content_seeds(input_ids, valid))

    @property
    def length(self) -> int:
        """Slots of the prompt, padding included."""
        return self.valid.shape[1]

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    def droppable(self, settings: SparsityParams) -> Tensor:
        """(batch, prompt) bool: the tokens that selection may drop."""
        order = self.valid.cumsum(-1)
        count = order[:, -1:]
        protected = (order <= settings.protect_first) | (order > count - settings.protect_last)
        if settings.protect_text:
            protected |= ~self.visual
        return self.valid & ~protected

    def to(self, device) -> PromptLayout:
        return self._each(lambda tensor: tensor.to(device))

    def take(self, rows: Tensor) -> PromptLayout:
        """Some rows, by their indices, which may repeat."""
        return self._each(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> PromptLayout:
        """Every row ``times`` times in a row: the layout of groups of rollouts."""
        return self._each(lambda tensor: tensor.repeat_interleave(times, 0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PromptLayout:
        return PromptLayout(*(change(tensor) for tensor in (self.valid, self.visual, self.prefix, self.seeds)))


def _content_seeds(input_ids: Tensor, valid: Tensor) -> Tensor:
    """A number per prompt, from its tokens and their order, that does not depend on padding or on the other rows."""
    place = valid.long().cumsum(-1)
    mixed = ((input_ids.long() + 1) * 2_654_435_761 + place * 40_503) % _PRIME
    mixed = mixed * mixed % _PRIME * mixed % _PRIME  # a sum of linear terms would not see the order
    return (mixed * valid).sum(-1) % _PRIME
