"""The README's results come from the metrics."""

from __future__ import annotations

import pytest
from report_workspace import benchmark_row

from sparsity_forcing.evaluation.table import BenchmarkTable
from sparsity_forcing.reporting.readme import ReadmeError, results, speed, with_block

TABLE = BenchmarkTable(
    rows=(benchmark_row("base", "Full", 1.0, 0.93, 1.0), benchmark_row("policy", "top-p", 0.975, 0.92, 0.31))
)
REPORT = {
    "headline": {
        "p": 0.975,
        "visual_token_ratio": 0.31,
        "visual_token_ratio_before": 0.96,
        "accuracy": 0.92,
        "dense_accuracy": 0.93,
        "questions": 200,
    },
    "efficiency": {
        name: {
            "visual_tokens": tokens,
            "batch": 4,
            "arms": {
                "policy, sparse": {
                    "decode_ratio": {"low": 1.1, "median": 1.25, "high": 1.5},
                    "cache_ratio": 0.54,
                    "prefill_ratio": {"median": 1.8},
                }
            },
        }
        for name, tokens in (("visual_tokens_1024", 1024), ("visual_tokens_64", 64))
    },
}
TRAIN = {"steps": 10, "rollouts": 640, "seconds": 65.0, "replay_max_difference": 1e-6}


def test_every_row_is_a_line_with_its_numbers():
    block = results(TABLE, REPORT, TRAIN)
    assert "| base | dense | – | 93.0% (91.0–95.0) | 100.0% | 100.0% |" in block
    assert "| policy | top-p | 0.975 | 92.0% (90.0–94.0) | 31.0% | 31.0% |" in block
    assert "10 steps of 64 rollouts in 1 min 5 s" in block
    base, policy = "the base with dense (100.0% kept", "the policy with top-p at p = 0.975 (31.0% kept"
    assert "takes at 64 visual tokens 1.25 times the dense one's time (quartiles 1.10–1.50) and 54% of its" in block
    assert "of its cache, the first token 1.80 times; at 1,024 visual tokens" in block
    assert "the first token 1.80 times. Prompts at a time: 4. A layer's cache is as wide as that" in block
    assert f"the sparsest are {base}, 93.0% right) and {policy}, 92.0% right)" in block


def test_every_case_is_a_line_and_what_was_not_measured_says_so():
    case = {
        "name": "decode attention",
        "setting": {"token_ratio": 0.25, "dtype": "float32", "device": "cpu"},
        "baseline": "dense",
        "speedups": {"loop": {"median": 9.0, "range": [8.0, 10.0]}, "dense": {"median": 3.456, "range": [3.0, 4.0]}},
    }
    manifest = {"hardware": "a machine", "versions": {"torch": "2.0"}}
    block = speed({"cases": {"decode": case}, "manifest": manifest}, None)
    assert "| decode attention | token ratio 0.25, dtype float32 | dense | 3.46 × (3.00–4.00) |" in block
    assert "| 〃 | 〃 | loop | 9.00 × (8.00–10.00) |" in block
    assert "| everything on a GPU | – | – | not measured; `make bench-gpu` measures it |" in block
    assert block.endswith("`make bench-cpu` ran on a machine, torch 2.0.")
    trl = {"cases": {}, "manifest": {"hardware": "a machine", "versions": {"torch": "2.0", "trl": "1.0"}}}
    other = {"cases": {}, "manifest": {"hardware": "a GPU", "versions": {"torch": "2.0"}}}
    block = speed({"cases": {"decode": case}, "manifest": manifest}, other, trl)
    lines = [
        "`make bench-cpu` ran on a machine, torch 2.0.",
        "`make bench-gpu` ran on a GPU, torch 2.0.",
        "`make bench-trl` ran on a machine, torch 2.0, trl 1.0.",
    ]
    assert block.splitlines()[-3:] == lines
    peak = {"ours": 0.97e9, "TRL, 64 completions a pass": 2.0e9}
    training = case | {"notes": {"peak_memory_bytes": peak}}
    block = speed(None, None, trl | {"cases": {"training": training}})
    assert block.endswith("Peak memory of a training process: ours 0.97 GB; TRL, 64 completions a pass 2.00 GB.")


def test_only_what_is_between_the_markers_changes():
    readme = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    assert with_block(readme, "results", "new") == readme.replace("old", "new")
    with pytest.raises(ReadmeError, match=r"README\.md needs the lines"):
        with_block("no markers", "results", "new")
