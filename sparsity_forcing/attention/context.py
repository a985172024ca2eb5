"""The state of one sparse forward: budgets, kept sets, statistics.

Travels as the keyword argument ``sparse`` of ``model(...)``. A plain class on purpose: a dataclass or dict would be
copied, and its budgets cast, by FSDP; a global would lose its meaning under gradient checkpointing.
"""

from __future__ import annotations

import torch
from sparsity_kernels import attention_mass
from torch import Tensor
from transformers.cache_utils import Cache

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout, scoring_rows, select

_SMALLEST = 1e-30  # below this a mass has no logarithm worth learning from


class SparseContext:
    """One batch of prompts under sparse attention.

    Args:
        settings: how a layer selects.
        layout: the prompts.
        p: (batch,) float32 budgets.
        cache: pruned after selection where given; None in a pass that only replays.
        replay: kept sets per layer, (batch, prompt) bool each; nothing is selected then.
        sigma: scale of the Gaussian selection policy; 0 is deterministic.
        generator: source of the policy's noise, needed to sample with sigma > 0.
        perturbed: per layer the sampled log masses s, (batch, prompt); where given with ``replay`` the pass computes
            their log-density under the current masses, with gradient.

    After the forward ``kept`` (and ``perturbed``, ``selection_logps``) hold one entry per layer.
    """

    def __init__(
        self,
        settings: SparsityParams,
        layout: PromptLayout,
        p: Tensor,
        cache: Cache | None = None,
        replay: dict[int, Tensor] | None = None,
        sigma: float = 0.0,
        generator: torch.Generator | None = None,
        perturbed: dict[int, Tensor] | None = None,
    ) -> None:
        if p.shape != (layout.batch,):
            raise ValueError(f"p must hold one budget per row, shape ({layout.batch},), got {tuple(p.shape)}")
        self.settings, self.layout, self.cache = settings, layout, cache
        self.p = p.to(device=layout.valid.device, dtype=torch.float32)
        self.droppable = layout.droppable(settings)
        self.replay, self.sigma, self.generator = replay, sigma, generator
        self.kept: dict[int, Tensor] = {} if replay is None else replay
        self.perturbed: dict[int, Tensor] = {} if perturbed is None else perturbed
        self.selection_logps: dict[int, Tensor] = {}
        self._scores_density = replay is not None and perturbed is not None and sigma > 0

    def choose(self, layer: int, query: Tensor, key: Tensor, columns: Tensor, scale: float) -> Tensor:
        """The kept set of a layer, selected or replayed.

        Args:
            query: (batch, heads, rows, dim) of the rows at prompt slots ``columns`` (rows,), and maybe rows after them.
            key: (batch, kv_heads, length, dim) with the whole prompt at slots 0 … prompt - 1.

        Returns:
            (batch, prompt) bool.
        """
        if self.replay is not None and not self._scores_density:
            return self.replay[layer]
        mass, seen_by = self._mass(layer, query, key, columns, scale)
        log_mass = self._log_mass(mass) if self.sigma > 0 else None
        if self.replay is not None:
            self.selection_logps[layer] = self._log_density(log_mass, self.perturbed[layer])
            return self.replay[layer]
        if log_mass is not None:
            noise = torch.randn(log_mass.shape, generator=self.generator, device=log_mass.device)
            self.perturbed[layer] = log_mass + self.sigma * noise
            self.selection_logps[layer] = self._log_density(log_mass, self.perturbed[layer])
            mass = self.perturbed[layer].exp()
        settings = self.settings
        chosen = select(mass, seen_by, self.droppable, self.p, settings.rule, settings.rank_by)
        self.kept[layer] = chosen | (self.layout.valid & ~self.droppable)
        return self.kept[layer]

    def stacked_selection_logps(self) -> Tensor:
        """(layers, batch) log-density of the sampled selection; (0, batch) where selection is deterministic."""
        if not self.selection_logps:
            return self.p.new_zeros(0, self.layout.batch)
        return torch.stack([self.selection_logps[layer] for layer in sorted(self.selection_logps)])

    def _mass(self, layer: int, query: Tensor, key: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(batch, prompt) mass and number of scoring rows that see each token."""
        length = self.layout.length
        scores = scoring_rows(self.layout, self.settings, layer)
        first = int(columns[0])
        if first > 0 and bool(scores[:, :first].any()):
            raise RuntimeError(
                f"scoring rows {self.settings.scoring_rows!r} reach into the shared prefix; run the prompt in one pass"
            )
        used = scores.any(0).nonzero().flatten()
        query = query[:, :, used - first]
        slots = torch.arange(length, device=key.device)
        visible = (slots[None, :] <= used[:, None])[None] & self.layout.valid[:, None, :] & scores[:, used][:, :, None]
        return attention_mass(query, key[:, :, :length], visible, scale), visible.sum(1)

    def _log_mass(self, mass: Tensor) -> Tensor:
        """log of the mass normalised over the droppable tokens; 0 elsewhere."""
        masked = mass.masked_fill(~self.droppable, 0.0)
        share = masked / masked.sum(-1, keepdim=True).clamp_min(_SMALLEST)
        return share.masked_fill(~self.droppable, 1.0).clamp_min(_SMALLEST).log()

    def _log_density(self, log_mass: Tensor, sample: Tensor) -> Tensor:
        """(batch,) Gaussian log-density of the sampled log masses, up to a constant."""
        squared = ((sample - log_mass) / self.sigma).square().masked_fill(~self.droppable, 0.0)
        return -0.5 * squared.sum(-1)
