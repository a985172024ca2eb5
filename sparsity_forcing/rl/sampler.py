"""Rows in, answers out: prompts, rollouts with one budget each, greedy answers at the deployment budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.data.schema import Row
from sparsity_forcing.generation.encoded_images import takes_encoded
from sparsity_forcing.generation.prompts import Prompts, build_prompts, shares_prefix
from sparsity_forcing.models.families import visual_token_ids
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.params import SelectionPolicyParams, SparsityParams, TrainParams
from sparsity_forcing.rl.parts import Part
from sparsity_forcing.rl.rollout import Rollouts, Sampling, roll_out


def sigma_of_step(policy: SelectionPolicyParams, step: int, steps: int) -> float:
    """The scale of the selection policy in step ``step`` (from 0) of ``steps``."""
    if policy.final_sigma is None or policy.sigma == 0 or steps == 1:
        return policy.sigma
    return policy.sigma + (policy.final_sigma - policy.sigma) * step / (steps - 1)


class Sampler:
    """The answers of one model under one configuration. ``cut_off``: as of `roll_out`."""

    def __init__(self, model, processor, config: TrainParams, sparsity: SparsityParams) -> None:
        self.model, self.processor, self.config, self.sparsity = model, processor, config, sparsity
        self.suppressed = torch.tensor(visual_token_ids(model.config), device=model.device)
        self.attention_dtype = torch.float64 if config.attention_dtype == "float64" else None
        self._pad_id = processor.tokenizer.pad_token_id
        self.cut_off: Callable[[], bool] = lambda: False

    def roll_out(self, rows: Sequence[Row], noise_seed: int, step: int = 0) -> Part:
        """``num_generations`` sampled answers a row, one budget each; ``step``, from 0, decides σ."""
        config, group = self.config, self.config.num_generations
        shared = shares_prefix(self.sparsity)
        prompts = self.prompts(rows, copies=1 if shared else group)
        budgets = torch.tensor(config.budgets * (group // len(config.budgets)), device=self.model.device)
        noise = torch.Generator(self.model.device).manual_seed(noise_seed)
        repeats = group if shared else 1
        sigma = sigma_of_step(config.selection_policy, step, config.steps)
        self.model.eval()
        rollouts = roll_out(
            self.model,
            prompts,
            budgets.repeat(len(rows)),
            repeats,
            self.sparsity,
            self._sampling(config.temperature),
            sigma,
            noise,
            self.attention_dtype,
            cut_off=self.cut_off,
        )
        return Part(rows, prompts, rollouts, repeats)

    def deployed(self, rows: Sequence[Row], make_context: Callable[..., SparseContext] = SparseContext) -> Rollouts:
        """One greedy answer a row at the deployment budget; ``make_context`` as of `roll_out`."""
        self.model.eval()
        p = torch.full((len(rows),), self.sparsity.p, device=self.model.device)
        prompts, greedy = self.prompts(rows), self._sampling(0.0)
        return roll_out(
            self.model, prompts, p, 1, self.sparsity, greedy, make_context=make_context, cut_off=self.cut_off
        )

    def prompts(self, rows: Sequence[Row], copies: int = 1) -> Prompts:
        """Every row's prompt ``copies`` times in a row. A frozen vision tower sees an image once."""
        if copies == 1 or not (self.config.freeze_vision and takes_encoded(self.model)):
            return self._built([row for row in rows for _ in range(copies)])
        each = torch.arange(len(rows), device=self.model.device).repeat_interleave(copies)
        return self._built(rows).take(each)

    def _built(self, rows: Sequence[Row]) -> Prompts:
        inputs = encode_prompts(self.processor, [row.question for row in rows], [row.images for row in rows])
        return build_prompts(self.model, inputs, self.sparsity, encode_images=self.config.freeze_vision)

    def texts(self, rollouts: Rollouts) -> list[str]:
        tokens = rollouts.completions.masked_fill(~rollouts.completion_mask, self._pad_id)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _sampling(self, temperature: float) -> Sampling:
        stop = self.model.generation_config.eos_token_id
        stop = self.processor.tokenizer.eos_token_id if stop is None else stop
        stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
        return Sampling(temperature, self.config.max_completion_length, stop_ids, self._pad_id, self.suppressed)
