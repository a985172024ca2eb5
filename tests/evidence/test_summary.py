"""What is said of the experiments is what they found."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_1samp

from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.evidence.summary import quoted
from sparsity_forcing.evidence.tables import (
    GRADIENTS,
    arms_table,
    budgets_table,
    cost_text,
    gradient_table,
    lengths_table,
    paired,
    seeds_text,
    student_interval,
)


def result(name: str, ratio: float, scores: str, **more) -> dict:
    at = lambda value, found: {  # noqa: E731
        "accuracy": found.count("1") / len(found),
        "token_ratio": value,
        "visual_token_ratio": value,
        "questions": len(found),
        "scores": found,
    }
    dense = "1111111110"
    return {
        "name": name,
        "policy_step": 30,
        "within_guard": True,
        "curve": [{"step": 40, "accuracy": 0.5, "visual_token_ratio": 0.125, "token_ratio": 0.2}],
        "test": {"0.975": at(ratio, scores), "1.0": at(1.0, dense)},
        **more,
    }


RESULTS = {
    "base": result("base", 0.96, "1111111110"),
    "default": result("default", 0.31, "1111111100"),
    "literal": result("literal", 0.95, "0111111111", within_guard=False),
}


def test_the_quoted_figures_are_those_of_the_results():
    assert quoted(RESULTS, "0.975") == {
        "literal_tau_start": 0.96,
        "literal_tau_end": 0.95,
        "tau_start": 0.96,
        "tau_end": 0.31,
        "accuracy_dense": 0.9,
        "accuracy_end": 0.8,
    }
    assert quoted({"base": RESULTS["base"]}, "0.975")["tau_end"] is None


def test_the_table_has_every_experiment_and_says_what_has_not_run():
    lines = arms_table(RESULTS, "0.975").splitlines()
    of = {name: next(line for line in lines if line.startswith(f"| `{name}`")) for name in ARMS}
    assert "31.0% | 80.0% | −10.0 (" in of["default"]
    assert of["default"].endswith("| 30 | 12.5%, 50.0% |")
    assert "95.0% | 90.0% | ±0.0 (" in of["literal"]
    assert "| 30, none was within the guard |" in of["literal"]
    assert "not measured" in of["shuffled"]
    assert all(line.count("|") == 7 for line in lines if line.startswith("|"))
    assert arms_table({name: found for name, found in RESULTS.items() if name != "base"}, "0.975") == "not measured"


def test_differences_are_paired():
    found = paired("1110", "0111")
    assert (found.difference, found.n) == (0, 4)
    assert found.low == pytest.approx(-found.high)
    assert paired("1111", "0001").difference == 0.75


def test_the_interval_over_seeds_is_students():
    values = [0.31, 0.35, 0.29]
    centre, low, high = student_interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert centre == pytest.approx(sum(values) / 3)


def test_seeds_are_only_spoken_of_when_all_have_run():
    assert seeds_text(RESULTS, "0.975").count("3 seeds: not measured.") == 2
    assert seeds_text({}, "0.975").count("3 seeds: not measured.") == 2
    seeds = {name: result(name, 0.3, "1111111100") for name in ("default_seed_1", "default_seed_2")}
    said = seeds_text(RESULTS | seeds, "0.975")
    assert "- `default`, 3 seeds: visual tokens kept 31.0%, 30.0%, 30.0% (mean 30.3%)" in said


def test_the_gradient_table_names_every_part():
    parts = {name: {"signal": 1e-3, "error": 1e-4, "noise": 2.0, "z": 10.0, "draws": 40} for name in GRADIENTS}
    parts["correct_tokens"] |= {"noise": 0.0, "error": 0.0, "z": None}  # every answer was right every time
    table = gradient_table({"draws": 40, "prompts": 32, "parts": parts})
    assert table.startswith("40 draws of the rollouts of 32 prompts")
    assert table.count("| 1.00e-03 | 1.0e-04 | 10.0 | 0.001 |") == 4
    assert table.count("| – | – |") == 1


def test_budgets_are_compared_for_those_that_were_judged_at_them():
    results = {name: result(name, ratio, "1111111100") for name, ratio in (("base", 0.9), ("default", 0.3))}
    for name, found in results.items():
        found["test"]["0.5"] = {"accuracy": 0.25 if name == "base" else 0.75, "visual_token_ratio": 0.125}
    lines = budgets_table(results | {"literal": result("literal", 0.9, "1111111100")}).splitlines()
    assert lines[0] == "| p | `base` | `default` |"
    assert lines[2] == "| 0.5 | 25.0% at 12.5% | 75.0% at 12.5% |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0.5", "| 0.975", "| 1.0"]
    assert budgets_table({}) == "not measured"


def test_lengths_are_in_order():
    at = [
        {"checkpoint": checkpoint, "visual_tokens": tokens, "p": p, "questions": 24, "accuracy": 0.5}
        | {"visual_token_ratio": 1.0 if p == 1 else 64 / tokens}
        for checkpoint in ("base", "policy")
        for tokens in (4096, 64)
        for p in (0.975, 1.0)
    ]
    lines = lengths_table({"lengths": at}).splitlines()
    assert lines[0] == "24 questions a length, p = 0.975."
    assert lines[4] == "| 64 | 100.0% | 100.0% | 50.0%, 50.0% | 50.0%, 50.0% |"
    assert lines[5].startswith("| 4,096 | 1.6% | 1.6% |")


def test_the_cost_is_said_in_full():
    found = {"name": "default", "rollouts": 19200, "prompts": 2400, "prompt_tokens": 10**6, "new_tokens": 70000}
    said = cost_text(found | {"seconds": 360.0, "hardware": "one core"})
    assert said.startswith("`default`: 19,200 rollouts of 2,400 prompts, 1,000,000 prompt tokens")
    assert said.endswith("and 70,000 sampled tokens, 0.10 hours on one core, validation included.")
