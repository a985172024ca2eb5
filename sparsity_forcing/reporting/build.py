"""Puts the report together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsity_forcing.files import replace_directory
from sparsity_forcing.lineage import Lineage
from sparsity_forcing.params import Params
from sparsity_forcing.reporting.closing import limits_section, lineage_section, paper_section
from sparsity_forcing.reporting.content import Headline, Measured, cards, headline_text, setting_lines
from sparsity_forcing.reporting.document import Report, Section
from sparsity_forcing.reporting.examples import examples_section
from sparsity_forcing.reporting.inputs import Inputs
from sparsity_forcing.reporting.markdown import FIGURES, render_markdown
from sparsity_forcing.reporting.page import render_html
from sparsity_forcing.reporting.profile import profile_section
from sparsity_forcing.reporting.sections import benchmark_section, efficiency_section, layers_section, training_section


def build_report(
    params: Params,
    inputs: Inputs,
    found: Headline,
    measured: Measured,
    example_ids: Sequence[str],
    lineage: Lineage,
    links: Sequence[tuple[str, str]] = (),
    run_ids: Sequence[str] = (),
    more: Sequence[Section] = (),
) -> Report:
    """The report as a document; nothing is written. ``more``: sections that stand before the comparison with the
    paper."""
    return Report(
        title="Sparsity Forcing: results",
        headline=headline_text(found),
        settings=setting_lines(found, params, inputs, measured),
        cards=cards(found, inputs, measured),
        sections=[
            benchmark_section(inputs, found),
            training_section(inputs, params),
            layers_section(inputs, found, measured),
            examples_section(measured, example_ids),
            efficiency_section(measured),
            profile_section(inputs),
            *more,
            paper_section(inputs, found, params, measured),
            limits_section(params),
            lineage_section(lineage, params, links, run_ids),
        ],
    )


def write_report(report: Report, folder: Path) -> None:
    """Writes index.html, index.md and figures/*.png; ``folder`` is replaced as a whole."""
    with replace_directory(folder) as new:
        (new / FIGURES).mkdir()
        for drawing in report.drawings():
            drawing.save_png(new / FIGURES)
        (new / "index.md").write_text(render_markdown(report), encoding="utf-8")
        (new / "index.html").write_text(render_html(report), encoding="utf-8")
