"""Whole models on a GPU: random-weight Qwen2.5-VL built from its configuration, decode steps and prefill."""

from __future__ import annotations

import time

import torch
from sparsity_kernels import RaggedCache
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.attention.cache import PrunedLayer, pruned_cache
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.bench.compare import BenchError, Case, require_equal, time_arms
from sparsity_forcing.generation.loop import Sampling, decode
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

# The published configurations of Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct, text part.
SIZES = {
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip
SUFFIX = 64  # text tokens after the image
SHORT, LONG = 8, 40  # new tokens of the two loops whose difference is timed: what both do once cancels out


VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420}


def random_qwen(
    sizes: dict, device: str, dtype: torch.dtype, vision: dict = VISION
) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights, made on the device. ``sizes``, ``vision``: of its two configurations."""
    rope = {"rope_type": "default", "mrope_section": _sections(sizes), "rope_theta": 1e6}
    text = {**sizes, "rope_parameters": rope, "max_position_embeddings": 131072, "use_sliding_window": False}
    vision = {**vision, "out_hidden_size": sizes["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=sizes["tie_word_embeddings"])
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def _sections(sizes: dict) -> list[int]:
    """How a head's rotary dims are shared by time, height and width: 1/4, 3/8 and 3/8 of half its size."""
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    return [half // 4, half * 3 // 8, half * 3 // 8]


def image_prompt(model, batch: int, length: int) -> torch.Tensor:
    """(batch, length) ids: an image and a short text. Without pixels: the vision tower is not part of the timing."""
    ids = torch.full((batch, length), model.config.image_token_id, device=model.device)
    ids[:, -SUFFIX:] = torch.randint(0, 1000, (SUFFIX,), device=model.device)
    return ids


def filled_cache(model, batch: int, length: int, share: float, room: int) -> Cache:
    """A cache as after a prompt of ``length`` of which every layer kept ``share``, filled with random numbers."""
    config = model.config.get_text_config()
    kept = round(share * length)
    dim = config.hidden_size // config.num_attention_heads
    cache = pruned_cache(config.num_hidden_layers)
    for layer in cache.layers:
        entries = batch * (kept + room)
        key, value = (
            torch.randn(entries, config.num_key_value_heads, dim, device=model.device, dtype=model.dtype)
            for _ in range(2)
        )
        start = torch.arange(batch, device=model.device) * (kept + room)
        lengths = torch.full((batch,), kept, dtype=torch.int32, device=model.device)
        slots = torch.full((entries,), -1, dtype=torch.int32, device=model.device)
        layer.ragged = RaggedCache(key, value, slots, start, lengths, [kept + room] * batch, [kept] * batch)
        layer.seen, layer.is_initialized, layer.keys, layer.values = length, True, key[:0], value[:0]
    return cache


def decode_seconds(model, batch: int, length: int, share: float, cuda_graph: bool, repetitions: int) -> list[float]:
    """Seconds of one decode step of the whole model over a cache of ``share`` of ``length`` tokens; raw samples."""
    ids = image_prompt(model, batch, length)
    layout = PromptLayout.from_tokens(ids, None, (model.config.image_token_id,))
    context = SparseContext(SparsityParams(), layout, torch.ones(batch))
    suppressed = torch.tensor([], dtype=torch.long, device=model.device)
    cache = filled_cache(model, batch, length, share, room=LONG)
    fresh = [(layer.ragged.length.clone(), layer.ragged.lengths[:]) for layer in cache.layers]
    logits = torch.randn(batch, model.config.get_text_config().vocab_size, device=model.device, dtype=model.dtype)
    position = torch.full((batch,), length, device=model.device)

    def run(tokens: int) -> float:
        for layer, (lengths, on_host) in zip(cache.layers, fresh, strict=True):
            rewind(layer, lengths, on_host, length)
        _synchronise()
        started = time.perf_counter()
        decode(model, cache, logits, position, 3, context, Sampling(0.0, tokens, (), 0, suppressed), None, cuda_graph)
        _synchronise()
        return time.perf_counter() - started

    with decoder_attention(model):
        run(SHORT)
        return [(run(LONG) - run(SHORT)) / (LONG - SHORT) for _ in range(repetitions)]


def rewind(layer: PrunedLayer, lengths: torch.Tensor, on_host: list[int], seen: int) -> None:
    """Forgets what was appended to a pruned layer."""
    cache = layer.ragged
    cache.length.copy_(lengths)
    layer.ragged = RaggedCache(
        cache.key, cache.value, cache.slots, cache.start, cache.length, cache.capacity, on_host[:], cache.impl
    )
    layer.seen = seen


def equal_batch_case(model, name: str, batch: int, length: int, share: float, repetitions: int) -> Case:
    """Decode steps per second over a pruned and over a whole cache, same batch, same loop, CUDA graphs in both."""
    graph = model.device.type == "cuda"
    checked = _check_loop(model, graph)
    seconds = {
        arm: decode_seconds(model, batch, length, kept, graph, repetitions)
        for arm, kept in (("dense", 1.0), ("sparse", share))
    }
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cached = 2 * batch * length * _bytes_per_entry(model)
    limit = (weights + cached) / (weights + share * cached)
    setting = {"model": name, "batch": batch, "length": length, "token_ratio": share, "cuda_graph": graph}
    notes = {"cache_bytes_dense": cached, "weight_bytes": weights, "bandwidth_limit_of_speedup": limit}
    title = f"{name} decode step, batch {batch}, {length} tokens"
    return Case(title, setting, "sparse", "dense", seconds, checked, notes)


def equal_memory_case(model, name: str, length: int, share: float, cache_bytes: int, repetitions: int) -> Case:
    """Seconds per generated token when dense and pruned caches fill the same memory: four times the rows fit."""
    graph = model.device.type == "cuda"
    checked = _check_loop(model, graph)
    row = 2 * length * _bytes_per_entry(model)
    batches = {"dense": cache_bytes // row, "sparse": int(cache_bytes // (share * row))}
    if batches["dense"] < 1:
        raise BenchError(f"{cache_bytes / 2**30:.0f} GiB hold no row of {length} tokens; give more cache_bytes")
    seconds = {}
    for arm, batch in batches.items():
        steps = decode_seconds(model, batch, length, share if arm == "sparse" else 1.0, graph, repetitions)
        seconds[arm] = [step / batch for step in steps]
    setting = {"model": name, "length": length, "token_ratio": share, "cache_bytes": cache_bytes, "batch": batches}
    title = f"{name} throughput at equal memory, {length} tokens"
    return Case(title, setting | {"cuda_graph": graph}, "sparse", "dense", seconds, checked)


@torch.no_grad()
def prefill_case(model, name: str, length: int, share: float, settings: SparsityParams, repetitions: int) -> Case:
    """The prefill of one prompt with selection and compaction, against transformers' own dense prefill (SDPA)."""
    ids = image_prompt(model, 1, length)
    layout = PromptLayout.from_tokens(ids, None, (model.config.image_token_id,))
    positions = torch.arange(length, device=model.device).expand(3, 1, -1)
    call = {"input_ids": ids, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}

    def dense() -> torch.Tensor:
        return model(**call, past_key_values=DynamicCache()).logits

    def sparse(p: float = share) -> torch.Tensor:
        cache = pruned_cache(model.config.get_text_config().num_hidden_layers)
        context = SparseContext(settings, layout, torch.tensor([p]), cache)
        with decoder_attention(model):
            logits = model(**call, past_key_values=cache, sparse=context).logits
        context.check()
        return logits

    agrees = (sparse(1.0).argmax(-1) == dense().argmax(-1)).cpu()
    checked = require_equal(agrees, torch.ones_like(agrees), "the most likely token at p = 1 and densely")
    seconds = time_arms({"dense": dense, "sparse": sparse}, repetitions)
    setting = {"model": name, "batch": 1, "length": length, "p": share, **settings.model_dump(mode="json")}
    kind = f"{settings.prefill} prefill, {settings.scoring_rows} rows"
    return Case(f"{name} {kind}, {length} tokens", setting, "sparse", "dense", seconds, checked)


def _check_loop(model, graph: bool) -> dict:
    """The captured loop gives the tokens of the plain one."""
    from sparsity_forcing.generation.api import sparse_generate

    inputs = {"input_ids": image_prompt(model, 2, 3 * SUFFIX)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found = [sparse_generate(model, inputs, 0.5, max_new_tokens=20, cuda_graph=on).tokens for on in {False, graph}]
    return require_equal(found[-1], found[0], "tokens of the captured loop and of the plain one")


def _bytes_per_entry(model) -> int:
    """Bytes of one token's key (or value) in all layers."""
    config = model.config.get_text_config()
    dim = config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_key_value_heads * dim * model.dtype.itemsize


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
