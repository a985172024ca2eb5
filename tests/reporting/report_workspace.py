"""What a workspace looks like before the report: made-up metrics and results, real rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from sparsity_forcing.data.digits import load_scans, render
from sparsity_forcing.data.schema import Row, write_rows
from sparsity_forcing.evaluation.samples import write_samples
from sparsity_forcing.evaluation.table import BenchmarkRow, benchmark_table
from sparsity_forcing.reporting.content import BASE_ARM, DENSE_ARM, POLICY_ARM, Measured
from sparsity_forcing.reporting.kept import Kept, KeptRow, kept_by_kind

LAYERS = 2
RATIOS = {"base": 0.92, "policy": 0.3}
PROFILE_POINT = {"p": 0.5, "n": 12, "token_ratio": 0.6, "visual_token_ratio": 0.5}
PROFILE_POINT |= {"accuracy": 0.9, "accuracy_low": 0.7, "accuracy_high": 0.95}
ACCURACY = {"base": 0.9, "policy": 0.8}


def benchmark_row(checkpoint: str, method: str, p: float, accuracy: float, ratio: float) -> BenchmarkRow:
    """A line of the comparison, over all benchmarks; its interval is two points wide to either side."""
    return BenchmarkRow(
        method=method,
        checkpoint=checkpoint,
        p=p,
        benchmark="average",
        n=200,
        accuracy=accuracy,
        accuracy_low=accuracy - 0.02,
        accuracy_high=accuracy + 0.02,
        token_ratio=ratio,
        visual_token_ratio=ratio,
    )


def digit_rows(count: int) -> list[Row]:
    """Rows as the digits source makes them."""
    rows, scans = [], load_scans("test")
    for number in range(count):
        task = ("read", "count", "sum")[number % 3]
        canvas = render(np.random.default_rng(number), scans, 6, task)
        meta = {
            "grid": 6,
            "relevant_cells": list(canvas.relevant_cells),
            "coloured_cells": list(canvas.coloured_cells),
        }
        rows.append(Row(f"test-{number}", "test", task, canvas.question, canvas.answer, [canvas.png()], meta=meta))
    return rows


def sample_records(rows: list[Row]) -> list[dict]:
    """Made-up results in the evaluation's own schema: right answers in the given shares, known ratios."""
    records = []
    for checkpoint in RATIOS:
        for method, p in (("Full", 1.0), ("top-p", 0.94), ("top-p", 0.975)):
            ratio = 1.0 if method == "Full" else RATIOS[checkpoint] * p
            for number, row in enumerate(rows):
                right = number < round(ACCURACY[checkpoint] * len(rows))
                records.append(
                    {
                        "method": method,
                        "checkpoint": checkpoint,
                        "p": p,
                        "benchmark": row.label,
                        "id": row.id,
                        "task": row.task,
                        "question": row.question,
                        "answer": row.answer,
                        "prediction": row.answer if right else "",
                        "score": float(right),
                        "prompt_tokens": 60,
                        "visual_tokens": 36,
                        "new_tokens": 2,
                        "token_ratio": 0.4 + 0.6 * ratio,
                        "visual_token_ratio": ratio,
                        "layer_ratio": [0.4 + 0.6 * ratio] * LAYERS,
                        "layer_visual_ratio": [*[ratio] * (LAYERS - 1), ratio - 0.01],
                    }
                )
    return records


def write_metrics(root: Path, rows: list[Row]) -> None:
    """Everything the report reads but models."""
    write_rows(rows, root / "data/prepared/test.parquet")
    records = sample_records(rows)
    (root / "evaluation").mkdir()
    write_samples(records, root / "evaluation/samples.parquet")
    table = benchmark_table(pd.DataFrame(records))
    _write_json(root / "metrics/evaluate.json", table.model_dump(mode="json"))
    point = {"accuracy": 0.9, "token_ratio": 0.95, "visual_token_ratio": 0.94}
    _write_json(
        root / "metrics/train.json",
        {
            "steps": 40,
            "rollouts": 2560,
            "seconds": 372.0,
            "prompt_tokens": 184320,
            "new_tokens": 12800,
            "start": point,
            "end": {**point, "visual_token_ratio": 0.312},
            "seed": 0,
            "skipped_steps": 0,
            "replay_max_difference": 2.4e-7,
            "device": "cpu",
        },
    )
    _write_json(root / "metrics/base.json", {"accuracy": 0.93, "n": 300, "seconds": 581.0, "parameters": 231000})
    _write_json(root / "metrics/prepare.json", {"rows": {"test": {"total": len(rows)}}})
    _write_json(root / "metrics/profile.json", profile_metrics())
    steps = np.arange(1, 41)
    rng = np.random.default_rng(0)
    curve = pd.DataFrame(
        {
            "step": steps,
            "accuracy": np.clip(0.9 + 0.05 * rng.standard_normal(40), 0, 1),
            "token_ratio": 0.95 - 0.01 * steps,
            "visual_token_ratio": 0.94 - 0.0155 * steps + 0.02 * rng.standard_normal(40),
            "validation_accuracy": np.where(steps % 10 == 0, 0.91, np.nan),
            "validation_visual_token_ratio": np.where(steps % 10 == 0, 0.94 - 0.0155 * steps, np.nan),
        }
    )
    (root / "plots").mkdir()
    curve.to_csv(root / "plots/train.csv", index=False)


def profile_metrics() -> dict:
    """As the profile stage writes it."""
    points = [PROFILE_POINT | {"p": p, "visual_token_ratio": p / 1.1, "token_ratio": p / 1.05} for p in (0.5, 0.8, 1.0)]
    layers = [
        {"p": point["p"], "layer": layer, "n": 12, "visual_token_ratio": 0.9 * point["p"]}
        for point in points
        for layer in range(LAYERS)
    ]
    return {
        "setting": {
            "rule": "top_p",
            "scoring_rows": "text",
            "prefill": "suffix",
            "length": "6x6",
            "split": "validation",
        },
        "by_budget": points,
        "by_layer": layers,
        "by_length": [point | {"length": length} for length in ("4x4", "6x6") for point in points],
        "by_scoring_rows": [point | {"scoring_rows": rows} for rows in ("text", "all") for point in points],
    }


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def made_up_measurements(rows: list[Row]) -> Measured:
    """What the report would measure itself, with numbers that are easy to find again."""
    kept = {}
    for name, every in (("base", 1), ("policy", 4)):
        cells = np.zeros((LAYERS, 6, 6), dtype=bool)
        cells.reshape(LAYERS, -1)[:, ::every] = True
        items = [KeptRow(row, f"{name} says {row.answer}", 36, float(cells.mean()), cells) for row in rows[:3]]
        kept[name] = Kept(items, kept_by_kind(items))
    lengths = []
    for visual_tokens in (144, 576):
        arms = {}
        for name, decode, cache in ((DENSE_ARM, 1.0, 1.0), (BASE_ARM, 1.21, 0.93), (POLICY_ARM, 0.83, 0.47)):
            arms[name] = {
                "decode_ms_per_token": {"median": 9 * decode, "low": 8.9 * decode, "high": 9.2 * decode},
                "decode_ratio": {"median": decode, "low": decode - 0.01, "high": decode + 0.02},
                "prefill_ms": {"median": 40.0, "low": 39.0, "high": 42.0},
                "prefill_ratio": {"median": 1.37, "low": 1.3, "high": 1.4},
                "cache_bytes": round(684032 * cache),
                "cache_ratio": cache,
                "token_ratio": cache,
                "visual_token_ratio": cache,
            }
        shape = {"visual_tokens": visual_tokens, "prompt_tokens": visual_tokens + 16, "batch": 4}
        lengths.append({**shape, "new_tokens": 32, "repetitions": 5, "arms": arms})
    return Measured("Test processor, 2 cores", kept, lengths)
