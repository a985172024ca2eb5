"""The dense visual prefix of some prompts, kept so that further questions about the same images need not compute it."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparsity_forcing.attention.cache import pruned_cache
from sparsity_forcing.generation.forward import run_prefix
from sparsity_forcing.generation.prompts import Prompts


@dataclass(frozen=True)
class VisualPrefix:
    """Keys and values of everything up to the last visual token, before any selection.

    ``keys``, ``values``: per layer (queries, key heads, slots, head dim). ``input_ids``, ``valid``: (queries, slots).
    ``position_ids``: (axes, queries, slots). ``pixels``: SHA-256 of the images' pixels. ``model``: whose they are; that
    its weights have not changed since is for the caller to know. It lives in this process alone.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    input_ids: Tensor
    valid: Tensor
    position_ids: Tensor
    pixels: str
    model: weakref.ref

    @classmethod
    def of(cls, model, prompts: Prompts, inputs: dict) -> VisualPrefix:
        """Computes that of ``prompts``, which are made of a processor's ``inputs``.

        Raises:
            ValueError: no prompt has an image, or these settings share no prefix.
        """
        if not prompts.prefix:
            raise ValueError("there is no visual prefix to keep: the prompts show no image, or the settings share none")
        layers = run_prefix(model, prompts, 1).layers
        keys, values = (tuple(getattr(layer, name) for layer in layers) for name in ("keys", "values"))
        return cls(keys, values, *_head(prompts), _digest(inputs), weakref.ref(model))

    def cache(self, model, prompts: Prompts, inputs: dict, group: int, room: int = 0) -> Cache:
        """What `run_prefix` gives for ``prompts``, without running the model.

        Raises:
            ValueError: their visual prefix is another one, or another model's.
        """
        if self.model() is not model:
            raise ValueError(
                "this visual prefix was kept by another model, or by another copy of this one: give it to the model "
                "object that made it, or keep one anew"
            )
        kept = (self.input_ids, self.valid, self.position_ids)
        same = all(torch.equal(one, other) for one, other in zip(kept, _head(prompts), strict=True))
        if not same or self.pixels != _digest(inputs):
            raise ValueError(
                "these prompts do not begin as those whose visual prefix was kept: the same images, in the same rows "
                "of the batch, after the same text"
            )
        cache = pruned_cache(len(self.keys), room)
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            layer.update(keys, values)
        cache.batch_repeat_interleave(group)
        return cache


def _digest(inputs: dict) -> str:
    digest = hashlib.sha256()
    for name in sorted(name for name in inputs if name.startswith("pixel_values")):
        pixels = inputs[name].detach().contiguous().cpu()
        digest.update(f"{name}{pixels.dtype}{tuple(pixels.shape)}".encode())
        digest.update(pixels.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _head(prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which slots are real, and positions, of the prefix."""
    columns = slice(0, prompts.prefix)
    return prompts.input_ids[:, columns], prompts.layout.valid[:, columns], prompts.position_ids[:, :, columns]
