"""How every figure looks, and how it becomes SVG inside the page or a PNG beside it.

A figure is drawn afresh for each use. In the page its ink and grid are placeholder colours that become CSS variables,
so that it follows the reader's light or dark setting; in a PNG they are fixed colours on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from sparsity_forcing.files import replace_file

BASE, POLICY, NEUTRAL, VIOLET = "#2f7ed8", "#d9650d", "#8a8f98", "#8262d0"  # readable on white and on near-black
INK_PLACEHOLDER, RULE_PLACEHOLDER = "#010203", "#040506"
PNG_INK, PNG_RULE = "#22262b", "#d9dde2"


def style(ink: str, rule: str) -> dict:
    """Matplotlib settings with this colour for text and that one for axes and grid."""
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "axes.edgecolor": rule,
        "xtick.color": rule,
        "ytick.color": rule,
        "grid.color": rule,
        "grid.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "lines.linewidth": 1.8,
        "lines.markersize": 6,
    }


@dataclass(frozen=True)
class Drawing:
    """A figure: how to draw it, its file name, the caption under it and the text for readers who cannot see it."""

    name: str
    draw: Callable[[], Figure]
    caption: str
    alt: str

    def inline_svg(self) -> str:
        """An ``<svg>`` element: text stays text, ink follows the page, identifiers are this figure's own."""
        buffer = io.StringIO()
        with matplotlib.rc_context({**style(INK_PLACEHOLDER, RULE_PLACEHOLDER), "svg.hashsalt": self.name}):
            self.draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = svg.replace(INK_PLACEHOLDER, "var(--ink)").replace(RULE_PLACEHOLDER, "var(--rule)")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", svg)
        view_box = re.search(r'viewBox="([^"]+)"', svg).group(1)
        head = (
            f'<svg class="plot" role="img" aria-labelledby="{self.name}-alt" viewBox="{view_box}" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
            f'<title id="{self.name}-alt">{escape(self.alt)}</title>'
        )
        return head + svg[svg.index(">") + 1 :]

    def save_png(self, folder: Path) -> Path:
        """Writes ``NAME.png`` with dark ink on white."""
        path = folder / f"{self.name}.png"
        with replace_file(path) as temporary, matplotlib.rc_context(style(PNG_INK, PNG_RULE)):
            self.draw().savefig(temporary, dpi=144, facecolor="white", metadata={"Software": None})
        return path


def new_figure(width: float = 7.2, height: float = 3.6) -> Figure:
    """A figure in inches."""
    return Figure(figsize=(width, height), layout="constrained")
