"""Launches of the Triton kernels of the attention mass (README.md has the derivation and the tiling)."""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsity_kernels.attention_mass import kernels
from sparsity_kernels.backend import device_of

_SCAN = 1024  # rows or keys that a program reads at once where it looks for the reach of a key tile
_GRAD_RANGE, _GRAD_LEAST = 1024.0, 1e-30  # incoming gradients are scaled to this size: float16 must not underflow
_SPLIT_PROGRAMS, _SPLIT_KEYS = 256, 1024  # with few rows the keys are split into this many programs of a sample


class AttentionMass(torch.autograd.Function):
    """See `sparsity_kernels.attention_mass.attention_mass`, which checks the arguments.

    Saves its inputs and the row sums; the backward computes the probabilities from them.
    """

    @staticmethod
    def forward(ctx, query, key, slots, valid, scale, lse):
        ctx.scale = scale
        call = _Call(query, key, slots, valid, scale)
        if call.empty:
            ctx.save_for_backward(query, key, slots, valid, None)
            return query.new_zeros(valid.shape, dtype=torch.float32)
        with device_of(query):
            first, spans = call.reach(backward=False)
            lse = call.row_sums(first) if lse is None else lse.contiguous()
            mass = call.column_sums(first, spans, lse)
        ctx.save_for_backward(query, key, slots, valid, lse)
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, slots, valid, lse = ctx.saved_tensors
        call = _Call(query, key, slots, valid, ctx.scale)
        if call.empty:
            return torch.zeros_like(query), torch.zeros_like(key), None, None, None, None
        with device_of(query):
            grad_query, grad_key = call.gradients(lse, grad, ctx.needs_input_grad[1])
        return grad_query, grad_key, None, None, None, None


@dataclass(frozen=True)
class _Tile:
    """``own`` rows (keys) stay in a program, ``stream`` keys (rows) pass through it at a time."""

    own: int
    stream: int
    warps: int
    stages: int


def _tile(dim: int, dtype: torch.dtype, backward: bool) -> _Tile:
    """A fixed table: compiled for an H100, none of its entries spills registers at head dims 64 and 128."""
    if dtype == torch.float32:
        return _Tile(32, 32, 8, 2)
    if dim > 128:
        return _Tile(64, 32, 8 if backward else 4, 2)
    return _Tile(128, 64, 8, 2) if backward else _Tile(128, 64, 4, 3)


class _Call:
    """Shapes, strides and launches of one call."""

    def __init__(self, query: Tensor, key: Tensor, slots: Tensor, valid: Tensor, scale: float) -> None:
        self.query, self.key = query, key
        self.slots, self.valid = slots.contiguous(), valid.contiguous()
        self.batch, self.heads, self.rows, self.dim = query.shape
        self.kv_heads, self.length = key.shape[1:3]
        self.scale = scale
        self.empty = not (self.batch and self.rows and self.length)
        self.flat_rows = self.rows * (self.heads // self.kv_heads)

    def reach(self, backward: bool) -> tuple[Tensor, Tensor]:
        """(batch,) first valid key, and (batch, key tiles, 3) the rows that each key tile is seen by; both int32."""
        keys = _tile(self.dim, self.query.dtype, backward).own
        tiles = triton.cdiv(self.length, keys)
        first = self._new(self.batch, dtype=torch.int32)
        spans = self._new(self.batch, tiles, 3, dtype=torch.int32)
        kernels.reach_kernel[(self.batch, tiles)](
            self.slots, self._valid_bytes, first, spans, self.rows, self.length, BN=keys, SCAN=_SCAN
        )
        return first, spans

    def row_sums(self, first: Tensor) -> Tensor:
        """(batch, heads, rows) natural log of the row sums."""
        tile = _tile(self.dim, self.query.dtype, backward=False)
        row_tiles = triton.cdiv(self.flat_rows, tile.own)
        # Of one sample's shape, not of the batch: a sample alone has the bits of the sample in a batch.
        splits = min(triton.cdiv(self.length, _SPLIT_KEYS), max(1, _SPLIT_PROGRAMS // (row_tiles * self.kv_heads)))
        keys = triton.cdiv(triton.cdiv(self.length, splits), tile.stream) * tile.stream
        lse = self._new(splits, self.batch, self.heads, self.rows)
        kernels.row_sum_kernel[(self.batch * self.kv_heads, row_tiles, splits)](
            *self._inputs, first, lse, *self._numbers, keys, **self._constants, **_options(tile, "BM", "BN")
        )
        return lse[0] if splits == 1 else lse.logsumexp(0)

    def column_sums(self, first: Tensor, spans: Tensor, lse: Tensor) -> Tensor:
        """(batch, length) the mass."""
        tile = _tile(self.dim, self.query.dtype, backward=False)
        mass = self._new(self.batch, self.kv_heads, self.length)
        kernels.column_sum_kernel[(self.batch * self.kv_heads, spans.shape[1])](
            *self._inputs, first, spans, lse, mass, *self._numbers, **self._constants, **_options(tile, "BN", "BM")
        )
        return mass.sum(1)

    def gradients(self, lse: Tensor, grad: Tensor, wants_key: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of query and, where wanted, of key."""
        tile = _tile(self.dim, self.query.dtype, backward=True)
        first, spans = self.reach(backward=True)
        grad = grad.masked_fill(~self.valid, 0)
        unit = grad.abs().amax(-1, keepdim=True).clamp_min(_GRAD_LEAST) / _GRAD_RANGE
        grad = grad / unit
        mean = self._new(self.batch, self.heads, self.rows)
        grad_query = self._new(*self.query.shape, dtype=self.query.dtype)
        factor = self.scale / self.heads
        row_tiles = triton.cdiv(self.flat_rows, tile.own)
        kernels.query_grad_kernel[(self.batch * self.kv_heads, row_tiles)](
            *self._inputs, first, lse, grad, unit, mean, grad_query, *self._numbers, factor,
            **self._constants, **_options(tile, "BM", "BN"),
        )  # fmt: skip
        if not wants_key:
            return grad_query, None
        grad_key = self._new(*self.key.shape, dtype=self.key.dtype)
        kernels.key_grad_kernel[(self.batch * self.kv_heads, spans.shape[1])](
            *self._inputs, first, spans, lse, grad, unit, mean, grad_key, *self._numbers, factor,
            **self._constants, **_options(tile, "BN", "BM"),
        )  # fmt: skip
        return grad_query, grad_key

    @property
    def _valid_bytes(self) -> Tensor:
        return self.valid.view(torch.uint8)

    @property
    def _inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.slots, self._valid_bytes

    @property
    def _numbers(self) -> tuple[int | float, ...]:
        strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        return (*strides, self.rows, self.length, self.kv_heads, self.scale * log2(e))

    @property
    def _constants(self) -> dict[str, int]:
        padded = max(16, triton.next_power_of_2(self.dim))
        return {"GROUP": self.heads // self.kv_heads, "DIM": self.dim, "BD": padded}

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)


def _options(tile: _Tile, own: str, stream: str) -> dict[str, int]:
    return {own: tile.own, stream: tile.stream, "num_warps": tile.warps, "num_stages": tile.stages}
