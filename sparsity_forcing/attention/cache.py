"""The pruned cache: a layer that stores kept tokens only and still counts the tokens it has seen."""

from __future__ import annotations

import torch
from sparsity_kernels import Impl, RaggedCache, compact, device_of
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 32  # free entries a row gets when its room is used up


class PrunedLayer(DynamicLayer):
    """A cache layer that can drop positions.

    Keys are stored after the rotary embedding, so dropping needs no position bookkeeping. ``get_seq_length`` is the
    logical length: positions, and with them every mask of the model, go on as if nothing had been dropped.

    Before `prune` it is dense (``keys``, ``values``); after it the entries are in ``ragged``, where each row has its
    own length and generated tokens are appended in place.

    Args:
        room: entries that each row gets for generated tokens at once; grows as needed.
    """

    is_croppable = False

    def __init__(self, room: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.room = room
        self.seen = 0
        self.ragged: RaggedCache | None = None
        self._settling: tuple[Tensor, Tensor, torch.cuda.Event, Impl, torch.dtype | None] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Returns all keys and values before `prune`; after it the new ones only: attention reads ``ragged``."""
        self.settle()
        added = key_states.shape[-2]
        self.seen += added
        if self.ragged is None:
            return super().update(key_states, value_states)
        key_states, value_states = (states.to(self.ragged.key.dtype) for states in (key_states, value_states))
        if self.ragged.room_left < added:
            self.ragged = self.ragged.grown(max(GROWTH, added))
        self.ragged.append(key_states, value_states)
        return key_states, value_states

    def advance(self) -> None:
        """Counts a token that a replayed CUDA graph appends.

        Raises:
            CapacityError: there is no room for it; the graph must not be replayed.
        """
        self.ragged.reserve(1)
        self.seen += 1

    def prune(self, kept: Tensor, impl: Impl = "auto", dtype: torch.dtype | None = None) -> None:
        """Keeps the positions of ``kept`` (batch, seen) bool, once, before anything is generated; stored as ``dtype``.

        On a GPU the buffers are sized when the counts have arrived: by `settle`, at the latest by the next `update`.
        """
        if self.ragged is not None or self._settling is not None:
            raise RuntimeError("this cache layer is pruned already: start the next prompt with a new cache")
        if not kept.is_cuda:
            self._compact(kept, impl, dtype)
            return
        lengths = torch.empty(len(kept), dtype=torch.long, pin_memory=True)
        lengths.copy_(kept.sum(-1), non_blocking=True)
        with device_of(kept):  # the event is of the stream that copies
            counted = torch.cuda.Event()
            counted.record()
        self._settling = (kept, lengths, counted, impl, dtype)

    def settle(self) -> None:
        """Waits for the counts of `prune`, if it is still under way, and drops what it drops."""
        if self._settling is None:
            return
        (kept, lengths, counted, impl, dtype), self._settling = self._settling, None
        counted.synchronize()
        self._compact(kept, impl, dtype, lengths.tolist())

    def _compact(self, kept: Tensor, impl: Impl, dtype: torch.dtype | None, lengths: list[int] | None = None) -> None:
        keys, values = (states.to(dtype or states.dtype) for states in (self.keys, self.values))
        self.ragged = compact(keys, values, kept, room=self.room, impl=impl, lengths=lengths)
        self.keys = self.values = self.keys.new_empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, without free room."""
        if not self.is_initialized:
            return 0
        self.settle()
        if self.ragged is None:
            return self.keys.nbytes + self.values.nbytes
        free = self.ragged.room_left * self.ragged.batch
        return self.ragged.nbytes // self.ragged.key.shape[0] * (self.ragged.key.shape[0] - free)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of a dense layer of the same batch and length."""
        if not self.is_initialized:
            return 0
        self.settle()
        if self.ragged is None:
            return self.nbytes
        return self.ragged.nbytes // self.ragged.key.shape[0] * self.ragged.batch * self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a pruned cache cannot be cropped: assisted decoding is not supported")

    def reset(self) -> None:
        super().reset()
        self.seen, self.ragged, self._settling = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.settle()
        if self.ragged is None:
            super().batch_repeat_interleave(repeats)
        else:
            self.ragged = self.ragged.select(torch.arange(self.ragged.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.settle()
        if self.ragged is None:
            super().batch_select_indices(indices)
        else:
            self.ragged = self.ragged.select(indices)


def pruned_cache(layers: int, room: int = 0) -> Cache:
    """An empty cache of ``layers`` pruned layers."""
    return Cache(layers=[PrunedLayer(room) for _ in range(layers)])
