"""Decode steps of a whole model, each the same at every call: over a pruned cache, over dense ones, by `generate`.

All steps see ``length`` tokens before them and read their keys and values from one pool of memory, each in its own
layout: a pool that the dense rows fill is filled by more pruned rows. A step appends its token where its last call did.
Sampling is no part of a step, except in `model.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from sparsity_kernels import RaggedCache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.attention.cache import pruned_cache
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.bench.compare import BenchError, captured, require_close
from sparsity_forcing.generation.forward import decode_step
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

AXES = 3  # of the rotary embedding
NEW_TOKENS = 32  # of one timed call
FOLDED = "bench_folded"
GENERATE = "model.generate"

# Logits of one model computed in two ways, relative to the largest. At 28 and 36 layers of random weights and 1,024 and
# 4,096 tokens, rounding to bfloat16 was measured to give 0.04 to 0.06; attention that misses 8 of 4,096 entries gives
# 0.14 or more, a missing quarter more than 1. In float32 rounding stayed below 5e-5.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}

Pool = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """One token for every row. ``run``: its logits (batch, vocabulary). ``tokens``: (batch,) ids it runs on.
    ``entries``: of given rows and for every layer the keys and values it must see, (rows, kv_heads, kept, dim)."""

    run: Callable[[], Tensor]
    tokens: Tensor
    entries: Callable[[list[int]], list[tuple[Tensor, Tensor]]]


class FixedLayer(DynamicLayer):
    """Preallocated keys and values, (batch, kv_heads, stored + 1, dim). Each new entry takes the place of the last new
    one, and attention gets all of them without a mask."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = key, value, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def heads(model) -> tuple[int, int]:
    """Key heads and their size."""
    config = model.config.get_text_config()
    return config.num_key_value_heads, config.hidden_size // config.num_attention_heads


def make_pool(model, entries: int) -> Pool:
    """Memory for the keys and values of ``entries`` tokens in every layer, filled with random numbers."""
    kv_heads, dim = heads(model)
    draw = lambda: torch.randn(entries * kv_heads * dim, device=model.device, dtype=model.dtype)  # noqa: E731
    return [(draw(), draw()) for _ in range(model.config.get_text_config().num_hidden_layers)]


def pruned_step(model, pool: Pool, batch: int, length: int, kept: int) -> Step:
    """Over a pruned cache that keeps ``kept`` of ``length`` tokens in every layer; all of them is this project's own
    dense decoding."""
    kv_heads, dim = heads(model)
    capacity, device = kept + 1, model.device
    views = [[_view(memory, batch * capacity, kv_heads, dim) for memory in layer] for layer in pool]
    stored = torch.full((len(pool), batch), kept, dtype=torch.int32, device=device)
    start = torch.arange(batch, device=device) * capacity
    owned = torch.full((batch,), capacity, dtype=torch.int32, device=device)
    slots = torch.full((batch * capacity,), -1, dtype=torch.int32, device=device)
    fresh = [
        RaggedCache(key, value, slots, start, stored[layer], owned, [capacity] * batch, [kept] * batch)
        for layer, (key, value) in enumerate(views)
    ]
    cache = pruned_cache(len(pool))
    for layer in cache.layers:
        layer.is_initialized = True
    ids = torch.full((batch, length), model.config.image_token_id, device=device)
    layout = PromptLayout.from_tokens(ids, None, (model.config.image_token_id,))
    context = SparseContext(SparsityParams(), layout, torch.ones(batch), cache)
    tokens, position = _inputs(batch, length, device)

    def run() -> Tensor:
        stored.fill_(kept)
        for layer, ragged in zip(cache.layers, fresh, strict=True):
            layer.ragged, layer.seen = replace(ragged), length
        with decoder_attention(model):
            return decode_step(model, cache, tokens, position, AXES, context)

    def entries(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        split = lambda memory: memory.unflatten(0, (batch, capacity))[rows, :kept].transpose(1, 2)  # noqa: E731
        return [(split(key), split(value)) for key, value in views]

    return Step(run, tokens, entries)


def dense_step(model, pool: Pool, batch: int, length: int, attention: str) -> Step:
    """Over a static cache of all tokens, with one of transformers' attention functions."""
    views = _dense_views(model, pool, batch, length)
    cache = Cache(layers=[FixedLayer(key, value) for key, value in views])
    tokens, position = _inputs(batch, length, model.device)

    def run() -> Tensor:
        with _attention(model, attention):
            return decode_step(model, cache, tokens, position, AXES, None)

    return Step(run, tokens, lambda rows: [(key[rows, :, :-1], value[rows, :, :-1]) for key, value in views])


def reference_logits(model, step: Step, rows: list[int], length: int) -> Tensor:
    """What the step must give for some of its rows: the model's eager attention over copies of the same entries."""
    layers = [_dynamic_layer(key.clone(), value.clone()) for key, value in step.entries(rows)]
    positions = torch.full((len(rows),), length, device=model.device)
    with _attention(model, "eager"):
        return decode_step(model, Cache(layers=layers), step.tokens[rows], positions, AXES, None)


def generate_arm(model, pool: Pool, batch: int, length: int) -> Callable[..., object]:
    """`model.generate` as it comes, its cache filled: it copies the cache at each step. Needs the pool's size again."""
    views = _dense_views(model, pool, batch, length)
    tokens, _ = _inputs(batch, length, model.device)
    ids = torch.zeros(batch, length + 1, dtype=torch.long, device=model.device)
    ids[:, -1] = tokens
    mask = torch.ones_like(ids)

    def run(new_tokens: int = NEW_TOKENS, **options) -> object:
        cache = DynamicCache()
        cache.layers = [_dynamic_layer(key[:, :, :-1], value[:, :, :-1]) for key, value in views]
        model.model.rope_deltas = None  # what an earlier prompt left there
        length_options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **length_options, **options)

    return run


def check_arm(model, name: str, step: Step, run: Callable[[], Tensor], length: int) -> list[dict]:
    """The logits of what is timed are those of the reference, for the first and the last row; and a captured step gives
    what the same step gives uncaptured."""
    rows, tolerance = sorted({0, len(step.tokens) - 1}), TOLERANCE[model.dtype]
    found = run().clone()
    what = f"logits of one step of {name!r}, against eager attention over the same entries"
    checked = [require_close(found[rows], reference_logits(model, step, rows, length), tolerance, what)]
    if run is not step.run:
        checked.append(require_close(found, step.run(), tolerance, f"{name!r} captured and uncaptured"))
    return checked


def step_arms(
    model, pool: Pool, batch: int, sparse_batch: int, length: int, kept: int, generate: bool
) -> tuple[dict[str, Callable[[], object]], list[dict]]:
    """The arms, each giving ``NEW_TOKENS`` tokens a row at a call, and what was checked of them.

    Raises:
        BenchError: the logits of an arm are not those of the reference.
    """
    steps = {
        "sparse": pruned_step(model, pool, sparse_batch, length, kept),
        "dense, this project's kernel": pruned_step(model, pool, batch, length, length),
        "dense SDPA, static cache, grouped-query": dense_step(model, pool, batch, length, "sdpa"),
        "dense SDPA, static cache, folded": dense_step(model, pool, batch, length, FOLDED),
    }
    arms, checked = {}, []
    for name, step in steps.items():
        run = captured(step.run, model.device)
        checked += check_arm(model, name, step, run, length)
        arms[name] = lambda run=run: [run() for _ in range(NEW_TOKENS)]
    if generate:
        whole = generate_arm(model, pool, batch, length)
        dense, rows = steps["dense SDPA, static cache, folded"], sorted({0, batch - 1})
        found = whole(1, output_logits=True, return_dict_in_generate=True).logits[0][rows]
        expected = reference_logits(model, dense, rows, length)
        what = f"first logits of {GENERATE!r}, against eager attention over the same entries"
        checked.append(require_close(found, expected, TOLERANCE[model.dtype], what))
        arms[GENERATE] = whole
    return arms, checked


@contextmanager
def _attention(model, name: str) -> Iterator[None]:
    """Runs the decoder on one of transformers' attention functions inside the block."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": name})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def _folded(module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_) -> tuple[Tensor, None]:
    """SDPA of one new row, the query heads of a key head folded into rows: nothing is repeated."""
    batch, query_heads, rows, dim = query.shape
    if rows != 1 or mask is not None:
        raise BenchError("the folded form is for one new row without a mask")
    output = scaled_dot_product_attention(query.reshape(batch, key.shape[1], -1, dim), key, value, scale=scaling)
    return output.reshape(batch, 1, query_heads, dim), None


def _inputs(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and positions of the new tokens, the same at every call."""
    tokens = torch.arange(batch, device=device) * 7 % 1000
    return tokens, torch.full((batch,), length, device=device)


def _dense_views(model, pool: Pool, batch: int, length: int) -> list[list[Tensor]]:
    """The pool as (batch, kv_heads, length + 1, dim)."""
    kv_heads, dim = heads(model)
    return [[_view(memory, batch, kv_heads, length + 1, dim) for memory in layer] for layer in pool]


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: torch.Size(shape).numel()].view(shape)


def _dynamic_layer(key: Tensor, value: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


AttentionInterface.register(FOLDED, _folded)
