"""The dense visual prefix of some prompts, kept so that further questions about the same images need not compute it."""

from __future__ import annotations

import hashlib
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
    ``position_ids``: (axes, queries, slots). ``pixels``: SHA-256 of the images' pixels.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    input_ids: Tensor
    valid: Tensor
    position_ids: Tensor
    pixels: str

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
        return cls(keys, values, *_head(prompts), _digest(inputs))

    def cache(self, prompts: Prompts, inputs: dict, group: int, room: int = 0) -> Cache:
        """What `run_prefix` gives for ``prompts``, without running the model.

        Raises:
            ValueError: their visual prefix is another one.
        """
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

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


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
