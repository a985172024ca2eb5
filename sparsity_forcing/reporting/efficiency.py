"""Decode time and cache bytes, dense against sparse, side by side in one process.

Every arm runs the real ``generate`` on the same inputs. A repetition runs all arms, in an order that rotates, so that
a slow moment of the machine hits them alike; ratios are taken within a repetition, then summarised by median and
quartiles. End-of-answer is held back so that every arm decodes the same number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sparsity_forcing.attention.cache import PrunedLayer
from sparsity_forcing.methods import Method
from sparsity_forcing.models.families import visual_token_ids

if TYPE_CHECKING:
    from sparsity_forcing.attention.stats import SparseStats


@dataclass(frozen=True)
class Arm:
    """What is timed: ``model`` run by ``method``."""

    name: str
    model: torch.nn.Module
    method: Method


@dataclass(frozen=True)
class Sample:
    """One ``generate`` call. Times in seconds: ``prefill`` to the first token's logits, ``steps`` per token after.
    ``visual_token_ratio`` is None where no prompt has a visual token."""

    prefill: float
    steps: np.ndarray
    cache_bytes: int
    token_ratio: float
    visual_token_ratio: float | None


class StepClock(LogitsProcessor):
    """Notes the time whenever logits are ready; ``synchronise`` waits for the device first."""

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self.synchronise = synchronise
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.synchronise()
        self.times.append(time.perf_counter())
        return scores


def run_once(arm: Arm, inputs: dict, new_tokens: int) -> Sample:
    """One timed ``generate`` of ``new_tokens`` tokens for every row of ``inputs``."""
    device = next(arm.model.parameters()).device
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = StepClock(synchronise)
    with arm.method.attend(arm.model) as stats, torch.inference_mode():
        synchronise()
        start = time.perf_counter()
        output = arm.model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
            return_dict_in_generate=True,
        )
    marks = np.asarray(clock.times)
    visual_ids = torch.tensor(visual_token_ids(arm.model.config), device=device)
    has_visual = bool(torch.isin(inputs["input_ids"], visual_ids).any())
    return Sample(
        prefill=float(marks[0] - start),
        steps=np.diff(marks),
        cache_bytes=cache_bytes(output.past_key_values),
        token_ratio=1.0 if stats is None else float(stats.token_ratio.mean()),
        visual_token_ratio=_visual_ratio(stats) if has_visual else None,
    )


def _visual_ratio(stats: SparseStats | None) -> float:
    """Mean over the prompts that have visual tokens; everything is kept where there are no statistics."""
    return 1.0 if stats is None else float(stats.visual_token_ratio.nanmean())


def cache_bytes(cache) -> int:
    """Bytes of all keys and values that a transformers cache holds."""
    return sum(
        layer.nbytes if isinstance(layer, PrunedLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


def measure(arms: Sequence[Arm], inputs: dict, new_tokens: int, repetitions: int) -> dict[str, list[Sample]]:
    """Samples of every arm, one per repetition, after one untimed round."""
    if new_tokens < 2:
        raise ValueError(f"decode time needs at least 2 new tokens, got {new_tokens}")
    for arm in arms:
        run_once(arm, inputs, new_tokens=2)
    samples: dict[str, list[Sample]] = {arm.name: [] for arm in arms}
    for repetition in range(repetitions):
        turn = repetition % len(arms)
        for arm in (*arms[turn:], *arms[:turn]):
            samples[arm.name].append(run_once(arm, inputs, new_tokens))
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def summarise(samples: dict[str, list[Sample]], baseline: str) -> dict[str, dict]:
    """Per arm: times in milliseconds, cache bytes, and ratios to ``baseline`` taken within each repetition."""
    decode = {name: [1e3 * float(np.median(s.steps)) for s in runs] for name, runs in samples.items()}
    prefill = {name: [1e3 * s.prefill for s in runs] for name, runs in samples.items()}
    dense_bytes = samples[baseline][0].cache_bytes
    return {
        name: {
            "decode_ms_per_token": spread(decode[name]),
            "decode_ratio": spread([a / b for a, b in zip(decode[name], decode[baseline], strict=True)]),
            "prefill_ms": spread(prefill[name]),
            "prefill_ratio": spread([a / b for a, b in zip(prefill[name], prefill[baseline], strict=True)]),
            "cache_bytes": runs[0].cache_bytes,
            "cache_ratio": runs[0].cache_bytes / dense_bytes,
            "token_ratio": runs[0].token_ratio,
            "visual_token_ratio": runs[0].visual_token_ratio,
        }
        for name, runs in samples.items()
    }
