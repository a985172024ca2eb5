"""What the GPU set measures, and the figures it is quoted by."""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable

import torch

from sparsity_forcing.bench.compare import Case
from sparsity_forcing.bench.models import SIZES, equal_batch_case, equal_memory_case, prefill_case, random_qwen
from sparsity_forcing.bench.operations import decode_case, mass_case, selection_case
from sparsity_forcing.params import SparsityParams

SHARE = 0.25
BATCHES, LENGTHS = (1, 8, 32, 64), (4096, 16384, 32768)
GENERATE_COPIES = 2.3  # of the cache in memory at once while `model.generate` runs: ours, its own, a layer being copied


def gpu_cases(repetitions: int) -> dict[str, Callable[[], Case]]:
    """Every case that fits into this device's memory, by key."""
    bf16, free = torch.bfloat16, torch.cuda.mem_get_info()[0]
    cases: dict[str, Callable[[], Case]] = {}
    for length in (16384, 32768):
        for batch in (8, 64):
            if 2 * batch * length * 4 * 128 * 2 < 0.5 * free:
                cases[f"decode_{length // 1024}k_b{batch}"] = functools.partial(
                    decode_case, length, batch, SHARE, "cuda", bf16, repetitions
                )
    cases["mass_16k_all"] = lambda: mass_case(16384, 16384, "cuda", bf16, repetitions)
    cases["mass_16k_probe"] = lambda: mass_case(16384, 128, "cuda", bf16, repetitions)
    cases["selection_16k"] = lambda: selection_case(16384, 8, "cuda", repetitions)
    for name, sizes in SIZES.items():
        row = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * 128 * 2
        weights = 17e9 if name == "7B" else 8e9
        for length in LENGTHS:
            for batch in BATCHES:
                cached, room = row * length * batch, 0.9 * free - weights
                if 1.2 * cached < room:
                    cases[f"step_{name}_{length // 1024}k_b{batch}"] = functools.partial(
                        _with_model, equal_batch_case, name, batch, length, SHARE, 5, GENERATE_COPIES * cached < room
                    )
        cases[f"memory_{name}_16k"] = functools.partial(
            _with_model, equal_memory_case, name, 16384, SHARE, int((0.9 * free - weights) / GENERATE_COPIES), 5
        )
        for length in (16384, 32768):
            for settings in (
                SparsityParams(),
                SparsityParams(prefill="sparse", scoring_rows="probe"),
                SparsityParams(scoring_rows="all"),
            ):
                key = f"prefill_{name}_{length // 1024}k_{settings.prefill}_{settings.scoring_rows}"
                cases[key] = functools.partial(_with_model, prefill_case, name, length, SHARE, settings, 5)
    return cases


def gpu_summary(found: dict[str, Case]) -> dict[str, float]:
    """Speed-ups of every case, and the mass pass as a share of the 7B model's dense prefill."""
    summary = {f"{key}_speedup": case.speedup for key, case in found.items()}
    prefill = found.get("prefill_7B_16k_suffix_text")
    if prefill is not None:
        for rows in ("all", "probe"):
            mass = statistics.median(found[f"mass_16k_{rows}"].seconds["mass"])
            layers = SIZES["7B"]["num_hidden_layers"]
            summary[f"mass_16k_{rows}_share_of_prefill"] = layers * mass / statistics.median(prefill.seconds["dense"])
    selection = statistics.median(found["selection_16k"].seconds["together"])
    summary["selection_16k_microseconds"] = 1e6 * selection
    return summary


def _with_model(measure: Callable[..., Case], name: str, *arguments) -> Case:
    return measure(_model(name), name, *arguments)


_held: dict[str, torch.nn.Module] = {}


def _model(name: str, device: str = "cuda") -> torch.nn.Module:
    """One model at a time is in memory: the last one goes before the next is made."""
    if name not in _held:
        _held.clear()
        gc.collect()
        torch.cuda.empty_cache()
        _held[name] = random_qwen(SIZES[name], device, torch.bfloat16)
    return _held[name]
