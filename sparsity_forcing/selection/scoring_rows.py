"""Which query rows are summed into the attention mass."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection.layout import PromptLayout


def scoring_rows(layout: PromptLayout, settings: SparsityParams, layer: int) -> Tensor:
    """(batch, prompt) bool: the scoring rows of a layer.

    ``text``: the rows after the visual prefix. ``all``: every row (the paper's formula). ``probe``: the latest rows
    plus random ones (ZipVL), seeded by prompt and layer, so that a row of a batch draws what it draws alone.

    Raises:
        ValueError: ``text`` for a prompt that ends with a visual token: nothing would score it.
    """
    if settings.scoring_rows == "all":
        return layout.valid
    if settings.scoring_rows == "text":
        rows = layout.valid & ~layout.prefix
        unscored = layout.valid.any(-1) & ~rows.any(-1)
        if bool(unscored.any()):
            raise ValueError(
                f"prompt {int(unscored.nonzero()[0])} ends with a visual token, so no text row scores its tokens; let "
                "text follow the image or set scoring_rows to 'probe' or 'all'"
            )
        return rows
    order = layout.valid.cumsum(-1)
    rows = layout.valid & (order > order[:, -1:] - settings.probe_recent)
    generator = torch.Generator()
    for index in range(layout.batch):
        earlier = (layout.valid[index] & ~rows[index]).nonzero().flatten()
        generator.manual_seed((int(layout.seeds[index]) * 1009 + layer * 7919 + settings.probe_seed) % 2**63)
        drawn = torch.randperm(len(earlier), generator=generator)[: settings.probe_random].to(earlier.device)
        rows[index, earlier[drawn]] = True
    return rows
