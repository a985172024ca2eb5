"""The update pass: log-probabilities of given rollouts under their own kept sets."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.generation.forward import run_prefix, run_rest, token_logps
from sparsity_forcing.generation.prompts import Prompts, shares_prefix
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.layer_checkpoints import layer_checkpoints
from sparsity_forcing.rl.rollout import Rollouts
from sparsity_forcing.rl.sharding import uncounted_prefix


class Replay(nn.Module):
    """Both passes of the update in one forward, so that a data-parallel wrapper sees one call per backward.

    Args:
        settings: how a layer selects. temperature: of the rollouts. suppressed: ids that are never sampled.
        logits_chunk: tokens whose logits exist at a time; all at once where None.
        gradient_checkpointing: compute the decoder's activations again in the backward pass.
        attention_dtype: of attention among kept tokens, that of the rollouts; the model's where None.
        prefix_always: run a prefix in batches without images too, so that all processes run every layer as often.
    """

    def __init__(
        self,
        model,
        settings: SparsityParams,
        temperature: float,
        suppressed: Tensor,
        logits_chunk: int | None = None,
        gradient_checkpointing: bool = False,
        attention_dtype: torch.dtype | None = None,
        prefix_always: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings, self.temperature, self.suppressed = settings, temperature, suppressed
        self.logits_chunk, self.gradient_checkpointing = logits_chunk, gradient_checkpointing
        self.attention_dtype, self.prefix_always = attention_dtype, prefix_always

    def forward(self, prompts: Prompts, rollouts: Rollouts, group: int) -> tuple[Tensor, Tensor]:
        """(rows, tokens) log-probabilities and (layers, rows) log-density of the sampled selection, with gradient.

        The visual prefix is computed once per query; completions of a group share its keys and values.
        """
        with layer_checkpoints(self.model, self.gradient_checkpointing):
            cache = run_prefix(self.model, prompts, group)
            context = SparseContext(
                self.settings,
                prompts.layout.repeat(group),
                rollouts.p,
                cache,
                replay=rollouts.kept,
                sigma=rollouts.sigma,
                perturbed=rollouts.perturbed or None,
                attention_dtype=self.attention_dtype,
            )
            logps = self._logps(self.model, prompts, rollouts, group, cache, context)
            if self.prefix_always and shares_prefix(self.settings) and not prompts.prefix:
                logps = logps + uncounted_prefix(self.model, prompts.input_ids[:1, -1:])
        return logps, context.stacked_selection_logps()

    @torch.no_grad()
    def reference_logps(self, model, prompts: Prompts, rollouts: Rollouts, group: int) -> Tensor:
        """(rows, tokens) log-probabilities of the rollouts under the frozen dense reference ``model``."""
        return self._logps(model, prompts, rollouts, group, run_prefix(model, prompts, group), None)

    def _logps(
        self, model, prompts: Prompts, rollouts: Rollouts, group: int, cache: Cache, sparse: SparseContext | None
    ) -> Tensor:
        tokens, mask = rollouts.completions, rollouts.completion_mask
        keep = tokens.shape[1] + 1
        if self.logits_chunk is None:
            logits = run_rest(model, prompts, group, cache, tokens, mask, sparse, keep)[:, :-1]
            return token_logps(logits, tokens, self.temperature, self.suppressed).masked_fill(~mask, 0.0)
        hidden = run_rest(_Headless(model), prompts, group, cache, tokens, mask, sparse, keep)[:, :-1]
        real, chosen = hidden[mask], tokens[mask]  # completion tokens only
        parts = [
            checkpoint(self._chunk_logps, model, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(real.split(self.logits_chunk), chosen.split(self.logits_chunk), strict=True)
        ]
        found = torch.cat(parts)
        return found.new_zeros(tokens.shape).masked_scatter(mask, found)

    def _chunk_logps(self, model, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(tokens,) log-probabilities; their logits live in this call only, the backward pass computes them again."""
        return token_logps(model.lm_head(hidden), tokens, self.temperature, self.suppressed)


class _Headless:
    """Stands in for a model in `run_rest`: what its output head would get, in the place of the logits."""

    def __init__(self, model) -> None:
        self.config, self._model = model.config, model

    def __call__(self, logits_to_keep: int, **inputs) -> SimpleNamespace:
        hidden = self._model.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=hidden[:, -logits_to_keep:])
