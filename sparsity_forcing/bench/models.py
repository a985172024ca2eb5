"""Whole models on a GPU: random-weight Qwen2.5-VL built from its configuration, decode steps and prefill."""

from __future__ import annotations

import torch
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.attention.cache import pruned_cache
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.attention.stats import layer_ratios
from sparsity_forcing.bench.compare import BenchError, Case, fastest, require_close, time_arms
from sparsity_forcing.bench.steps import GENERATE, NEW_TOKENS, TOLERANCE, heads, make_pool, step_arms
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

# The published configurations of Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct, text part.
SIZES = {
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420}
SUFFIX = 64  # text tokens after the image


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


@torch.no_grad()
def equal_batch_case(
    model, name: str, batch: int, length: int, share: float, repetitions: int, generate: bool = True
) -> Case:
    """One decode step over a pruned and over whole caches, same batch, CUDA graphs in all arms but `model.generate`.

    ``generate``: time that too; it needs memory for a second dense cache.
    """
    pool = make_pool(model, batch * (length + 1))
    arms, checked = step_arms(model, pool, batch, batch, length, round(share * length), generate)
    seconds = _per_token(time_arms(arms, repetitions), {})
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cached = 2 * batch * length * _bytes_per_entry(model)
    limit = (weights + cached) / (weights + share * cached)
    setting = {"model": name, "batch": batch, "length": length, "token_ratio": share}
    notes = {"cache_bytes_dense": cached, "weight_bytes": weights, "bandwidth_limit_of_speedup": limit}
    if not generate:
        notes["left_out"] = f"{GENERATE}: its second copy of the cache does not fit"
    title = f"{name} decode step, batch {batch}, {length} tokens"
    return Case(title, setting | _how(model), "sparse", fastest(seconds, "sparse"), seconds, checked, notes)


@torch.no_grad()
def equal_memory_case(model, name: str, length: int, share: float, cache_bytes: int, repetitions: int) -> Case:
    """Seconds per generated token when dense and pruned caches fill the same memory: four times the rows fit.

    `model.generate` takes as much again for its copy.
    """
    entries, kept = cache_bytes // (2 * _bytes_per_entry(model)), round(share * length)
    batch, sparse_batch = entries // (length + 1), entries // (kept + 1)
    if batch < 1:
        raise BenchError(f"{cache_bytes / 2**30:.0f} GiB hold no row of {length} tokens; give more cache_bytes")
    pool = make_pool(model, entries)
    arms, checked = step_arms(model, pool, batch, sparse_batch, length, kept, generate=True)
    batches = {arm: sparse_batch if arm == "sparse" else batch for arm in arms}
    seconds = _per_token(time_arms(arms, repetitions), batches)
    setting = {"model": name, "length": length, "token_ratio": share, "cache_bytes": cache_bytes, "batch": batches}
    title = f"{name} throughput at equal memory, {length} tokens"
    return Case(title, setting | _how(model), "sparse", fastest(seconds, "sparse"), seconds, checked)


@torch.no_grad()
def prefill_case(model, name: str, length: int, share: float, settings: SparsityParams, repetitions: int) -> Case:
    """The prefill of one prompt with selection and compaction, against transformers' own dense prefill (SDPA)."""
    ids = image_prompt(model, 1, length)
    layout = PromptLayout.from_tokens(ids, None, (model.config.image_token_id,))
    positions = torch.arange(length, device=model.device).expand(3, 1, -1)
    call = {"input_ids": ids, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}

    def dense() -> torch.Tensor:
        return model(**call, past_key_values=DynamicCache()).logits

    def sparse(p: float = share) -> tuple[torch.Tensor, SparseContext]:
        cache = pruned_cache(model.config.get_text_config().num_hidden_layers)
        context = SparseContext(settings, layout, torch.tensor([p]), cache)
        with decoder_attention(model):
            logits = model(**call, past_key_values=cache, sparse=context).logits
        context.check()
        return logits, context

    what = "logits of the last token at p = 1 and densely"
    checked = [require_close(sparse(1.0)[0], dense(), TOLERANCE[model.dtype], what)]
    ratios = layer_ratios(sparse()[1].kept, layout.valid)
    seconds = time_arms({"dense": dense, "sparse": sparse}, repetitions)
    setting = {"model": name, "batch": 1, "length": length, **settings.model_dump(mode="json"), "p": share}
    notes = {"token_ratio": float(ratios.mean()), "token_ratio_of_layers": ratios[:, 0].tolist()}
    title = f"{name} {settings.prefill} prefill, {settings.scoring_rows} rows, {length} tokens"
    return Case(title, setting, "sparse", "dense", seconds, checked, notes)


def _per_token(seconds: dict[str, list[float]], batches: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of a call as those of a step (no ``batches``) or of a single token of one row."""
    return {arm: [sample / NEW_TOKENS / batches.get(arm, 1) for sample in samples] for arm, samples in seconds.items()}


def _bytes_per_entry(model) -> int:
    """Bytes of one token's key (or value) in all layers."""
    kv_heads, dim = heads(model)
    return model.config.get_text_config().num_hidden_layers * kv_heads * dim * model.dtype.itemsize


def _how(model) -> dict:
    return {"steps_a_sample": NEW_TOKENS, "cuda_graph": model.device.type == "cuda"}
