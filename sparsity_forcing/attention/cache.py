"""The pruned cache: a layer that stores kept tokens only and still counts the tokens it has seen."""

from __future__ import annotations

import torch
from sparsity_kernels import gather_kept
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PrunedLayer(DynamicLayer):
    """A cache layer that can drop positions.

    Keys are stored after the rotary embedding, so dropping needs no position bookkeeping. ``get_seq_length`` is the
    logical length: positions, and with them every mask of the model, go on as if nothing had been dropped.
    """

    is_croppable = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen = 0
        self.real: Tensor | None = None  # (batch, stored) bool once pruned; False pads a shorter row

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        added = key_states.shape[-2]
        self.seen += added
        if self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(self.real.shape[0], added)], dim=1)
        return keys, values

    def prune(self, kept: Tensor) -> None:
        """Keeps the positions of ``kept`` (batch, seen) bool, once, before anything is generated."""
        if self.real is not None:
            raise RuntimeError("this cache layer is pruned already: start the next prompt with a new cache")
        self.keys, self.values, self.real = gather_kept(self.keys, self.values, kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a pruned cache cannot be cropped: assisted decoding is not supported")

    def reset(self) -> None:
        super().reset()
        self.seen, self.real = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.real is not None:
            self.real = self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.real is not None:
            self.real = self.real.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.real is not None:
            self.real = self.real[indices]


def pruned_cache(layers: int) -> Cache:
    """An empty cache of ``layers`` pruned layers."""
    return Cache(layers=[PrunedLayer() for _ in range(layers)])
