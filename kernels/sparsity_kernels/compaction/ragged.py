"""The ragged cache of one layer: every batch row keeps its own number of entries and grows in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sparsity_kernels.backend import TRITON_DTYPES, Impl, runs_triton
from sparsity_kernels.checks import dtype_name, form, some
from sparsity_kernels.compaction import eager


class CapacityError(RuntimeError):
    """More entries were to be appended than a row has room for."""


@dataclass(eq=False)
class RaggedCache:
    """Keys and values of one layer in one buffer; the rows of the batch lie one behind the other.

    Row b owns the entries start[b] … start[b] + capacity[b] - 1, of which the first length[b] are stored; the others
    are zero. Without gradient.

    Attributes:
        key, value: (entries, kv_heads, dim).
        slots: (entries,) int32, the prompt slot of every entry; -1 where nothing is stored and for appended entries
            without a slot of their own.
        start: (batch,) int64, on the device, ascending.
        length: (batch,) int32, on the device; grows in place.
        owned: (batch,) int32, ``capacity`` on the device.
        capacity: entries that each row owns, on the host.
        lengths: ``length`` on the host.
        impl: implementation of what this cache does, see `sparsity_kernels.backend`.
    """

    key: Tensor
    value: Tensor
    slots: Tensor
    start: Tensor
    length: Tensor
    owned: Tensor
    capacity: list[int]
    lengths: list[int]
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        self._on_triton = runs_triton(self.impl, self.key, dtypes=TRITON_DTYPES)
        self._room = min(owned - stored for owned, stored in zip(self.capacity, self.lengths, strict=True))

    @property
    def batch(self) -> int:
        return len(self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, free room included."""
        return self.key.nbytes + self.value.nbytes

    @property
    def room_left(self) -> int:
        """Entries that can still be appended to every row."""
        return self._room

    @property
    def rectangular(self) -> int | None:
        """The capacity of every row where all have the same, else None.

        Where it is an int, ``key.view(batch, rectangular, kv_heads, dim)`` is a plain padded cache.
        """
        return self.capacity[0] if min(self.capacity) == max(self.capacity) else None

    def append(self, key: Tensor, value: Tensor, slots: Tensor | None = None) -> None:
        """Writes new entries in place behind those of every row: `reserve`, then `write`.

        Args:
            key, value: (batch, kv_heads, new, dim) of the cache's dtype and device, last dim contiguous.
            slots: (batch, new) int32 or int64 logical slots of the new entries; -1 where not given.

        Raises:
            CapacityError: a row has no room for ``new`` entries; nothing was written.
            ValueError: shapes, dtypes, devices or strides do not fit; nothing was written.
        """
        self._check_new(key, value, slots)
        self.reserve(key.shape[2])
        self._write(key, value, slots)

    def reserve(self, new: int) -> None:
        """Counts ``new`` entries of every row as stored, on the host only.

        A CUDA graph that was captured around `write` does no host work when it is replayed: call this before each
        replay.

        Raises:
            CapacityError: a row has no room for them; nothing was counted.
            ValueError: ``new`` is negative.
        """
        if new < 0:
            raise ValueError(f"new must not be negative, got {new}")
        if new > self._room:
            raise CapacityError(
                f"no room for {new} new entries a row: room is left for {self._room} (capacities {some(self.capacity)}"
                f", stored {some(self.lengths)}); ask for more room or use grown()"
            )
        self._room -= new
        self.lengths = [stored + new for stored in self.lengths]

    def write(self, key: Tensor, value: Tensor, slots: Tensor | None = None) -> None:
        """The device's part of `append`; to be captured into a CUDA graph. Room must have been reserved before it runs.

        Writes behind ``length`` and raises it, both on the device. Under Triton on a GPU nobody waits to look: an entry
        without room is not written, and ``length`` stops at the row's capacity. Arguments and ValueError as `append`.

        Raises:
            CapacityError: in eager and on the CPU, a row has no room on the device; nothing was written.
        """
        self._check_new(key, value, slots)
        if not (self._on_triton and key.is_cuda) and bool((self.length + key.shape[2] > self.owned).any()):
            raise CapacityError(
                f"no room for {key.shape[2]} new entries a row: capacities {some(self.capacity)}, stored "
                f"{some(self.length.tolist())}; reserve() says so before"
            )
        self._write(key, value, slots)

    def grown(self, room: int) -> RaggedCache:
        """A copy whose every row has ``room`` free entries more."""
        if room < 0:
            raise ValueError(f"room must not be negative, got {room}")
        return self._copy(list(range(self.batch)), room)

    def select(self, rows: Tensor | Sequence[int]) -> RaggedCache:
        """A copy with the given batch rows in the given order, repeats allowed (beam reorder, repeat_interleave).

        Args:
            rows: (k,) int64, k at least 1. Capacities are host numbers: a tensor on a GPU costs a host sync.

        Raises:
            ValueError: there are no rows or one is out of range.
        """
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if not rows or not all(0 <= row < self.batch for row in rows):
            raise ValueError(f"rows must be in [0, {self.batch}) and at least one, got {some(rows)}")
        return self._copy(rows, 0)

    def _check_new(self, key: Tensor, value: Tensor, slots: Tensor | None) -> None:
        _, heads, dim = self.key.shape
        for name, new in (("key", key), ("value", value)):
            fits = new.ndim == 4 and (new.shape[0], new.shape[1], new.shape[3]) == (self.batch, heads, dim)
            if not fits or new.dtype != self.key.dtype or new.device != self.key.device:
                raise ValueError(
                    f"{name} must be (batch, kv_heads, new, dim) = ({self.batch}, {heads}, new, {dim}) "
                    f"{dtype_name(self.key.dtype)} on {self.key.device}, got {form(new)} on {new.device}"
                )
            if new.stride(3) != 1 and dim > 1:
                raise ValueError(f"{name} must be contiguous in its last dim, got strides {new.stride()}")
        if key.shape != value.shape:
            raise ValueError(f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}")
        if slots is not None and (
            slots.shape != (self.batch, key.shape[2])
            or slots.dtype not in (torch.int32, torch.int64)
            or slots.device != key.device
        ):
            raise ValueError(
                f"slots must be (batch, new) = {(self.batch, key.shape[2])} int32 or int64 on {key.device}, got "
                f"{form(slots)} on {slots.device}"
            )

    @torch.no_grad()
    def _write(self, key: Tensor, value: Tensor, slots: Tensor | None) -> None:
        implementation(self._on_triton).write_entries(self, key, value, slots)
        self.length += key.shape[2]
        if self._on_triton:
            torch.minimum(self.length, self.owned, out=self.length)

    @torch.no_grad()
    def _copy(self, rows: list[int], room: int) -> RaggedCache:
        device = self.key.device
        capacity = [self.capacity[row] + room for row in rows]
        lengths = [self.lengths[row] for row in rows]
        chosen = on_device(rows, torch.int64, device)
        owned, start = extents(capacity, device)
        length = self.length[chosen]
        entries = sum(capacity)
        owner = torch.repeat_interleave(torch.arange(len(rows), device=device), owned, output_size=entries)
        place = torch.arange(entries, device=device) - start[owner]
        source = torch.where(place < length[owner], self.start[chosen][owner] + place, -1)
        padded = lambda buffer: buffer.transpose(0, 1)[None]  # noqa: E731  (1, kv_heads, entries, dim)
        gathered = implementation(self._on_triton).gather_entries(padded(self.key), padded(self.value), source)
        slots = torch.where(source >= 0, self.slots[source.clamp_min(0)], -1)
        return RaggedCache(*gathered, slots, start, length, owned, capacity, lengths, self.impl)


def implementation(on_triton: bool) -> ModuleType:
    """The module with `gather_entries` and `write_entries`."""
    if on_triton:
        from sparsity_kernels.compaction import triton

        return triton
    return eager


def extents(capacity: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(batch,) int32 capacities and int64 first entries of rows that lie one behind the other."""
    owned = on_device(capacity, torch.int32, device)
    return owned, owned.cumsum(0) - owned


def on_device(numbers: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(len,) of host numbers. From pinned memory, as the host waits for a copy from any other to a GPU."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
