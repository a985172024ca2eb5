"""Example questions with their kept tokens drawn per layer: base above, policy below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sparsity_forcing.models.prompts import to_pil
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.content import Measured
from sparsity_forcing.reporting.document import Block, Example, Missing, Section, Strip, Text
from sparsity_forcing.reporting.drawing import Drawing, new_figure
from sparsity_forcing.reporting.kept import KeptRow
from sparsity_forcing.reporting.overlays import draw_kept, outline_cells, png

LAYERS_SHOWN = 8


def examples_section(measured: Measured, ids: Sequence[str]) -> Section:
    """The questions with these row ids."""
    title = "Kept tokens on test images"
    if "policy" not in measured.kept or "base" not in measured.kept:
        return Section("examples", title, [Missing(title, measured.missing["kept"])])
    by_id = {name: {item.row.id: item for item in kept.rows} for name, kept in measured.kept.items()}
    blocks: list[Block] = []
    for number, row_id in enumerate(ids, start=1):
        base, policy = by_id["base"][row_id], by_id["policy"][row_id]
        if base.cells is not None and policy.cells is not None:
            blocks.append(_example(number, base, policy))
    if not blocks:
        reason = "report.examples is 0, or the visual tokens of this data and model form no grid"
        return Section("examples", title, [Missing(title, reason)])
    intro = (
        "The first test question of each task, chosen by place and not by outcome. Kept visual tokens show the "
        "picture, dropped ones are washed out. Frames mark what the question asks for, where the data says so."
    )
    return Section("examples", title, [Text(intro), *blocks])


def _example(number: int, base: KeptRow, policy: KeptRow) -> Example:
    image = to_pil(policy.row.images[0])
    rows, columns = policy.cells.shape[1:]
    shown = layers_to_show(len(policy.cells))
    picture = outline_cells(image, rows, columns, policy.row.meta.get("relevant_cells", []))
    overlays = {
        f"{name}, keeps {fmt.percent(item.visual_token_ratio)} of {item.visual_tokens} visual tokens": [
            (draw_kept(image, item.cells[layer]), f"layer {layer} · {fmt.percent(item.cells[layer].mean(), 0)}")
            for layer in shown
        ]
        for name, item in (("Base", base), ("Policy", policy))
    }
    return Example(
        question=policy.row.question,
        facts=[
            ("Correct answer", policy.row.answer),
            ("Base answers", base.answer or "(nothing)"),
            ("Policy answers", policy.answer or "(nothing)"),
            ("Task", policy.row.label),
        ],
        picture=png(picture),
        strips=[Strip(label, [(png(i), text) for i, text in items]) for label, items in overlays.items()],
        drawing=Drawing(
            f"kept_{number}",
            lambda: _sheet(picture, overlays),
            f"“{policy.row.question}” Kept visual tokens per layer, base above, policy below; the rest is washed out.",
            "Kept visual tokens drawn over the picture for each layer.",
        ),
    )


def layers_to_show(layers: int) -> list[int]:
    """All layers, or ``LAYERS_SHOWN`` at even distances from the first to the last."""
    if layers <= LAYERS_SHOWN:
        return list(range(layers))
    return np.linspace(0, layers - 1, LAYERS_SHOWN).round().astype(int).tolist()


def _sheet(picture: Image.Image, overlays: dict[str, list[tuple[Image.Image, str]]]) -> Figure:
    """All pictures of one question on one sheet, for readers of the Markdown."""
    columns = 1 + len(next(iter(overlays.values())))
    figure = new_figure(1.25 * columns, 3.3)
    panels = figure.subplots(len(overlays), columns)
    for axes in panels.flat:
        axes.axis("off")
    panels[0, 0].imshow(picture, interpolation="nearest")
    for line, (label, items) in zip(panels, overlays.items(), strict=True):
        for axes, (overlay, text) in zip(line[1:], items, strict=True):
            axes.imshow(overlay, interpolation="nearest")
            axes.set_title(text, fontsize=8, fontweight="normal", loc="center")
        line[0].set_title(label.partition(",")[0], fontsize=9)
    return figure
