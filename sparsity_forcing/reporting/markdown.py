"""The report as Markdown, with its figures as PNG files beside it."""

from __future__ import annotations

from collections.abc import Callable

from sparsity_forcing.reporting.document import Block, Code, Example, Links, Missing, Plot, Report, Table, Text
from sparsity_forcing.reporting.drawing import Drawing

FIGURES = "figures"


def render_markdown(report: Report) -> str:
    lines = [f"# {report.title}", "", f"**{report.headline}**", ""]
    lines += _grid(["Setting", ""], [[name, value] for name, value in report.settings])
    lines += ["", *_grid(["", "", ""], [[card.label, f"**{card.value}**", card.detail] for card in report.cards])]
    for section in report.sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", render_block(block)]
    return "\n".join(lines) + "\n"


def render_block(block: Block) -> str:
    """One block, without a line break at its end."""
    return "\n".join(_RENDER[type(block)](block))


def _text(block: Text) -> list[str]:
    return [block.text]


def _missing(block: Missing) -> list[str]:
    return [f"{block.what}: **not measured** ({block.reason})."]


def _table(block: Table) -> list[str]:
    labels = [f"{column.group}: {column.label}" if column.group else column.label for column in block.columns]
    rows = [[f"**{cell}**" if i in block.highlight else cell for cell in row] for i, row in enumerate(block.rows)]
    return [f"*{block.caption}*", "", *_grid(labels, rows, [column.numeric for column in block.columns])]


def _plot(block: Plot) -> list[str]:
    return [_image(block.drawing), "", f"*{block.drawing.caption}*"]


def _example(block: Example) -> list[str]:
    facts = "; ".join(f"{name}: {value}" for name, value in block.facts)
    return [f"**{block.question}** {facts}", "", _image(block.drawing), "", f"*{block.drawing.caption}*"]


def _code(block: Code) -> list[str]:
    body = block.text.rstrip("\n")
    return [f"<details><summary>{block.caption}</summary>", "", "```yaml", body, "```", "", "</details>"]


def _links(block: Links) -> list[str]:
    return [*(f"- [{label}]({url})" for label, url in block.links), *(["", block.note] if block.note else [])]


def _image(drawing: Drawing) -> str:
    return f"![{drawing.alt}]({FIGURES}/{drawing.name}.png)"


def _grid(header: list[str], rows: list[list[str]], numeric: list[bool] | None = None) -> list[str]:
    numeric = numeric or [False] * len(header)
    rule = ["---:" if right else "---" for right in numeric]
    return [_line(header), _line(rule), *(_line(row) for row in rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


_RENDER: dict[type, Callable[[Block], list[str]]] = {
    Text: _text,
    Missing: _missing,
    Table: _table,
    Plot: _plot,
    Example: _example,
    Code: _code,
    Links: _links,
}
