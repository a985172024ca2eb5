"""What sparse attention should compute, from transformers' own eager attention and explicit masks.

Nothing of `sparsity_forcing.attention` is used. Explicit masks take the place of those of transformers, selection is
brute force on the maps that eager attention returns, and generated tokens see kept tokens only because a mask over the
whole sequence says so: there is no cache and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from brute_force import brute_force_selection
from torch import Tensor

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout, scoring_rows

HIDDEN = -1e30  # finite: a padding row that sees nothing must not become NaN


class Oracle:
    """Sparse attention of one batch of prompts.

    Args:
        model: plain; its decoder is eager while the oracle runs.
        inputs: what the model takes. layout: of the prompts in ``inputs``.
        settings: how layers select. p: (batch,) budgets.
    """

    def __init__(self, model, inputs: dict, layout: PromptLayout, settings: SparsityParams, p: Tensor) -> None:
        self.model, self.inputs, self.layout, self.settings, self.p = model, inputs, layout, settings, p
        self.layers = model.model.language_model.layers
        self.kept: list[Tensor] = []
        while len(self.kept) < len(self.layers):  # layer by layer: what one drops, the next one feels
            self.kept.append(self._select(len(self.kept)))

    @property
    def token_ratio(self) -> Tensor:
        shares = [kept.sum(-1) / self.layout.valid.sum(-1) for kept in self.kept]
        return torch.stack(shares).mean(0)

    @torch.no_grad()
    def logits(self, inputs: dict) -> Tensor:
        """(batch, prompt + completion, vocabulary) logits; ``inputs`` are the prompts with what follows them."""
        with self._masked(inputs):
            return self.model(**inputs, use_cache=False).logits

    @torch.no_grad()
    def _select(self, layer: int) -> Tensor:
        """The kept set of ``layer``: those before it are sparse, it and those after it dense."""
        maps: list[Tensor] = []
        catch = self.layers[layer].self_attn.register_forward_hook(lambda *call: maps.append(call[-1][1].mean(1)))
        with self._masked(self.inputs):
            self.model(**self.inputs, use_cache=False)
        catch.remove()
        rows = scoring_rows(self.layout, self.settings, layer)
        valid, droppable = self.layout.valid, self.layout.droppable(self.settings)
        kept = valid & ~droppable
        for row in range(len(valid)):
            scores = rows[row].nonzero().flatten().tolist()
            kept[row] |= torch.tensor(
                brute_force_selection(
                    maps[0][row, scores].sum(0).tolist(),
                    [sum(place <= score for score in scores) for place in range(valid.shape[1])],
                    droppable[row].tolist(),
                    float(self.p[row]),
                    self.settings.rule,
                    self.settings.rank_by,
                )
            )
        return kept

    @contextmanager
    def _masked(self, inputs: dict) -> Iterator[None]:
        """Puts the masks of this oracle in the place of those of transformers."""
        before = self.model.config.get_text_config()._attn_implementation
        self.model.set_attn_implementation({"text_config": "eager"})
        handles = []
        for index, layer in enumerate(self.layers):
            kept = self.kept[index] if index < len(self.kept) else None
            visible, answered = self._visible(kept, inputs["attention_mask"].bool())
            handles.append(layer.register_forward_pre_hook(_with_mask(visible), with_kwargs=True))
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(_silencing(answered)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.model.set_attn_implementation({"text_config": before})

    def _visible(self, kept: Tensor | None, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, rows, keys): what each row sees; (batch, rows): whether its attention output counts."""
        batch, length = valid.shape
        visible = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, :]
        answered = torch.ones(batch, length, dtype=torch.bool)
        if kept is None:
            return visible, answered
        prompt = kept.shape[1]
        for row in range(batch):
            sparse_rows = torch.ones(length, dtype=torch.bool)
            if self.settings.prefill == "dense":
                sparse_rows[:prompt] = False
            if self.settings.prefill == "suffix":
                sparse_rows[:prompt] = ~self.layout.prefix[row]
            dropped = [key for key in range(prompt) if not kept[row, key]]
            for key in dropped:
                visible[row, sparse_rows, key] = False
            if self.settings.prefill == "sparse":
                answered[row, dropped] = False
        return visible, answered


def _with_mask(visible: Tensor):
    def hook(module, args, kwargs):
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, HIDDEN)
        return args, {**kwargs, "attention_mask": mask[:, None]}

    return hook


def _silencing(answered: Tensor):
    def hook(module, args):
        return (args[0] * answered[..., None], *args[1:])

    return hook
