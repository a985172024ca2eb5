"""Prompts of a batch, cut at the end of the visual prefix.

The visual prefix depends on neither the budget nor the question, so it is computed once per query and shared by the
query's rollouts. Both parts are padded on the left, so that every prefix ends in the same column.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity_forcing.generation import encoded_images
from sparsity_forcing.models.families import visual_token_ids
from sparsity_forcing.models.prompts import to_device
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

_TEXT_INPUTS = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}


@dataclass(frozen=True)
class Prompts:
    """``queries`` prompts of ``prefix`` + ``suffix`` slots.

    ``input_ids``: (queries, prompt). ``position_ids``: (axes, queries, prompt), axes 3 for multimodal rotary
    embeddings, else 1. ``next_position``: (queries,) position of the first generated token. ``prefix``: slots of the
    shared visual prefix; 0 where nothing is shared. ``media``: pixel inputs or encoded features of all queries.
    """

    input_ids: Tensor
    layout: PromptLayout
    position_ids: Tensor
    next_position: Tensor
    prefix: int
    media: dict

    @property
    def queries(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def take(self, queries: Tensor, media: dict | None = None) -> Prompts:
        """Some of the prompts, padded as they are here; ``queries`` (some,) may name one more than once.

        ``media``: theirs, needed where it is not encoded images.
        """
        layout = self.layout
        return replace(
            self,
            input_ids=self.input_ids[queries],
            layout=layout.take(queries),
            position_ids=self.position_ids[:, queries],
            next_position=self.next_position[queries],
            media=encoded_images.take(self.media, layout.visual.sum(-1), queries) if media is None else media,
        )


def shares_prefix(settings: SparsityParams) -> bool:
    """Whether the visual prefix is the same for every budget under these settings."""
    return settings.prefill != "sparse" and settings.scoring_rows == "text"


def build_prompts(model, inputs: dict, settings: SparsityParams, encode_images: bool = True) -> Prompts:
    """Cuts a processor's left-padded inputs into prefix and suffix.

    Args:
        model: gives positions and image features.
        inputs: ``input_ids``, ``attention_mask`` (queries, length; all real where missing) and the family's media.
        settings: decide whether there is a shared prefix.
        encode_images: run the vision tower now, without gradient (a frozen tower), instead of in every pass.

    Raises:
        ValueError: a prompt is padded on the right.
    """
    inputs = to_device(inputs, model)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if not bool(mask[:, -1].all()):
        raise ValueError('prompts must be padded on the left: set processor.tokenizer.padding_side = "left"')
    layout = PromptLayout.from_tokens(input_ids, mask, visual_token_ids(model.config))
    positions, following = _positions(model, inputs)
    media = {name: value for name, value in inputs.items() if name not in _TEXT_INPUTS}
    if encode_images:
        media = encoded_images.encode(model, media)
    if not shares_prefix(settings) or not bool(layout.prefix.any()):
        return Prompts(input_ids, layout, positions, following, 0, media)

    index, real, prefix = _cut(layout)
    pick = lambda tensor: tensor.gather(1, index)  # noqa: E731
    cut = PromptLayout(real, pick(layout.visual) & real, torch.zeros_like(real), layout.seeds)
    cut.prefix[:, :prefix] = real[:, :prefix]
    pad = model.generation_config.pad_token_id or 0
    return Prompts(
        input_ids=pick(input_ids).masked_fill(~real, pad),
        layout=cut,
        position_ids=positions.gather(2, index[None].expand(len(positions), -1, -1)).masked_fill(~real, 0),
        next_position=following,
        prefix=prefix,
        media=media,
    )


def _cut(layout: PromptLayout) -> tuple[Tensor, Tensor, int]:
    """Source column of every new slot, whether the slot is real, and the number of prefix slots."""
    total = layout.length
    prefixes, counts = layout.prefix.sum(-1), layout.valid.sum(-1)
    padding = total - counts
    longest_prefix, longest_suffix = int(prefixes.max()), int((counts - prefixes).max())
    slots = torch.arange(longest_prefix, device=counts.device)
    prefix_index = padding[:, None] + slots - (longest_prefix - prefixes)[:, None]
    prefix_real = slots >= (longest_prefix - prefixes)[:, None]
    slots = torch.arange(longest_suffix, device=counts.device)
    suffix_index = (total - longest_suffix + slots).expand(len(counts), -1)
    suffix_real = slots >= (longest_suffix - (counts - prefixes))[:, None]
    index = torch.cat([prefix_index.clamp_min(0), suffix_index], dim=1)
    return index, torch.cat([prefix_real, suffix_real], dim=1), longest_prefix


def _positions(model, inputs: dict) -> tuple[Tensor, Tensor]:
    """(axes, queries, length) positions and the (queries,) position that follows."""
    mask = inputs["attention_mask"]
    text = (mask.long().cumsum(-1) - 1).clamp_min(0)
    index = getattr(model.model, "get_rope_index", None)
    has_media = any(name in inputs for name in ("image_grid_thw", "video_grid_thw"))
    if index is None:
        return text[None], text[:, -1] + 1
    if not has_media:
        return text[None].expand(3, -1, -1), text[:, -1] + 1
    accepted = inspect.signature(index).parameters
    positions, deltas = index(**{name: value for name, value in inputs.items() if name in accepted})
    return positions, text[:, -1] + 1 + deltas.flatten()
