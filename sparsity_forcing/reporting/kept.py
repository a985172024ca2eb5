"""Which tokens each layer keeps, base against policy, on the same test questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sparsity_forcing.data.schema import Row
from sparsity_forcing.methods import Method
from sparsity_forcing.models.prompts import encode_prompts, to_device

ASKED, OTHER_DIGITS, BACKGROUND = "asked digits", "other coloured digits", "everything else"


@dataclass(frozen=True)
class KeptRow:
    """One question. ``cells``: (layers, rows, columns) bool of its first image, None where tokens form no grid."""

    row: Row
    answer: str
    visual_tokens: int
    visual_token_ratio: float
    cells: np.ndarray | None


@dataclass(frozen=True)
class Kept:
    """``by_kind``: for cells of the digits source, by what they show, the share kept in each layer."""

    rows: list[KeptRow]
    by_kind: dict[str, list[float]] = field(default_factory=dict)


def measure_kept(
    model,
    processor,
    rows: Sequence[Row],
    method: Method,
    max_new_tokens: int,
    batch_size: int = 16,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Kept:
    """Answers ``rows`` greedily with ``method`` and notes what every layer kept."""
    kept_rows: list[KeptRow] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = encode_prompts(processor, [row.question for row in batch], [row.images for row in batch])
        inputs = to_device(inputs, model)
        with method.attend(model) as stats, torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        kept_rows += _rows_of(batch, inputs, output, stats, processor)
        on_rows(len(batch))
    return Kept(kept_rows, kept_by_kind(kept_rows))


def _rows_of(batch: Sequence[Row], inputs: dict, output: torch.Tensor, stats, processor) -> list[KeptRow]:
    layers = stats.layer_ratio.shape[0]
    kept = torch.stack([stats.kept(layer) for layer in range(layers)]).cpu()  # (layers, batch, prompt)
    visual = stats.visual.cpu()
    prompt = inputs["input_ids"].shape[1]
    answers = processor.batch_decode(output[:, prompt:], skip_special_tokens=True)
    grids = image_grids(inputs, processor)
    first_images = np.cumsum([0, *(len(row.images) for row in batch)])
    result = []
    for i, row in enumerate(batch):
        grid = grids[first_images[i]] if grids is not None and row.images else None
        cells = None
        if grid is not None:
            flags = kept[:, i, visual[i]].numpy()[:, : grid[0] * grid[1]]
            cells = flags.reshape(layers, *grid)
        result.append(
            KeptRow(
                row=row,
                answer=answers[i].strip(),
                visual_tokens=int(visual[i].sum()),
                visual_token_ratio=float(stats.visual_token_ratio[i]),
                cells=cells,
            )
        )
    return result


def image_grids(inputs: dict, processor) -> list[tuple[int, int]] | None:
    """(rows, columns) of the visual tokens of every image, or None for families that do not state it.

    The Qwen-VL family states patches per image in ``image_grid_thw``; ``merge_size``² patches make one token.
    """
    sizes = inputs.get("image_grid_thw")
    if sizes is None:
        return None
    merge = processor.image_processor.merge_size
    return [(int(height) // merge, int(width) // merge) for _, height, width in sizes.tolist()]


def kept_by_kind(rows: Sequence[KeptRow]) -> dict[str, list[float]]:
    """Share of cells kept per layer for each kind of cell; empty where the rows do not say what their cells show."""
    kept: dict[str, list[np.ndarray]] = {ASKED: [], OTHER_DIGITS: [], BACKGROUND: []}
    for item in rows:
        if item.cells is None or not {"relevant_cells", "coloured_cells"} <= item.row.meta.keys():
            continue
        flat = item.cells.reshape(len(item.cells), -1)
        asked, coloured = set(item.row.meta["relevant_cells"]), set(item.row.meta["coloured_cells"])
        kinds = {
            ASKED: sorted(asked),
            OTHER_DIGITS: sorted(coloured - asked),
            BACKGROUND: sorted(set(range(flat.shape[1])) - coloured),
        }
        for kind, cells in kinds.items():
            if cells:
                kept[kind].append(flat[:, cells].mean(axis=1))
    return {kind: np.mean(values, axis=0).tolist() for kind, values in kept.items() if values}


def first_of_each(rows: Sequence[Row], count: int, key: Callable[[Row], str]) -> list[Row]:
    """``count`` rows: the first of every key, then the second of every key, and so on, in the order of the split.

    Rows are picked by place alone, never by how they were answered.
    """
    seen: dict[str, int] = {}
    turns = []
    for place, row in enumerate(rows):
        turn = seen.get(key(row), 0)
        seen[key(row)] = turn + 1
        turns.append((turn, place))
    return [rows[place] for _, place in sorted(turns)[:count]]
