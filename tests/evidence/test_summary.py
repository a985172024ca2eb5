"""What is said of the experiments is what they found."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from sparsity_forcing.evidence import summary
from sparsity_forcing.evidence.arms import ANY_BUDGET, ARMS, SEEDS
from sparsity_forcing.evidence.experiment import INPUTS
from sparsity_forcing.evidence.summary import quoted
from sparsity_forcing.evidence.tables import (
    GRADIENTS,
    arms_table,
    budgets_table,
    cost_text,
    gradient_table,
    headline_text,
    lengths_table,
    paired,
    seeds_table,
    student_interval,
    turns_table,
)
from sparsity_forcing.params import load_params
from sparsity_forcing.reporting.document import Missing, Report
from sparsity_forcing.reporting.markdown import render_markdown
from sparsity_forcing.reporting.page import render_html


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
        "curve": [
            {"step": 0, "accuracy": 0.75, "visual_token_ratio": 0.96, "token_ratio": 0.97},
            {"step": 40, "accuracy": 0.5, "visual_token_ratio": 0.125, "token_ratio": 0.2},
        ],
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
    table = arms_table(RESULTS, "0.975")
    of = {row[0]: row for row in table.rows}
    assert of.keys() == {"base", *ARMS}
    assert of["default"][2:4] == ["31.0%", "80.0%"]
    assert of["default"][4].startswith("−10.0 (")
    assert of["default"][5:] == ["30", "96.0% → 12.5%", "75.0% → 50.0%"]
    assert of["literal"][2:4] == ["95.0%", "90.0%"]
    assert of["literal"][4].startswith("±0.0 (")
    assert of["literal"][5] == "30, none was within the guard"
    assert of["shuffled"][2:] == ["not measured", *[""] * 5]
    assert [table.rows[place][0] for place in sorted(table.highlight)] == list(SEEDS["default"])
    assert isinstance(arms_table({name: found for name, found in RESULTS.items() if name != "base"}, "0.975"), Missing)


def test_the_short_of_it_names_what_ran_and_what_did_not():
    text = headline_text(RESULTS, None, "0.975").text
    assert text.startswith(
        "Of 10 held-out questions the dense base answers 90.0%; at p = 0.975 it keeps 96.0% of the visual tokens and "
        "answers 90.0%. Visual tokens kept after training, and points of accuracy against the dense base: the default "
        "31.0% (−10.0); the literal objective 95.0% (±0.0, no step within the guard). Not measured, among others: with "
        "a second seed;"
    )
    alternatives = "; supervised fine-tuning; fine-tuning with a relaxed token ratio in its loss; DPO"
    assert text.endswith(f"{alternatives}; a second question on the same image.")
    ways = {"dense": {"scores": "1111"}, "dense_cache": {"scores": "1110"}, "pruned_cache": {"scores": "1000"}}
    text = headline_text({"base": RESULTS["base"]}, {"checkpoints": {"policy": ways}}, "0.975").text
    assert "against the dense base: nothing yet. A second question on the same image changes the policy's acc" in text
    assert "by −75.0 points where only what the first one kept is left, by −25.0 where it selects anew from" in text
    assert text.endswith(f"{alternatives}.")
    assert isinstance(headline_text({}, None, "0.975"), Missing)


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
    rows = seeds_table(RESULTS, "0.975").rows
    seeds = {"default": "4", "prefill_sparse": "3", "prefill_dense": "3"}
    assert [row[:3] for row in rows] == [[name, count, "not measured"] for name, count in seeds.items()]
    assert isinstance(seeds_table({}, "0.975"), Missing)
    seeds = {name: result(name, 0.3, "1111111100") for name in SEEDS["default"][1:]}
    row = seeds_table(RESULTS | seeds, "0.975").rows[0]
    ratios, accuracies = "31.0%, 30.0%, 30.0%, 30.0%", "80.0%, 80.0%, 80.0%, 80.0%"
    assert row == ["default", "4", ratios, "30.2% (29.5% … 31.0%)", accuracies, "−10.00 (−10.00 … −10.00)"]
    del seeds["default_seed_3"]
    assert seeds_table(RESULTS | seeds, "0.975").rows[0][2] == "not measured"


def test_the_gradient_table_names_every_part():
    parts = {name: {"signal": 1e-3, "error": 1e-4, "noise": 2.0, "z": 10.0, "draws": 40} for name in GRADIENTS}
    parts["correct_tokens"] |= {"noise": 0.0, "error": 0.0, "z": None}  # every answer was right every time
    table = gradient_table({"draws": 40, "prompts": 32, "parts": parts})
    assert table.caption.startswith("40 draws of the rollouts of 32 prompts")
    assert [row[1:] for row in table.rows].count(["1.00e-03", "1.0e-04", "10.0", "0.001"]) == 4
    assert [row[3:] for row in table.rows].count(["–", "–"]) == 1


def test_budgets_are_compared_for_those_that_were_judged_at_them():
    results = {name: result(name, ratio, "1111111100") for name, ratio in (("base", 0.9), ("default", 0.3))}
    for name, found in results.items():
        for p in ANY_BUDGET:
            accuracy, scores = (0.25, "1000") if name == "base" else (0.75, "1101")
            found["test"][str(p)] = {"accuracy": accuracy, "visual_token_ratio": 0.125, "scores": scores}
    literal = result("literal", 0.9, "1111111100")
    literal["test"]["0.5"] = results["base"]["test"]["0.5"]  # of evaluate.budgets, not judged at the others
    table = budgets_table(results | {"literal": literal})
    assert [column.label for column in table.columns] == ["p", "base", "default", "default"]
    assert table.rows[0][:3] == ["0.5", "25.0% at 12.5%", "75.0% at 12.5%"]
    assert table.rows[0][3].startswith("+50.0 (")
    assert [row[0] for row in table.rows] == [*map(str, ANY_BUDGET), "0.975", "1.0"]
    assert isinstance(budgets_table({}), Missing)


def test_lengths_are_in_order():
    at = [
        {"checkpoint": checkpoint, "visual_tokens": tokens, "p": p, "questions": 24, "accuracy": 0.5}
        | {"visual_token_ratio": 1.0 if p == 1 else 64 / tokens, "token_ratio": 0.5}
        for checkpoint in ("base", "policy")
        for tokens in (4096, 64)
        for p in (0.975, 1.0)
    ]
    table = lengths_table({"p": 0.975, "lengths": at})
    assert table.caption.startswith("Sparse at p = 0.975")
    assert table.rows[0] == ["64", "24", *["100.0%", "50.0%"] * 2, *["50.0% (31.4–68.6)"] * 4]
    assert table.rows[1][:6] == ["4,096", "24", "1.6%", "50.0%", "1.6%", "50.0%"]


def test_second_questions_are_compared_with_the_same_models_own():
    ways = {
        way: {"accuracy": scores.count("1") / 4, "visual_token_ratio": ratio, "scores": scores}
        for way, ratio, scores in (("dense", 1.0, "1110"), ("dense_cache", 0.25, "1101"), ("pruned_cache", 0.2, "1000"))
    }
    table = turns_table({"p": 0.975, "questions": 4, "checkpoints": {"base": ways, "policy": ways}})
    assert [row[0] for row in table.rows] == ["base"] * 3 + ["policy"] * 3
    assert [row[2:4] for row in table.rows[:3]] == [["100.0%", "75.0%"], ["25.0%", "75.0%"], ["20.0%", "25.0%"]]
    assert [row[4].split(" ")[0] for row in table.rows[3:]] == ["–", "±0.0", "−50.0"]


def test_the_cost_is_said_in_full():
    found = {"name": "default", "rollouts": 19200, "prompts": 2400, "prompt_tokens": 10**6, "new_tokens": 70000}
    said = cost_text(found | {"seconds": 360.0, "hardware": "one core"}).text
    assert said.startswith("Cost of default: 19,200 rollouts of 2,400 prompts, 1,000,000 prompt tokens")
    assert said.endswith("and 70,000 sampled tokens, 0.10 hours on one core, validation included.")


def test_the_report_has_the_experiments(tmp_path, monkeypatch):
    for path in INPUTS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    cost = {"rollouts": 8, "prompts": 1, "prompt_tokens": 9, "new_tokens": 9, "seconds": 36.0, "hardware": "one core"}
    results = RESULTS | {"default": RESULTS["default"] | cost}
    monkeypatch.setattr(summary, "read_results", lambda params, root: results)
    section = summary.evidence_section(params, tmp_path)
    report = Report("title", "headline", [], [], [section])
    markdown, page = render_markdown(report), render_html(report)
    assert "| **default** | **what the parameters of params.yaml give** | **31.0%** |" in markdown
    assert "validation, first to last step: kept" in markdown
    assert ">31.0%</td>" in page
    assert "<svg" in page
    assert "Signal and noise of the gradient: **not measured** (`make evidence` runs what is missing)." in markdown
    (tmp_path / next(iter(INPUTS))).unlink()
    assert isinstance(summary.evidence_section(params, tmp_path).blocks[0], Missing)
