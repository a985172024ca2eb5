"""What the GPU set measures, and the figures it is quoted by."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sparsity_forcing.bench.compare import Case
from sparsity_forcing.bench.models import SIZES, equal_batch_case, equal_memory_case, prefill_case, random_qwen
from sparsity_forcing.bench.operations import decode_case, mass_case, selection_case
from sparsity_forcing.params import SparsityParams

SHARE = 0.25
BATCHES, LENGTHS = (1, 8, 32, 64), (4096, 16384, 32768)


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
                if 1.3 * row * length * batch + weights < 0.9 * free:
                    cases[f"step_{name}_{length // 1024}k_b{batch}"] = functools.partial(
                        _with_model, equal_batch_case, name, batch, length, SHARE, 5
                    )
        cases[f"memory_{name}_16k"] = functools.partial(
            _with_model, equal_memory_case, name, 16384, SHARE, int(0.7 * (0.9 * free - weights)), 5
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
            seconds = sorted(found[f"mass_16k_{rows}"].seconds["mass"])
            dense = sorted(prefill.seconds["dense"])
            share = 28 * seconds[len(seconds) // 2] / dense[len(dense) // 2]
            summary[f"mass_16k_{rows}_share_of_prefill"] = share
    seconds = sorted(found["selection_16k"].seconds["together"])
    summary["selection_16k_microseconds"] = 1e6 * seconds[len(seconds) // 2]
    return summary


@functools.lru_cache(maxsize=1)  # one model at a time is in memory
def _model(name: str):
    return random_qwen(SIZES[name], "cuda", torch.bfloat16)


def _with_model(measure: Callable[..., Case], name: str, *arguments) -> Case:
    return measure(_model(name), name, *arguments)
