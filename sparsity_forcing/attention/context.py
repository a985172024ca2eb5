"""The state of one sparse forward: budgets, kept sets, statistics.

Travels as the keyword argument ``sparse`` of ``model(...)``. A plain class on purpose: a dataclass or dict would be
copied, and its budgets cast, by FSDP; a global would lose its meaning under gradient checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparsity_kernels import attention_mass
from torch import Tensor
from transformers.cache_utils import Cache

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout, scoring_rows, select

_SMALLEST = 1e-30  # below this a mass has no logarithm worth learning from


@dataclass(frozen=True)
class _Scoring:
    """Scoring rows of one layer: the ``count`` columns (from slot ``first`` on) in which a prompt has one, ``slots``
    (batch, count) with -1 where a prompt has none, and ``seen_by`` (batch, prompt), how many rows see each token."""

    first: int
    count: int
    columns: Tensor
    slots: Tensor
    seen_by: Tensor


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
        attention_dtype: of attention among kept tokens; the model's where None. Selection stays in float32.

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
        attention_dtype: torch.dtype | None = None,
    ) -> None:
        if p.shape != (layout.batch,):
            raise ValueError(f"p must hold one budget per row, shape ({layout.batch},), got {tuple(p.shape)}")
        if not bool(((p > 0) & (p <= 1)).all()):
            raise ValueError(f"budgets p must be in (0, 1], got {p.tolist()}")
        if sigma > 0 and generator is None and replay is None:
            raise ValueError(f"sampling a selection with sigma {sigma} needs a generator")
        self.settings, self.layout, self.cache = settings, layout, cache
        self.p = p.to(device=layout.valid.device, dtype=torch.float32)
        self.droppable = layout.droppable(settings)
        self.replay, self.sigma, self.generator = replay, sigma, generator
        self.attention_dtype = attention_dtype
        self.kept: dict[int, Tensor] = {} if replay is None else replay
        self.perturbed: dict[int, Tensor] = {} if perturbed is None else perturbed
        self.selection_logps: dict[int, Tensor] = {}
        self._scores_density = replay is not None and perturbed is not None and sigma > 0
        # What decides the shapes is read from a copy on the host, once, so that no layer waits for the device.
        self._host_layout = layout.to("cpu")
        self._scorings: dict[int, _Scoring] = {}
        self._finite: list[Tensor] = []
        self.padded = not bool(self._host_layout.valid.all())
        until = self._host_layout.prefix.int().cumsum(-1).argmax(-1) + 1  # the last visual token's slot, and one
        until = torch.where(self._host_layout.prefix.any(-1), until, 0)
        if settings.prefill == "dense":
            until = torch.full_like(until, layout.length)
        self.dense_until = (int(until.min()), int(until.max()))
        self.dense_rows = torch.arange(layout.length) < until[:, None]
        self.dense_rows = self.dense_rows.to(layout.valid.device)

    def choose(self, layer: int, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        """The kept set of a layer, selected or replayed.

        Args:
            query: (batch, heads, rows, dim) of the rows at prompt slots ``first``, ``first + 1``, … to the prompt's end
                and maybe beyond it.
            key: (batch, kv_heads, length, dim) with the whole prompt at slots 0 … prompt - 1.

        Returns:
            (batch, prompt) bool.

        Raises:
            ValueError: a mass is not finite. On a GPU, where nobody waits for the mass, `check` raises it.
        """
        if self.replay is not None and not self._scores_density:
            return self.replay[layer]
        mass = self.mass(layer, query, key, first, scale)
        log_mass = self.log_share(mass) if self.sigma > 0 else None
        if self.replay is not None:
            self.selection_logps[layer] = self._log_density(log_mass, self.perturbed[layer])
            return self.replay[layer]
        if log_mass is not None:
            noise = torch.randn(log_mass.shape, generator=self.generator, device=log_mass.device)
            self.perturbed[layer] = (log_mass + self.sigma * noise).detach()
            self.selection_logps[layer] = self._log_density(log_mass, self.perturbed[layer])
            mass = self.perturbed[layer].exp()
        self._finite.append(torch.isfinite(mass.masked_fill(~self.droppable, 0)).all())
        if not mass.is_cuda:
            self.check()
        settings = self.settings
        rule, rank_by, impl = settings.rule, settings.rank_by, settings.impl
        chosen = select(mass, self._scoring(layer).seen_by, self.droppable, self.p, rule, rank_by, impl)
        self.kept[layer] = chosen | (self.layout.valid & ~self.droppable)
        return self.kept[layer]

    def mass(self, layer: int, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        """(batch, prompt) attention mass of a layer, with gradient; arguments as of `choose`."""
        scoring = self._scoring(layer)
        if scoring.first < first:
            raise RuntimeError(
                f"scoring rows {self.settings.scoring_rows!r} reach into the shared prefix; run the prompt in one pass"
            )
        if scoring.count == self.layout.length - scoring.first:  # all rows from the first on
            query = query[:, :, scoring.first - first : self.layout.length - first]
        else:
            query = query[:, :, scoring.columns - first]
        key = key[:, :, : self.layout.length]
        return attention_mass(query, key, scoring.slots, self.layout.valid, scale, impl=self.settings.impl)

    def log_share(self, mass: Tensor) -> Tensor:
        """(batch, prompt) log of the mass normalised over the droppable tokens; 0 elsewhere."""
        masked = mass.masked_fill(~self.droppable, 0.0)
        share = masked / masked.sum(-1, keepdim=True).clamp_min(_SMALLEST)
        return share.masked_fill(~self.droppable, 1.0).clamp_min(_SMALLEST).log()

    def check(self) -> None:
        """Raises ValueError if a layer selected by a mass that was not finite."""
        if self._finite and not bool(torch.stack(self._finite).all()):
            raise ValueError("attention mass is not finite: the model's attention logits hold NaN or infinity")
        self._finite.clear()

    def stacked_selection_logps(self) -> Tensor:
        """(layers, batch) log-density of the sampled selection; (0, batch) where selection is deterministic."""
        if not self.selection_logps:
            return self.p.new_zeros(0, self.layout.batch)
        return torch.stack([self.selection_logps[layer] for layer in sorted(self.selection_logps)])

    def _scoring(self, layer: int) -> _Scoring:
        """The scoring rows of a layer; every layer has the same unless they are drawn."""
        key = layer if self.settings.scoring_rows == "probe" else 0
        if key not in self._scorings:
            rows = scoring_rows(self._host_layout, self.settings, layer)
            slots = rows.any(0).nonzero().flatten()
            seen_by = rows.flip(-1).cumsum(-1).flip(-1)
            columns = [slots, torch.where(rows[:, slots], slots, -1), seen_by]
            device = self.layout.valid.device
            found = _Scoring(int(slots[0]), len(slots), *(column.to(device, non_blocking=True) for column in columns))
            self._scorings[key] = found
        return self._scorings[key]

    def _log_density(self, log_mass: Tensor, sample: Tensor) -> Tensor:
        """(batch,) Gaussian log-density of the sampled log masses, up to a constant."""
        squared = ((sample - log_mass) / self.sigma).square().masked_fill(~self.droppable, 0.0)
        return -0.5 * squared.sum(-1)
