"""What the report says first: the headline, its setting, and the cards. Numbers come from the metrics alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from sparsity_forcing.evaluation.table import BenchmarkRow, BenchmarkTable, kept_share
from sparsity_forcing.methods import Full, sparse_method
from sparsity_forcing.params import Params
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.document import Card
from sparsity_forcing.reporting.inputs import Inputs, ReportError
from sparsity_forcing.reporting.intervals import PairedDifference, paired_difference
from sparsity_forcing.reporting.kept import Kept

DENSE_ARM, BASE_ARM, POLICY_ARM = "base, dense", "base, sparse", "policy, sparse"


@dataclass(frozen=True)
class Measured:
    """What the report measured itself; what could not be measured is in ``missing`` with the reason.

    ``kept``: checkpoint -> kept sets on the same questions. ``lengths``: one entry per prompt length, ascending:
    {"visual_tokens", "prompt_tokens", "batch", "new_tokens", "repetitions", "arms": {arm: summary}}.
    ``evaluated_visual_tokens``: the most visual tokens that a question of the evaluation had.
    """

    hardware: str
    kept: dict[str, Kept] = field(default_factory=dict)
    lengths: list[dict] = field(default_factory=list)
    evaluated_visual_tokens: int | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> dict | None:
        """The length to quote: the longest that the evaluation covers, so that τ there is the τ that was trained."""
        covered = [length for length in self.lengths if self.covers(length)]
        return covered[-1] if covered else self.lengths[0] if self.lengths else None

    def covers(self, length: dict) -> bool:
        return self.evaluated_visual_tokens is None or length["visual_tokens"] <= self.evaluated_visual_tokens


@dataclass(frozen=True)
class Headline:
    """The rows that the headline compares, and the paired accuracy difference policy (sparse) - base (dense)."""

    dense: BenchmarkRow
    before: BenchmarkRow
    after: BenchmarkRow
    difference: PairedDifference | None

    def numbers(self) -> dict[str, float]:
        """For metrics/report.json and MLflow."""
        values = {
            "p": self.after.p,
            "questions": self.after.n,
            "dense_accuracy": self.dense.accuracy,
            "accuracy": self.after.accuracy,
            "accuracy_difference": self.after.accuracy - self.dense.accuracy,
            "token_ratio": self.after.token_ratio,
            "token_ratio_before": self.before.token_ratio,
        }
        if self.after.visual_token_ratio is not None and self.before.visual_token_ratio is not None:
            values["visual_token_ratio"] = self.after.visual_token_ratio
            values["visual_token_ratio_before"] = self.before.visual_token_ratio
        if self.difference is not None:
            values["accuracy_difference_low"] = self.difference.low
            values["accuracy_difference_high"] = self.difference.high
        return values


def find_headline(table: BenchmarkTable, params: Params, samples: pd.DataFrame | None) -> Headline:
    """The headline's rows: dense base, and base and policy at the deployment budget.

    Raises:
        ReportError: the table lacks one of them.
    """
    method = sparse_method(params.sparsity, params.sparsity.p)
    try:
        dense = table.find(Full.name, "base", Full.p)
        before, after = (table.find(method.name, checkpoint, method.p) for checkpoint in ("base", "policy"))
    except KeyError as error:
        raise ReportError(
            f"metrics/evaluate.json does not fit params.yaml: {error.args[0]}; "
            "run `python -m sparsity_forcing evaluate` again"
        ) from None
    return Headline(dense, before, after, paired_difference(samples, after, dense) if samples is not None else None)


def headline_text(found: Headline) -> str:
    after, before, dense = found.after, found.before, found.dense
    if after.visual_token_ratio is not None:
        kept = (
            f"{fmt.percent(after.visual_token_ratio)} of the visual tokens instead of "
            f"{fmt.percent(before.visual_token_ratio)}"
        )
    else:
        kept = f"{fmt.percent(after.token_ratio)} of the tokens instead of {fmt.percent(before.token_ratio)}"
    return (
        f"At budget p = {after.p:g} the trained model keeps {kept} before training, and answers "
        f"{fmt.percent(after.accuracy)} of {fmt.amount(after.n)} held-out questions where the dense base model answers "
        f"{fmt.percent(dense.accuracy)}."
    )


def perspective_text(table: BenchmarkTable, loss: float = 0.01) -> str:
    """What training is worth: the sparsest rows of base and policy that keep the accuracy, under any rule measured."""
    described = []
    for checkpoint, name in (("base", "the base"), ("policy", "the policy")):
        row = table.sparsest(checkpoint, loss)
        rule = "dense" if row.method == Full.name else f"{row.method} at p = {row.p:g}"
        described.append(f"{name} with {rule} ({fmt.percent(kept_share(row))} kept, {fmt.percent(row.accuracy)} right)")
    return (
        "Budget and rule can be changed without training; the rows say what that does to the accuracy. Of all rows "
        f"within {100 * loss:g} point of the dense base, the sparsest are {described[0]} and {described[1]}."
    )


def setting_lines(found: Headline, params: Params, inputs: Inputs, measured: Measured) -> list[tuple[str, str]]:
    """Everything that the headline depends on."""
    after, sparsity = found.after, params.sparsity
    protected = [f"first {sparsity.protect_first}", f"last {sparsity.protect_last}"]
    if sparsity.protect_text:
        protected.insert(0, "text")
    return [
        ("Method", f"Sparsity Forcing ({after.method}, {sparsity.rank_by} rank, {sparsity.scoring_rows} scoring rows)"),
        ("Model", model_name(params, inputs)),
        ("Budget", f"p = {after.p:g}"),
        ("Kept tokens", f"τ = {fmt.percent(after.token_ratio)}, τ visual = {fmt.percent(after.visual_token_ratio)}"),
        ("Baseline", "the base model with dense attention, same questions"),
        ("Prompt length", prompt_lengths(inputs)),
        ("Batch", f"{params.evaluate.batch_size} prompts in evaluation"),
        ("Prefill kind", sparsity.prefill + (" (decode-only setting)" if sparsity.prefill == "dense" else "")),
        ("Protected tokens", ", ".join(protected)),
        ("Data", f"{params.data.source}, test split, {fmt.amount(after.n)} questions"),
        ("Hardware", measured.hardware),
        ("Training seeds", "1"),
    ]


def model_name(params: Params, inputs: Inputs) -> str:
    parameters = inputs.metric("base", "parameters")
    size = f", {fmt.amount(parameters)} parameters" if parameters else ""
    if params.model.name == "scratch":
        scratch = params.model.scratch
        return f"Qwen2.5-VL architecture trained from scratch ({scratch.layers} decoder layers{size})"
    return f"{params.model.name}{size}"


def prompt_lengths(inputs: Inputs) -> str:
    if inputs.samples is None:
        return fmt.NOT_MEASURED
    lengths = inputs.samples["prompt_tokens"]
    low, middle, high = int(lengths.min()), int(lengths.median()), int(lengths.max())
    return f"{low} tokens" if low == high else f"{low}–{high} tokens, median {middle}"


def cards(found: Headline, inputs: Inputs, measured: Measured) -> list[Card]:
    after, before, dense = found.after, found.before, found.dense
    result = [
        Card(
            "Visual tokens kept",
            fmt.percent(after.visual_token_ratio),
            f"at p = {after.p:g}; {fmt.percent(before.visual_token_ratio)} before training",
        ),
        Card(
            "Accuracy",
            fmt.percent(after.accuracy),
            f"dense base {fmt.percent(dense.accuracy)}; {difference_text(found)}",
        ),
    ]
    if measured.main is not None:
        arm = measured.main["arms"][POLICY_ARM]
        at = f"of dense, {fmt.amount(measured.main['visual_tokens'])} visual tokens, batch {measured.main['batch']}"
        result.append(Card("Cache bytes", fmt.percent(arm["cache_ratio"], 0), at))
        result.append(Card("Decode time per token", fmt.times(arm["decode_ratio"]["median"]), at))
    else:
        result.append(Card("Cache bytes and decode time", fmt.NOT_MEASURED, measured.missing.get("efficiency", "")))
    rollouts = inputs.metric("train", "rollouts")
    result.append(
        Card(
            "Training cost",
            fmt.duration(inputs.metric("train", "seconds")),
            f"{fmt.amount(rollouts)} rollouts" if rollouts is not None else "metrics/train.json is not there",
        )
    )
    return result


def difference_text(found: Headline) -> str:
    """The change in accuracy, with its paired interval where single answers are known."""
    text = f"{fmt.points(found.after.accuracy - found.dense.accuracy)} points"
    if found.difference is None:
        return text
    return f"{text} (95% interval {fmt.points(found.difference.low)} to {fmt.points(found.difference.high)})"
