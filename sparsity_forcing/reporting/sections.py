"""The sections of the report: what was measured here, in the order a reader asks for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sparsity_forcing.evaluation.table import AVERAGE, BenchmarkRow
from sparsity_forcing.params import Params
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting import plots
from sparsity_forcing.reporting.content import (
    BASE_ARM,
    DENSE_ARM,
    POLICY_ARM,
    Headline,
    Measured,
    difference_text,
    perspective_text,
)
from sparsity_forcing.reporting.document import Block, Column, Missing, Plot, Section, Table, Text
from sparsity_forcing.reporting.inputs import Inputs
from sparsity_forcing.reporting.intervals import samples_of

CHECKPOINT_LABELS = {"base": "base", "policy": "policy (trained)"}


def benchmark_section(inputs: Inputs, found: Headline) -> Section:
    """Accuracy against tokens kept: the plot and the table behind it."""
    pooled = inputs.table.averages()
    single = [row for row in inputs.table.rows if row.benchmark != AVERAGE]
    blocks: list[Block] = []
    if found.after.visual_token_ratio is not None:
        blocks.append(Plot(plots.pareto(pooled)))
    else:
        blocks.append(Missing("Accuracy against visual tokens kept", "no test question has a visual token"))
    blocks.append(Text(perspective_text(inputs.table)))
    blocks.append(_rows_table("All test questions pooled; accuracy with its 95% interval", pooled, found))
    blocks.append(_rows_table("Every benchmark on its own", single, found, folded=True))
    if found.difference is not None:
        blocks.append(
            Text(
                f"Trained model at p = {found.after.p:g} against the dense base, on the same "
                f"{fmt.amount(found.difference.n)} questions: {difference_text(found)}, paired."
            )
        )
    return Section("benchmark", "Accuracy against tokens kept", blocks)


def _rows_table(caption: str, rows: Sequence[BenchmarkRow], found: Headline, folded: bool = False) -> Table:
    columns = [
        *(Column(label, numeric=False) for label in ("Checkpoint", "Method", "Benchmark")),
        *(Column(label) for label in ("p", "τ", "τ visual", "Accuracy", "95% interval", "Questions")),
    ]
    cells = [
        [
            CHECKPOINT_LABELS[row.checkpoint],
            row.method,
            "all" if row.benchmark == AVERAGE else row.benchmark,
            "–" if row.p == 1 else f"{row.p:g}",
            fmt.percent(row.token_ratio),
            fmt.percent(row.visual_token_ratio),
            fmt.percent(row.accuracy),
            fmt.interval(row.accuracy_low, row.accuracy_high),
            fmt.amount(row.n),
        ]
        for row in rows
    ]
    key = (found.after.method, found.after.checkpoint, found.after.p)
    chosen = frozenset(i for i, row in enumerate(rows) if (row.method, row.checkpoint, row.p) == key)
    return Table(caption, columns, cells, highlight=chosen, folded=folded)


def training_section(inputs: Inputs, params: Params) -> Section:
    """τ and accuracy during training, and what the training cost."""
    blocks: list[Block] = []
    if inputs.curve is not None and len(inputs.curve):
        blocks.append(Plot(plots.training(inputs.curve)))
    else:
        blocks.append(Missing("Token ratio and accuracy during training", inputs.missing["plots/train.csv"]))
    train = inputs.metrics.get("train")
    if train is None:
        blocks.append(Missing("Training cost", inputs.missing["metrics/train.json"]))
        return Section("training", "During training", blocks)
    if "start" in train and "end" in train:
        names = {"accuracy": "Accuracy", "token_ratio": "τ", "visual_token_ratio": "τ visual"}
        rows = [
            [label, fmt.percent(train["start"].get(key)), fmt.percent(train["end"].get(key))]
            for key, label in names.items()
        ]
        columns = [Column("Validation questions", numeric=False), Column("Before"), Column("After")]
        blocks.append(Table(f"On the validation split, greedy, at p = {params.sparsity.p:g}", columns, rows))
    rate = train.get("new_tokens_per_second")
    cost = [
        ["Time", fmt.duration(inputs.metric("train", "seconds"))],
        ["Steps", fmt.amount(train.get("steps"))],
        ["Rollouts", fmt.amount(train.get("rollouts"))],
        ["Prompt tokens", fmt.amount(train.get("prompt_tokens"))],
        ["New tokens", fmt.amount(train.get("new_tokens"))],
        ["New tokens per second of rollout", fmt.amount(rate)],
        ["Steps skipped for non-finite gradients", fmt.amount(train.get("skipped_steps"))],
        ["Largest rollout–replay log-prob difference", _small(train.get("replay_max_difference"))],
        ["Device", str(train.get("device", fmt.NOT_MEASURED))],
        ["Seed", str(train.get("seed", fmt.NOT_MEASURED))],
        ["Training of the base model", fmt.duration(inputs.metric("base", "seconds"))],
    ]
    blocks.append(Table("Cost of the training run", [Column("", numeric=False), Column("Measured")], cost))
    return Section("training", "During training", blocks)


def _small(value: float | None) -> str:
    return fmt.NOT_MEASURED if value is None else f"{value:.1e}"


def layers_section(inputs: Inputs, found: Headline, measured: Measured) -> Section:
    """Which layers keep what, base against policy."""
    title = "Where tokens are kept"
    if inputs.samples is None or found.after.visual_token_ratio is None:
        reason = inputs.missing.get("evaluation/samples.parquet", "no test question has a visual token")
        return Section("layers", title, [Missing("Token ratio of each layer", reason)])
    base, policy = (layer_means(inputs.samples, row) for row in (found.before, found.after))
    kept = measured.kept.get("policy")
    by_kind = kept.by_kind if kept is not None else {}
    columns = [Column("Layer")]
    columns += [Column(label, group=ratio) for ratio in ("τ visual", "τ, all tokens") for label in ("base", "policy")]
    columns += [Column(kind, group="policy keeps, of the cells that show") for kind in by_kind]
    shares = zip(base[1], policy[1], base[0], policy[0], *by_kind.values(), strict=True)
    rows = [[str(layer), *(fmt.percent(share) for share in line)] for layer, line in enumerate(shares)]
    caption = f"Per layer at p = {found.after.p:g}, mean over {fmt.amount(found.after.n)} test questions"
    if by_kind:
        caption += f"; by what a cell shows over {len(kept.rows)} of them"
    plot = Plot(plots.layers(base[1], policy[1], by_kind, found.after.p))
    return Section("layers", title, [plot, Table(caption, columns, rows, folded=True)])


def layer_means(samples: pd.DataFrame, row: BenchmarkRow) -> tuple[list[float], list[float]]:
    """τ and τ visual of every layer, mean over the questions of a pooled row."""
    chosen = samples_of(samples, row)
    visual = chosen["layer_visual_ratio"].dropna()
    return tuple(np.mean(np.stack(list(column)), axis=0).tolist() for column in (chosen["layer_ratio"], visual))


def efficiency_section(measured: Measured) -> Section:
    """Decode time and cache bytes, dense against sparse."""
    title = "Decode time and cache bytes"
    if not measured.lengths:
        return Section("efficiency", title, [Missing(title, measured.missing["efficiency"])])
    first = measured.lengths[0]
    columns = [
        *(Column(label) for label in ("Visual tokens", "Prompt tokens", "Batch")),
        *(Column("Model", numeric=False), Column("τ visual")),
        *(Column(label, group="decode, per token") for label in ("ms", "to dense", "quartiles")),
        *(Column(label, group="cache") for label in ("bytes", "to dense")),
        *(Column(label, group="time to first token") for label in ("ms", "to dense")),
    ]
    rows = []
    for length in measured.lengths:
        for name in (DENSE_ARM, BASE_ARM, POLICY_ARM):
            arm = length["arms"][name]
            ratio = arm["decode_ratio"]
            rows.append(
                [
                    fmt.amount(length["visual_tokens"]) + ("" if measured.covers(length) else " †"),
                    *(fmt.amount(length[key]) for key in ("prompt_tokens", "batch")),
                    *(name, fmt.percent(arm["visual_token_ratio"])),
                    f"{arm['decode_ms_per_token']['median']:.2f}",
                    fmt.times(ratio["median"]),
                    f"{ratio['low']:.2f}–{ratio['high']:.2f}",
                    fmt.byte_size(arm["cache_bytes"]),
                    fmt.times(arm["cache_ratio"]),
                    f"{arm['prefill_ms']['median']:.0f}",
                    fmt.times(arm["prefill_ratio"]["median"]),
                ]
            )
    chosen = frozenset(i for i, row in enumerate(rows) if row[3] == POLICY_ARM)
    intro = (
        f"Measured in one process on {measured.hardware}: every repetition runs all three in turn with the same "
        f"inputs and {first['new_tokens']} new tokens, and ratios are taken within a repetition "
        f"({first['repetitions']} repetitions). Cache bytes are those of the key and value tensors held at the end "
        "of the answer; a layer's tensor is as wide as the row of the batch that keeps most, so bytes stay above τ. "
        f"The dense times themselves spread by {fmt.percent(_dense_spread(measured.lengths), 0)} between their "
        "quartiles; ratios within a repetition are steadier, and a length is called faster or slower only where both "
        "quartiles of its ratio lie on one side of 1."
    )
    caption = "Medians; ratios are to the dense base"
    if not all(map(measured.covers, measured.lengths)):
        caption += ". † Longer than any question of the evaluation: accuracy and τ are not evaluated there"
    blocks: list[Block] = [Text(intro), Text(_decode_verdict(measured.lengths))]
    if len(measured.lengths) > 1:
        blocks.append(Plot(plots.decode_by_length(measured.lengths, (BASE_ARM, POLICY_ARM), DENSE_ARM)))
    blocks.append(Table(caption, columns, rows, highlight=chosen))
    return Section("efficiency", title, blocks)


def _dense_spread(lengths: Sequence[dict]) -> float:
    """Largest distance between quartiles of the dense decode time, as a share of its median."""
    times = [length["arms"][DENSE_ARM]["decode_ms_per_token"] for length in lengths]
    return max((time["high"] - time["low"]) / time["median"] for time in times)


def _listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _decode_verdict(lengths: Sequence[dict]) -> str:
    """Says in words what the quartiles allow to be said."""
    faster, slower, even = [], [], []
    for length in lengths:
        ratio = length["arms"][POLICY_ARM]["decode_ratio"]
        group = faster if ratio["high"] < 1 else slower if ratio["low"] > 1 else even
        group.append(f"{length['visual_tokens']:,}")
    parts = [
        f"{verdict} at {_listed(counts)} visual tokens"
        for verdict, counts in (("faster", faster), ("slower", slower), ("not clearly different", even))
        if counts
    ]
    cache = [length["arms"][POLICY_ARM]["cache_ratio"] for length in lengths]
    low, high = fmt.percent(min(cache), 0), fmt.percent(max(cache), 0)
    held = low if low == high else f"{low} to {high}"
    return f"Decoding with the trained policy is {'; '.join(parts)}. Its cache holds {held} of the dense bytes."
