"""The update pass: log-probabilities of given rollouts under their own kept sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.generation.forward import run_prefix, run_rest, token_logps
from sparsity_forcing.generation.prompts import Prompts
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.rollout import Rollouts


class Replay(nn.Module):
    """Both passes of the update in one forward, so that a data-parallel wrapper sees one call per backward."""

    def __init__(self, model, settings: SparsityParams, temperature: float, suppressed: Tensor, sigma: float) -> None:
        super().__init__()
        self.model = model
        self.settings, self.temperature, self.suppressed, self.sigma = settings, temperature, suppressed, sigma

    def forward(self, prompts: Prompts, rollouts: Rollouts, group: int) -> tuple[Tensor, Tensor]:
        """(rows, tokens) log-probabilities and (layers, rows) log-density of the sampled selection, with gradient.

        The visual prefix is computed once per query; completions of a group share its keys and values.
        """
        cache = run_prefix(self.model, prompts, group)
        context = SparseContext(
            self.settings,
            prompts.layout.repeat(group),
            rollouts.p,
            cache,
            replay=rollouts.kept,
            sigma=self.sigma,
            perturbed=rollouts.perturbed or None,
        )
        logps = _logps(self.model, prompts, rollouts, group, cache, context, self.temperature, self.suppressed)
        return logps, context.stacked_selection_logps()


@torch.no_grad()
def reference_logps(
    model, prompts: Prompts, rollouts: Rollouts, group: int, temperature: float, suppressed: Tensor
) -> Tensor:
    """(rows, tokens) log-probabilities of the rollouts under the frozen dense reference."""
    cache = run_prefix(model, prompts, group)
    return _logps(model, prompts, rollouts, group, cache, None, temperature, suppressed)


def _logps(
    model,
    prompts: Prompts,
    rollouts: Rollouts,
    group: int,
    cache: Cache,
    sparse: SparseContext | None,
    temperature: float,
    suppressed: Tensor,
) -> Tensor:
    tokens = rollouts.completions
    keep = tokens.shape[1] + 1
    logits = run_rest(model, prompts, group, cache, tokens, rollouts.completion_mask, sparse, keep)[:, :-1]
    return token_logps(logits, tokens, temperature, suppressed).masked_fill(~rollouts.completion_mask, 0.0)
