"""The operations alone: decode attention over a pruned cache, the exact mass pass, selection."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from sparsity_kernels import (
    RaggedCache,
    attention_mass,
    causal_attention,
    compact,
    keep_highest,
    ragged_attention,
    top_p_count,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsity_forcing.bench.compare import Case, captured, fastest, require_close, require_equal, time_arms

HEADS, KV_HEADS, DIM = 28, 4, 128  # of Qwen2.5-VL-7B
COLD_BYTES = 2**28  # several times the last-level cache of a processor (some 32 MiB) and of a GPU (50 MiB)
FEWEST_CALLS = 8  # of a sample of decode attention


def decode_case(length: int, batch: int, share: float, device: str, dtype: torch.dtype, repetitions: int) -> Case:
    """One decode step's attention over a cache pruned to ``share``, against dense attention over the whole cache.

    Every arm takes caches in turn, of at least ``COLD_BYTES`` together, as a model's layers are taken in turn: no cache
    of the machine still holds one when its turn comes. A sample is the mean of a round, on a GPU a captured one. The
    baseline is the faster of torch's two forms: grouped-query, and the query heads of a group folded into rows.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    query, scale, kept_length = draw(batch, HEADS, 1, DIM), DIM**-0.5, round(share * length)
    kept = keep_highest(
        torch.rand(batch, length, generator=generator, device=device),
        torch.ones(batch, length, dtype=torch.bool, device=device),
        torch.full((batch,), kept_length, device=device),
    )
    bytes_dense, bytes_read = (2 * batch * n * KV_HEADS * DIM * dtype.itemsize for n in (length, kept_length))
    dense_caches, caches = [], []
    while len(caches) * bytes_read < COLD_BYTES:
        entries = [draw(batch, KV_HEADS, length, DIM) for _ in range(2)]
        caches.append(compact(*entries, kept, room=1))
        if len(dense_caches) * bytes_dense < COLD_BYTES:
            dense_caches.append(entries)

    def sparse(cache: RaggedCache) -> Tensor:
        return ragged_attention(
            query, cache.key, cache.value, cache.start, cache.length, scale, rectangular=cache.rectangular
        )

    def dense_grouped(entries: list[Tensor]) -> Tensor:
        return scaled_dot_product_attention(query, *entries, scale=scale, enable_gqa=True)

    def dense_folded(entries: list[Tensor]) -> Tensor:
        folded = query.view(batch, KV_HEADS, HEADS // KV_HEADS, DIM)
        return scaled_dot_product_attention(folded, *entries, scale=scale).view(batch, HEADS, 1, DIM)

    key, value = (memory.double() for memory in dense_caches[0])
    masked = (query.double().view(batch, KV_HEADS, -1, DIM) @ key.transpose(-1, -2) * scale).masked_fill(
        ~kept[:, None, None], -torch.inf
    )
    expected = (masked.softmax(-1) @ value).view(batch, HEADS, 1, DIM)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    forms = dense_grouped(dense_caches[0]), dense_folded(dense_caches[0])
    checked = [
        require_close(sparse(caches[0]), expected, tolerance, "attention among the kept keys, against float64"),
        require_close(*forms, tolerance, "the two forms of the dense baseline"),
    ]
    del key, value, masked
    calls = max(len(caches), FEWEST_CALLS)
    arms = {
        "sparse": _round(sparse, caches, calls, device),
        "dense grouped-query": _round(dense_grouped, dense_caches, calls, device),
        "dense folded": _round(dense_folded, dense_caches, calls, device),
    }
    rounds = time_arms(arms, repetitions)
    seconds = {arm: [sample / calls for sample in samples] for arm, samples in rounds.items()}
    setting = {"length": length, "batch": batch, "token_ratio": share, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    setting |= {"caches": len(caches), "dense_caches": len(dense_caches), "calls_a_sample": calls}
    notes = {"bytes_read": bytes_read, "bytes_per_second": bytes_read / statistics.median(seconds["sparse"])}
    name = f"decode attention, {length} tokens, batch {batch}"
    best = fastest(seconds, "sparse")
    return Case(name, setting | _where(device, dtype), "sparse", best, seconds, checked, notes)


def _round(attend: Callable, caches: list, calls: int, device: str) -> Callable[[], Tensor]:
    """``calls`` times attention over the caches in turn."""

    def run() -> Tensor:
        for call in range(calls):
            output = attend(caches[call % len(caches)])
        return output

    return captured(run, device)


def mass_case(length: int, rows: int, device: str, dtype: torch.dtype, repetitions: int) -> Case:
    """The mass pass over the last ``rows`` scoring rows (all: exact) against dense causal attention of the prompt."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda heads: torch.randn(1, heads, length, DIM, generator=generator, device=device, dtype=dtype)  # noqa: E731
    query, key, value = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
    slots = torch.arange(length - rows, length, device=device)[None]
    valid = torch.ones(1, length, dtype=torch.bool, device=device)
    scale = DIM**-0.5
    scored = query[:, :, length - rows :]

    def mass() -> Tensor:
        return attention_mass(scored, key, slots, valid, scale)

    found = mass()
    part = slice(length - min(rows, 64), length)
    expected = _mass_by_hand(query[:, :, part], key, scale)
    last = require_close(
        attention_mass(query[:, :, part], key, slots[:, -min(rows, 64) :], valid, scale),
        expected,
        2e-2 if dtype == torch.bfloat16 else 1e-4,
        "the mass of the last 64 rows, against float64",
    )
    whole = require_close(found.sum()[None], torch.tensor([float(rows)], device=device), 1e-3, "mass, summed: the rows")
    seconds = time_arms({"mass": mass, "dense": lambda: causal_attention(query, key, value, scale)}, repetitions)
    setting = {"length": length, "rows": rows, "batch": 1, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    name = f"attention mass, {length} tokens, {'all' if rows == length else rows} rows"
    return Case(name, setting | _where(device, dtype), "mass", "dense", seconds, [last, whole])


def selection_case(length: int, budgets: int, device: str, repetitions: int) -> Case:
    """Counts and kept sets of several budgets for one mass in one call, against a call for each."""
    generator = torch.Generator(device).manual_seed(0)
    mass = torch.rand(1, length, generator=generator, device=device).pow(8)
    droppable = torch.ones(1, length, dtype=torch.bool, device=device)
    p = torch.linspace(0.94, 0.975, budgets, device=device)[None]

    def together() -> Tensor:
        return keep_highest(mass, droppable, top_p_count(mass, droppable, p))

    def one_by_one() -> Tensor:
        sets = [keep_highest(mass, droppable, top_p_count(mass, droppable, p[:, i])) for i in range(budgets)]
        return torch.stack(sets, dim=1)

    on_cpu = keep_highest(mass.cpu(), droppable.cpu(), top_p_count(mass.cpu(), droppable.cpu(), p.cpu()))
    checked = [
        require_equal(together(), one_by_one(), "kept sets in one call and in a call for each budget"),
        require_equal(together().cpu(), on_cpu, "kept sets on this device and on the CPU"),
    ]
    seconds = time_arms({"together": together, "one by one": one_by_one}, repetitions, inner=5)
    setting = {"length": length, "budgets": budgets, "batch": 1} | _where(device, torch.float32)
    return Case(f"selection, {length} tokens, {budgets} budgets", setting, "together", "one by one", seconds, checked)


def _mass_by_hand(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(1, length) float64 mass of the last rows of a prompt."""
    rows, length = query.shape[2], key.shape[2]
    wide = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    visible = torch.ones(rows, length, dtype=torch.bool, device=key.device).tril(length - rows)
    logits = (query.double() @ wide.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1).mean(1).sum(1)


def _where(device: str, dtype: torch.dtype) -> dict:
    return {"device": device, "dtype": str(dtype).removeprefix("torch.")}
