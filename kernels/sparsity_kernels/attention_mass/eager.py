"""Eager reference of the attention mass (README.md has the definition): blocks of rows, recomputed in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Most probabilities of one block. On a CPU 2^20 (4 MiB of float32) took less time than 2^19 and 2^18: fewer calls, and
# the keys pass through the caches less often. Other devices need more work per launch.
_CPU_BLOCK, _DEVICE_BLOCK = 2**20, 2**22
_FEWEST_FLAT_ROWS, _MOST_FLAT_ROWS = 32, 256  # rows × heads of one key head: fewer starve the product, more waste


class AttentionMass(torch.autograd.Function):
    """See `sparsity_kernels.attention_mass.attention_mass`, which checks the arguments.

    Saves its inputs and computes the probabilities again, block by block; those of a single block it saves.
    """

    @staticmethod
    def forward(ctx, query, key, slots, valid, scale, lse):
        ctx.scale = scale
        mass = query.new_zeros(valid.shape, dtype=_wide(query))
        probability = None
        for block in _blocks(query, key, slots, valid, scale, lse):
            probability = block.probability if block.alone else None
            column_sums = torch.bmm(block.weight.unsqueeze(1), block.probability)
            mass[block.samples, : block.limit] += column_sums.view(*block.shape, block.limit).sum(1)
        ctx.save_for_backward(query, key, slots, valid, lse, probability)
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, slots, valid, lse, probability = ctx.saved_tensors
        wants_query, wants_key = ctx.needs_input_grad[:2]
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format) if wants_query else None
        grad_key = torch.zeros(key.shape, dtype=grad.dtype, device=key.device) if wants_key else None
        spare = torch.empty(0, dtype=grad.dtype, device=grad.device)
        for block in _blocks(query, key, slots, valid, ctx.scale, lse, probability):
            incoming = grad[block.samples, None, : block.limit].expand(*block.shape, block.limit)
            incoming = incoming.reshape(-1, 1, block.limit)
            mean = torch.bmm(block.probability, incoming.transpose(1, 2))
            if spare.numel() < block.probability.numel():
                spare = grad.new_empty(block.probability.numel())
            through = spare[: block.probability.numel()].view_as(block.probability)
            torch.sub(incoming, mean, out=through).mul_(block.probability)
            weight = block.weight.unsqueeze(-1)
            if wants_query:
                target = grad_query[block.samples, block.heads, block.rows]
                target.copy_((torch.bmm(through, block.key) * (weight * ctx.scale)).view(target.shape))
            if wants_key:
                target = grad_key[block.samples, block.key_heads, : block.limit]
                target += torch.bmm(through.transpose(1, 2), block.query * weight).view(target.shape)
        return grad_query, None if grad_key is None else grad_key.to(key.dtype), None, None, None, None


def visible_until(slots: Tensor, valid: Tensor) -> Tensor:
    """(batch, rows) the last key slot that a row may see; -1 for a row that sees nothing."""
    length = valid.shape[1]
    first = valid.byte().argmax(-1, keepdim=True).masked_fill(~valid.any(-1, keepdim=True), length)
    slots = slots.clamp(max=length - 1)
    return slots.masked_fill(slots < first, -1)


@dataclass(frozen=True)
class _Block:
    """Some samples, key heads and rows: ``pairs`` = samples × key heads, ``flat`` = heads of a key head × rows.

    query (pairs, flat, dim) times the scale, key (pairs, limit, dim), probability (pairs, flat, limit), which the next
    block overwrites, and weight (pairs, flat): 1 / heads, or 0 for a row that sees nothing. ``shape`` is (samples,
    key heads); no row of the block sees a key from slot ``limit`` on. ``alone``: there is no other block.
    """

    samples: slice
    key_heads: slice
    heads: slice
    rows: slice
    shape: tuple[int, int]
    limit: int
    query: Tensor
    key: Tensor
    probability: Tensor
    weight: Tensor
    alone: bool


def _blocks(
    query: Tensor,
    key: Tensor,
    slots: Tensor,
    valid: Tensor,
    scale: float,
    lse: Tensor | None,
    probability: Tensor | None = None,
) -> Iterator[_Block]:
    """Blocks that cover every row that sees a key; ``probability`` is that of the only block, where known."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1:3]
    group = heads // kv_heads
    if not batch or not rows or not length:
        return
    wide = _wide(query)
    until = visible_until(slots, valid)
    host = until.tolist()
    weights = (until >= 0).to(wide) / heads
    memory = torch.empty(0, dtype=wide, device=key.device)
    for samples, key_heads, step in _regions(batch, heads, kv_heads, rows, length, query.is_cuda):
        shape = (samples.stop - samples.start, key_heads.stop - key_heads.start)
        pairs = shape[0] * shape[1]
        alone = shape == (batch, kv_heads) and step >= rows
        own_heads = slice(key_heads.start * group, key_heads.stop * group)
        region_key = key[samples, key_heads].to(wide).reshape(pairs, length, dim)
        hide = None if probability is not None else _Hide(until[samples], valid[samples], wide)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            ends = [end for sample in host[samples] for end in sample[part] if end >= 0]
            if not ends:
                continue
            limit = max(ends) + 1
            block_key = region_key[:, :limit]
            block_query = query[samples, own_heads, part]
            per_row = block_query.shape[:3]
            block_query = (block_query.to(wide) * scale).reshape(pairs, -1, dim)
            flat = block_query.shape[1]
            if probability is None:
                if memory.numel() < pairs * flat * limit:
                    memory = memory.new_empty(pairs * flat * (limit if alone else length))
                logits = memory[: pairs * flat * limit].view(pairs, flat, limit)
                torch.bmm(block_query, block_key.transpose(1, 2), out=logits)
                hide(logits.view(*per_row, limit), part, min(ends) + 1)
                if lse is None:
                    torch.softmax(logits, -1, out=logits)
                else:
                    known = lse[samples, own_heads, part].masked_fill(until[samples, None, part] < 0, torch.inf)
                    logits.sub_(known.reshape(pairs, flat, 1)).exp_()
            weight = weights[samples, None, part].expand(per_row).reshape(pairs, flat)
            yield _Block(
                samples,
                key_heads,
                own_heads,
                part,
                shape,
                limit,
                block_query,
                block_key,
                logits if probability is None else probability,
                weight,
                alone,
            )


class _Hide:
    """Sets the logits of keys that a row may not see to the smallest number, in those columns that hold any.

    Not -inf: a row that sees nothing must stay finite, since it is weighted by 0.
    """

    def __init__(self, until: Tensor, valid: Tensor, wide: torch.dtype) -> None:
        self.until, self.lowest = until, torch.finfo(wide).min
        self.invalid = ~valid
        padding = self.invalid.any(0).nonzero().flatten().tolist()
        self.padding = (padding[0], padding[-1] + 1) if padding else None
        self.places = torch.arange(valid.shape[1], device=valid.device)

    def __call__(self, logits: Tensor, rows: slice, free: int) -> None:
        """logits (samples, heads, rows, limit); every row that sees a key may see the first ``free`` if valid."""
        limit = logits.shape[-1]
        if free < limit:
            hidden = self.places[free:limit] > self.until[:, rows, None]
            logits[..., free:].masked_fill_(hidden[:, None], self.lowest)
        if self.padding is not None and self.padding[0] < limit:
            columns = slice(self.padding[0], min(self.padding[1], limit))
            logits[..., columns].masked_fill_(self.invalid[:, None, None, columns], self.lowest)


def _regions(
    batch: int, heads: int, kv_heads: int, rows: int, length: int, is_cuda: bool
) -> Iterator[tuple[slice, slice, int]]:
    """(samples, key heads, rows per block): whole samples where they are small, else one key head after the other."""
    room = _DEVICE_BLOCK if is_cuda else _CPU_BLOCK
    sample = heads * rows * length
    if sample <= room:
        take = max(1, room // sample)
        for first in range(0, batch, take):
            yield slice(first, min(first + take, batch)), slice(0, kv_heads), rows
        return
    group = heads // kv_heads
    fewest, most = -(-_FEWEST_FLAT_ROWS // group), max(1, _MOST_FLAT_ROWS // group)
    if is_cuda:
        most = rows
    step = max(fewest, min(room // (group * length), most))
    for sample_index in range(batch):
        for key_head in range(kv_heads):
            yield slice(sample_index, sample_index + 1), slice(key_head, key_head + 1), step


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)
