"""Figures of the profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}


def write_plots(summaries: Mapping[str, Sequence[Mapping]], directory: Path, setting: str) -> None:
    """Writes one SVG per summary of the profile; ``setting`` is printed below each figure.

    ``summaries``: `profile.summarize` of the four tables by name. The same numbers give the same bytes.
    """
    figures = {
        "by_budget": lambda rows: _curves(rows, None),
        "by_layer": _layers,
        "by_length": lambda rows: _curves(rows, "length"),
        "by_scoring_rows": lambda rows: _curves(rows, "scoring_rows"),
    }
    with rc_context({**STYLE, "svg.hashsalt": "sparsity-forcing"}):
        for name, draw in figures.items():
            figure = draw(pd.DataFrame(summaries[name]))
            figure.supxlabel(setting, fontsize=7, color="0.4")
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None})


def _curves(rows: pd.DataFrame, by: str | None) -> Figure:
    """Accuracy with its interval, and both token ratios, against the budget; one colour per value of ``by``."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    accuracy, ratio = figure.subplots(1, 2)
    for number, (name, line) in enumerate(rows.groupby(by, sort=False) if by else [("", rows)]):
        line, colour = line.sort_values("p"), f"C{number}"
        accuracy.plot(line["p"], line["accuracy"], marker="o", color=colour, label=name)
        accuracy.fill_between(line["p"], line["accuracy_low"], line["accuracy_high"], color=colour, alpha=0.15)
        ratio.plot(line["p"], line["visual_token_ratio"], marker="o", color=colour, label=f"{name} visual".strip())
        ratio.plot(line["p"], line["token_ratio"], linestyle="--", color=colour, label=f"{name} all".strip())
    for axes, title in ((accuracy, "accuracy (95% interval)"), (ratio, "token ratio")):
        axes.set(title=title, xlabel="budget p", ylim=(-0.02, 1.02))
    if by:
        accuracy.legend(fontsize=7)
    ratio.legend(fontsize=7)
    return figure


def _layers(rows: pd.DataFrame) -> Figure:
    """Visual token ratio of every layer, one line per budget."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    budgets = sorted(rows["p"].unique())
    for number, p in enumerate(budgets):
        line = rows[rows["p"] == p].sort_values("layer")
        colour = colormaps["viridis"](0.9 - 0.8 * number / max(1, len(budgets) - 1))
        axes.plot(line["layer"], line["visual_token_ratio"], marker="o", color=colour, label=f"p = {p:g}")
    axes.set(title="visual token ratio by layer", xlabel="decoder layer", ylim=(-0.02, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, ncols=2)
    return figure
