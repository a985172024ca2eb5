"""AdamW whose steps are taken in float32 where the model is bfloat16.

bfloat16 has 8 bits of precision: a weight of 0.02 moves in steps of 6e-5, and an update of the usual size (1e-6) is
rounded away. The sum of all updates is kept in a float32 copy of every weight; the model gets the copy, rounded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW over float32 copies of ``weights``, which stay as they are but for their values."""

    def __init__(self, weights: Iterable[nn.Parameter], **options) -> None:
        self.weights = list(weights)
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        super().step()
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None

    def state_dict(self) -> dict:
        return {**super().state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        for master, saved in zip(self.masters, state_dict["masters"], strict=True):
            master.copy_(saved)


def adamw(weights: Iterable[nn.Parameter], **options) -> torch.optim.AdamW:
    """AdamW over float32 weights, `MasterAdamW` where one of them is bfloat16."""
    weights = list(weights)
    halves = any(weight.dtype == torch.bfloat16 for weight in weights)
    return MasterAdamW(weights, **options) if halves else torch.optim.AdamW(weights, **options)
