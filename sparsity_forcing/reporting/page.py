"""The report as one HTML file: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sparsity_forcing.reporting.document import Report
from sparsity_forcing.reporting.drawing import Drawing


def render_html(report: Report) -> str:
    """The page. Everything but the figures is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = _svg
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html.j2").render(report=report)


def _svg(drawing: Drawing) -> Markup:
    return Markup(drawing.inline_svg())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
