"""The profile of the base model: where there is room before any training."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.document import Block, Column, Missing, Plot, Section, Table, Text
from sparsity_forcing.reporting.drawing import BASE, POLICY, VIOLET, Drawing, new_figure
from sparsity_forcing.reporting.inputs import Inputs

TITLE = "Profile of the base model"
COLOURS, MARKERS = (BASE, POLICY, VIOLET), ("o", "s", "^")


def profile_section(inputs: Inputs) -> Section:
    """τ and accuracy of the base against p, prompt length, scoring rows and layer."""
    profile = inputs.metrics.get("profile")
    if profile is None:
        return Section("profile", TITLE, [Missing(TITLE, inputs.missing["metrics/profile.json"])])
    setting, by_budget = profile["setting"], profile["by_budget"]
    at = f"{setting['split']} questions, {setting['rule']}, {setting['prefill']} prefill"
    blocks: list[Block] = [
        Text(
            f"Before any training, on {at}. Unless a figure varies them, the scoring rows are "
            f"{setting['scoring_rows']} and the prompts {setting['length']}."
        ),
        Plot(_against_budget("profile_length", profile["by_length"], "length", "prompt length")),
        Plot(_against_budget("profile_scoring", profile["by_scoring_rows"], "scoring_rows", "scoring rows")),
        Plot(_by_layer(profile["by_layer"])),
        _budget_table(by_budget, f"By budget: base model, {setting['length']}, {setting['scoring_rows']} scoring rows"),
    ]
    return Section("profile", TITLE, blocks)


def _budget_table(rows: Sequence[dict], caption: str) -> Table:
    columns = [Column(label) for label in ("p", "τ", "τ visual", "Accuracy", "95% interval", "Questions")]
    cells = [
        [
            f"{row['p']:g}",
            fmt.percent(row["token_ratio"]),
            fmt.percent(row["visual_token_ratio"]),
            fmt.percent(row["accuracy"]),
            fmt.interval(row["accuracy_low"], row["accuracy_high"]),
            fmt.amount(row["n"]),
        ]
        for row in rows
    ]
    return Table(caption, columns, cells, folded=True)


def _against_budget(name: str, rows: Sequence[dict], by: str, words: str) -> Drawing:
    frame = pd.DataFrame(rows)

    def draw() -> Figure:
        figure = new_figure(7.2, 3.2)
        ratio, accuracy = figure.subplots(1, 2)
        for number, (value, line) in enumerate(frame.groupby(by, sort=False)):
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "label": str(value),
            }
            line = line.sort_values("p")
            ratio.plot(line["p"], line["visual_token_ratio"].astype(float), **look)
            accuracy.plot(line["p"], line["accuracy"], **look)
            accuracy.fill_between(
                line["p"], line["accuracy_low"], line["accuracy_high"], color=look["color"], alpha=0.12, linewidth=0
            )
        for axes, title in ((ratio, "Visual tokens kept"), (accuracy, "Accuracy")):
            _percent_axis(axes, title)
            axes.set_xlabel("budget p")
        ratio.legend(loc="lower right", title=words, title_fontsize=9)
        return figure

    return Drawing(
        name,
        draw,
        f"Base model by budget and {words}; bands are 95% intervals of the accuracy.",
        f"Visual token ratio and accuracy of the base model against the budget, by {words}.",
    )


def _by_layer(rows: Sequence[dict]) -> Drawing:
    frame = pd.DataFrame(rows)

    def draw() -> Figure:
        figure = new_figure(7.2, 3.2)
        axes = figure.subplots()
        budgets = sorted(frame["p"].unique(), reverse=True)
        for number, p in enumerate(budgets):
            line = frame[frame["p"] == p].sort_values("layer")
            strength = 1 - 0.75 * number / max(1, len(budgets) - 1)
            ratios = line["visual_token_ratio"].astype(float)
            axes.plot(line["layer"], ratios, color=BASE, alpha=strength, marker="o", label=f"p = {p:g}")
        _percent_axis(axes, "Visual tokens kept")
        axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure

    return Drawing(
        "profile_layers",
        draw,
        "Base model: visual tokens kept by each layer; the paler the line, the smaller the budget.",
        "Visual token ratio of the base model per layer, one line per budget.",
    )


def _percent_axis(axes: Axes, title: str) -> None:
    axes.set(title=title, ylim=(-0.02, 1.04))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
