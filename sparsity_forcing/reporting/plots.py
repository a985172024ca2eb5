"""The figures of the report. Each function takes plain data and returns how to draw it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sparsity_forcing.evaluation.table import BenchmarkRow
from sparsity_forcing.methods import Full
from sparsity_forcing.reporting.drawing import BASE, NEUTRAL, POLICY, VIOLET, Drawing, new_figure

CHECKPOINTS = {"base": (BASE, "o", "before training (base)"), "policy": (POLICY, "s", "after training (policy)")}
LABEL_WIDTH = 0.12  # of the x axis
KIND_STYLES = ((POLICY, "s"), (VIOLET, "^"), (NEUTRAL, "o"))


def pareto(rows: Sequence[BenchmarkRow]) -> Drawing:
    """Accuracy against visual token ratio: every pooled row of the benchmark, with its 95% interval."""

    def draw() -> Figure:
        figure = new_figure(7.2, 4.4)
        axes = figure.subplots()
        methods = list(dict.fromkeys(row.method for row in rows if row.method != Full.name))
        for checkpoint, (colour, marker, label) in CHECKPOINTS.items():
            for method in [Full.name, *methods]:
                points = sorted(
                    (
                        row
                        for row in rows
                        if (row.checkpoint, row.method) == (checkpoint, method) and row.visual_token_ratio is not None
                    ),
                    key=lambda row: row.visual_token_ratio,
                )
                if not points:
                    continue
                deployed = method in methods[:1]
                axes.errorbar(
                    [row.visual_token_ratio for row in points],
                    [row.accuracy for row in points],
                    yerr=[
                        [row.accuracy - row.accuracy_low for row in points],
                        [row.accuracy_high - row.accuracy for row in points],
                    ],
                    color=colour,
                    marker="D" if method == Full.name else marker,
                    linestyle="-" if deployed else ":",
                    fillstyle="full" if deployed else "none",
                    capsize=3,
                    elinewidth=1.2,
                    label=f"{label}, {'dense' if method == Full.name else method}",
                )
                if deployed:
                    _label_budgets(axes, points, colour, below=checkpoint == "policy")
        axes.set(xlabel="visual tokens kept, τ visual (lower is cheaper)", ylabel="accuracy", xlim=(0, 1.06))
        axes.margins(y=0.2)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="lower right")
        return figure

    return Drawing(
        "pareto",
        draw,
        "Accuracy against the share of visual tokens kept, all test questions pooled; bars are 95% intervals. "
        "Up and to the left is better. Hollow points are dense, or rules that were not trained for.",
        "Accuracy against visual token ratio for the base and the trained policy, by rule and budget.",
    )


def _label_budgets(axes: Axes, rows: Sequence[BenchmarkRow], colour: str, below: bool) -> None:
    """Writes p above or below each point; beyond the intervals of all neighbours that are too close to share a line."""
    neighbours: list[list[BenchmarkRow]] = []
    for row in rows:
        if neighbours and row.visual_token_ratio - neighbours[-1][-1].visual_token_ratio < LABEL_WIDTH:
            neighbours[-1].append(row)
        else:
            neighbours.append([row])
    for group in neighbours:
        edge = min(row.accuracy_low for row in group) if below else max(row.accuracy_high for row in group)
        latest: dict[int, float] = {}  # place of the last label of each line, which is used again where it is free
        for row in group:
            x = row.visual_token_ratio
            level = next(line for line in count() if x - latest.get(line, -1.0) >= LABEL_WIDTH)
            latest[level] = x
            axes.annotate(
                "dense" if row.p == 1 else f"p = {row.p:g}",
                (x, edge),
                xytext=(0, (-1 if below else 1) * (5 + 11 * level)),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=8.5,
                color=colour,
            )


def training(curve: pd.DataFrame) -> Drawing:
    """τ and accuracy of the rollouts at every step, with the validation points on top."""

    def draw() -> Figure:
        figure = new_figure(7.2, 4.6)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _noisy_line(upper, curve, "visual_token_ratio", POLICY, "τ visual, rollouts")
        _noisy_line(upper, curve, "token_ratio", NEUTRAL, "τ, all tokens, rollouts")
        _points(upper, curve, "validation_visual_token_ratio", "τ visual, validation at the deployment budget")
        _noisy_line(lower, curve, "accuracy", POLICY, "rollouts (sampled)")
        _points(lower, curve, "validation_accuracy", "validation (greedy)")
        upper.set_title("Token ratio")
        lower.set_title("Accuracy")
        lower.set_xlabel("training step")
        upper.set_ylim(0, 1.03)
        for axes in (upper, lower):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.legend(loc="lower left" if axes is upper else "lower right")
        return figure

    return Drawing(
        "training",
        draw,
        "Token ratio and accuracy during training. Thin lines are single steps, thick lines their running median over "
        "15 steps.",
        "Token ratio falling and accuracy over the steps of training.",
    )


def _noisy_line(axes: Axes, curve: pd.DataFrame, column: str, colour: str, label: str) -> None:
    if column not in curve:
        return
    axes.plot(curve["step"], curve[column], color=colour, linewidth=0.7, alpha=0.4)
    axes.plot(curve["step"], curve[column].rolling(15, min_periods=1, center=True).median(), color=colour, label=label)


def _points(axes: Axes, curve: pd.DataFrame, column: str, label: str) -> None:
    if column not in curve or curve[column].isna().all():
        return
    known = curve.dropna(subset=[column])
    axes.plot(known["step"], known[column], color=VIOLET, marker="D", linestyle="--", linewidth=1, label=label)


def layers(base: Sequence[float], policy: Sequence[float], by_kind: dict[str, list[float]], p: float) -> Drawing:
    """Share of visual tokens kept per layer, base and policy, and what the policy's kept cells show."""

    def draw() -> Figure:
        figure = new_figure(7.2, 3.5)
        panels = figure.subplots(1, 2, sharey=True) if by_kind else [figure.subplots()]
        places = range(len(base))
        for values, (colour, marker, label) in zip((base, policy), CHECKPOINTS.values(), strict=True):
            panels[0].plot(places, values, color=colour, marker=marker, label=label)
        panels[0].set_title(f"All visual tokens, p = {p:g}")
        panels[0].set_ylabel("visual tokens kept")
        if by_kind:
            for (kind, values), (colour, marker) in zip(by_kind.items(), KIND_STYLES, strict=True):
                panels[1].plot(places, values, color=colour, marker=marker, label=kind)
            panels[1].set_title("What the policy keeps")
        for axes in panels:
            axes.set(xlabel="decoder layer", ylim=(0, 1.03))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.legend(loc="best")
        return figure

    return Drawing(
        "layers",
        draw,
        "Visual tokens kept by each decoder layer at the deployment budget, mean over the test questions.",
        "Share of visual tokens kept per layer, base against policy.",
    )


def decode_by_length(lengths: Sequence[dict], arms: Sequence[str], baseline: str) -> Drawing:
    """Decode time and cache bytes relative to dense, against the number of visual tokens."""

    def draw() -> Figure:
        figure = new_figure(7.2, 3.4)
        time_axes, cache_axes = figure.subplots(1, 2)
        tokens = [length["visual_tokens"] for length in lengths]
        for arm, (colour, marker, _) in zip(arms, CHECKPOINTS.values(), strict=True):
            ratios = [length["arms"][arm]["decode_ratio"] for length in lengths]
            medians = [ratio["median"] for ratio in ratios]
            errors = [
                [ratio["median"] - ratio["low"] for ratio in ratios],
                [ratio["high"] - ratio["median"] for ratio in ratios],
            ]
            time_axes.errorbar(tokens, medians, yerr=errors, color=colour, marker=marker, capsize=3, label=arm)
            cache = [length["arms"][arm]["cache_ratio"] for length in lengths]
            cache_axes.plot(tokens, cache, color=colour, marker=marker, label=arm)
        for axes, title in ((time_axes, "Decode time per token"), (cache_axes, "Cache bytes")):
            axes.axhline(1, color=NEUTRAL, linestyle="--", linewidth=1.2, label=baseline)
            axes.set(xlabel="visual tokens per prompt", title=f"{title} / dense", ylim=(0, None), xscale="log")
            axes.set_xticks(tokens, [f"{count}" for count in tokens])
            axes.minorticks_off()
            axes.legend(loc="best")
        return figure

    return Drawing(
        "decode",
        draw,
        "Measured side by side, as ratios to the dense base: below the dashed line is faster or smaller. "
        "Points are medians, bars quartiles over repetitions.",
        "Decode time and cache bytes relative to the dense model, by number of visual tokens.",
    )
