"""Gradient checkpointing of the decoder that keeps the cache.

transformers' own drops the cache in training mode: the visual prefix would not be shared and nothing would be replayed.
Here every layer starts its second run from the state in which its cache layer was at the start of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def layer_checkpoints(model, on: bool = True) -> Iterator[None]:
    """Forwards inside the block keep no activations of decoder layers; the backward pass computes them again.

    The backward pass may run after the block.
    """
    layers = decoder_layers(model) if on else []
    for layer in layers:
        layer.forward = partial(_forward, layer.forward, layer.self_attn.layer_idx)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that have a place in the cache; those of a vision tower have none."""
    return [module for module in model.modules() if hasattr(getattr(module, "self_attn", None), "layer_idx")]


def _forward(layer_forward, index: int, hidden_states, *args, past_key_values=None, **kwargs):
    stored = past_key_values.layers[index]
    before = dict(vars(stored))

    def run(hidden_states):
        vars(stored).clear()
        vars(stored).update(before)
        return layer_forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)

    return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)
