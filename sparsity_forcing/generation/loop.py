"""The decode loop: one token a row and step, into buffers that do not move.

Every row stops by itself, has its own budget and its own position; keys and values are appended in place. Nothing in a
step waits for the device, so on a GPU the step is captured once as a CUDA graph and replayed; on the CPU it runs as it
is written. The first steps of a captured loop run uncaptured: real steps, and the warm-up that capturing needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sparsity_kernels import CapacityError
from torch import Tensor
from transformers.cache_utils import Cache

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.generation.forward import decode_step, token_logps

WARM_UP = 3  # uncaptured steps before the capture
GRAPH_FROM = 16  # tokens from which a capture pays
LOOK_EVERY = 8  # steps between two looks at whether all rows have stopped, on a GPU


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. ``temperature`` 0 is greedy. ``suppressed``: ids that are never sampled."""

    temperature: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    suppressed: Tensor


@dataclass(frozen=True)
class Decoded:
    """``tokens``, ``mask``, ``logps``: (rows, tokens); the mask covers sampled tokens, the stop token included.
    ``running``: (rows,) bool, rows that were cut off before they stopped."""

    tokens: Tensor
    mask: Tensor
    logps: Tensor
    running: Tensor


@torch.no_grad()
def decode(
    model,
    cache: Cache,
    logits: Tensor,
    position: Tensor,
    axes: int,
    context: SparseContext,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    cuda_graph: bool | None = None,
    cut_off: Callable[[], bool] = lambda: False,
) -> Decoded:
    """Samples every row until it stops or has ``sampling.max_new_tokens``, or ``cut_off`` says that nobody wants it.

    Args:
        cache: a `pruned_cache` after the prompt. logits: (rows, vocabulary) after the prompt's last token.
        position: (rows,) position of the first new token. axes: of the rotary embedding, 3 if multimodal, else 1.
        generator: source of the samples, on the model's device; needed unless greedy.
        cuda_graph: default: on a CUDA device, from 16 tokens on.

    Raises:
        ValueError: ``cuda_graph`` without a CUDA device.
    """
    on_gpu = logits.is_cuda
    if cuda_graph and not on_gpu:
        raise ValueError(f"a CUDA graph needs a CUDA device, the model is on {logits.device}")
    state = _State(logits, position, sampling, generator)

    def step() -> None:
        state.sample()
        state.logits.copy_(decode_step(model, cache, state.chosen, state.position, axes, context))
        state.position.add_(1)

    graph = None
    uses_graph = (sampling.max_new_tokens >= GRAPH_FROM) if cuda_graph is None else cuda_graph
    for done in range(1, sampling.max_new_tokens + 1):
        if done == sampling.max_new_tokens:
            state.sample()  # its own logits are not needed
            break
        if on_gpu and uses_graph and done > WARM_UP:
            if graph is None:
                graph = _captured(step, cache, sampling.max_new_tokens - done, generator)
            else:
                _advance(cache)
            graph.replay()
        else:
            step()
        if (not on_gpu or done % LOOK_EVERY == 0) and (cut_off() or not bool(state.running.any())):
            break
    return state.result(done)


class _State:
    """The buffers of one loop."""

    def __init__(self, logits: Tensor, position: Tensor, sampling: Sampling, generator: torch.Generator | None) -> None:
        rows, most = len(logits), sampling.max_new_tokens
        self.sampling, self.generator = sampling, generator
        self.logits, self.position = logits.clone(), position.clone()
        self.tokens = torch.full((rows, most), sampling.pad_id, dtype=torch.long, device=logits.device)
        self.mask = torch.zeros(rows, most, dtype=torch.bool, device=logits.device)
        self.logps = torch.zeros(
            rows, most, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device
        )
        self.running = torch.ones(rows, dtype=torch.bool, device=logits.device)
        self.chosen = torch.empty(rows, dtype=torch.long, device=logits.device)
        self.column = torch.zeros(1, dtype=torch.long, device=logits.device)
        self.stop = torch.tensor(sampling.stop_ids, dtype=torch.long, device=logits.device)

    def sample(self) -> None:
        """One token a row from the logits at hand; rows that have stopped get padding."""
        drawn = draw(self.logits, self.sampling, self.generator)
        self.chosen.copy_(torch.where(self.running, drawn, self.sampling.pad_id))
        temperature = self.sampling.temperature or 1.0
        logps = token_logps(self.logits[:, None], self.chosen[:, None], temperature, self.sampling.suppressed)
        self.tokens.index_copy_(1, self.column, self.chosen[:, None])
        self.mask.index_copy_(1, self.column, self.running[:, None])
        self.logps.index_copy_(1, self.column, logps.masked_fill(~self.running[:, None], 0.0))
        self.running.logical_and_(~torch.isin(self.chosen, self.stop))
        self.column.add_(1)

    def result(self, steps: int) -> Decoded:
        used = steps
        if self.mask.is_cuda:  # looks are rare there: drop the columns after the last row stopped
            used = max(1, int(self.mask.any(0).sum()))
        return Decoded(self.tokens[:, :used], self.mask[:, :used], self.logps[:, :used], self.running)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """(rows,) token ids. As torch.multinomial draws one sample, without its checks, which wait for the device."""
    if len(sampling.suppressed):
        logits = logits.index_fill(-1, sampling.suppressed, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)).argmax(-1)


def _captured(step, cache: Cache, steps: int, generator: torch.Generator | None) -> torch.cuda.CUDAGraph:
    """``step`` as a graph. Capturing runs its host side once, so the cache's counts are those after the first replay.

    Raises:
        CapacityError: the cache has no room for ``steps`` more entries a row; nothing was written.
    """
    for layer in cache.layers:
        if layer.ragged.room_left < steps:
            raise CapacityError(
                f"a captured loop needs room for {steps} more tokens, the cache has {layer.ragged.room_left}: "
                "make it with pruned_cache(layers, room=max_new_tokens)"
            )
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph


def _advance(cache: Cache) -> None:
    for layer in cache.layers:
        layer.advance()
