"""What a sparse generate call kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_forcing.attention.context import SparseContext


class SparseStats:
    """Statistics of the last generate (or forward) call inside a `sparse_attention` block.

    Ratios are in 0-1. Every property raises RuntimeError before the first call.
    """

    def __init__(self) -> None:
        self._context: SparseContext | None = None

    def record(self, context: SparseContext) -> None:
        self._context = context

    @property
    def context(self) -> SparseContext:
        if self._context is None or not self._context.kept:
            raise RuntimeError("no prompt has been run inside this sparse_attention block yet")
        self._context.check()
        return self._context

    @property
    def valid(self) -> Tensor:
        """(batch, prompt) bool: prompt positions that are not padding."""
        return self.context.layout.valid

    @property
    def visual(self) -> Tensor:
        """(batch, prompt) bool: visual tokens."""
        return self.context.layout.visual

    def kept(self, layer: int) -> Tensor:
        """(batch, prompt) bool: the kept set of a layer."""
        if layer not in self.context.kept:
            raise IndexError(f"layer {layer} is not one of the {len(self.context.kept)} decoder layers")
        return self.context.kept[layer]

    @property
    def layer_ratio(self) -> Tensor:
        """(layers, batch) float32: kept / prompt length of each layer."""
        return layer_ratios(self.context.kept, self.valid)

    @property
    def layer_visual_ratio(self) -> Tensor:
        """(layers, batch) float32: kept visual / visual tokens of each layer; NaN for a prompt without any."""
        return layer_ratios(self.context.kept, self.visual)

    @property
    def token_ratio(self) -> Tensor:
        """(batch,) float32: the token ratio, mean over layers."""
        return self.layer_ratio.mean(0)

    @property
    def visual_token_ratio(self) -> Tensor:
        """(batch,) float32: the token ratio of visual tokens, mean over layers."""
        return self.layer_visual_ratio.mean(0)

    @property
    def cache_bytes(self) -> int:
        """Bytes the cache stores now, generated tokens included."""
        if self.context.cache is None:
            return 0
        return sum(layer.nbytes for layer in self.context.cache.layers)

    @property
    def dense_cache_bytes(self) -> int:
        """Bytes a dense cache of the same batch and length stores."""
        if self.context.cache is None:
            return 0
        return sum(layer.dense_nbytes for layer in self.context.cache.layers)


def layer_ratios(kept: dict[int, Tensor], among: Tensor) -> Tensor:
    """(layers, batch) share of the tokens ``among`` (batch, prompt) that each layer keeps."""
    total = among.sum(-1).float()
    return torch.stack([(kept[layer] & among).sum(-1).float() / total for layer in sorted(kept)])
