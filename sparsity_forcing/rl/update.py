"""The update of a step: the clipped objective on its rollouts, in micro-batches, some times over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from sparsity_forcing.params import TrainParams
from sparsity_forcing.rl.loss import LossInputs, Totals, grpo_loss
from sparsity_forcing.rl.metrics import replay_metrics
from sparsity_forcing.rl.parts import Part
from sparsity_forcing.rl.sharding import is_sharded

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step with what its loss needs: (rows, tokens) ``ref_logps`` and ``mask`` of the tokens that count,
    (rows,) ``advantages``, (layers, rows) ``selection_advantages``."""

    part: Part
    ref_logps: Tensor
    mask: Tensor
    advantages: Tensor
    selection_advantages: Tensor


class Updater:
    """Steps the optimizer. Losses and gradients are means over the whole step, however it is divided over micro-batches
    and processes."""

    def __init__(self, accelerator: Accelerator, replay, optimizer, schedule, config: TrainParams) -> None:
        self.accelerator, self.replay, self.optimizer = accelerator, replay, optimizer
        self.schedule, self.config = schedule, config
        self.trained = [parameter for parameter in replay.parameters() if parameter.requires_grad]
        self.skipped_steps = 0

    def update(
        self, batches: Sequence[MicroBatch], step: int, before_pass: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """``num_iterations`` updates on the same rollouts; their mean metrics. ``step`` names it in the log.

        The replay differences are those of the first update: after it the policy is another one. ``before_pass`` is
        called until then, before every micro-batch.
        """
        totals = self._totals(batches)
        looks = [before_pass] + [lambda: None] * (self.config.num_iterations - 1)
        found = [self._one_update(batches, totals, step, look) for look in looks]
        metrics = {name: sum(part[name] for part, _ in found) / len(found) for name in found[0][0]}
        return metrics | replay_metrics(found[0][1])

    def _one_update(
        self, batches: Sequence[MicroBatch], totals: Totals, step: int, before_pass: Callable[[], None]
    ) -> tuple[dict[str, float], Tensor]:
        self.replay.train()
        sums: dict[str, Tensor] = {}
        differences = []
        for batch in batches:
            before_pass()
            rollouts, last = batch.part.rollouts, batch is batches[-1]
            accumulates = not (last or is_sharded(self.accelerator))  # sharded, gradients stay divided
            with self.accelerator.no_sync(self.replay) if accumulates else nullcontext():
                logps, selection_logps = self.replay(batch.part.prompts, rollouts, batch.part.group)
                inputs = LossInputs(
                    logps,
                    rollouts.logps,
                    batch.ref_logps,
                    batch.mask,
                    batch.advantages,
                    selection_logps,
                    rollouts.selection_logps,
                    batch.selection_advantages,
                )
                loss, metrics = grpo_loss(inputs, self.config, totals)
                self.accelerator.backward(loss * self.accelerator.num_processes)  # gradients are averaged over them
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0) + value
            differences.append((logps.detach() - rollouts.logps).abs()[rollouts.completion_mask])
        grad_norm = self.take_step(step)
        values = self.accelerator.reduce(torch.stack(list(sums.values())).float(), "sum").tolist()
        return dict(zip(sums, values, strict=True)) | {"grad_norm": grad_norm}, self._gathered(torch.cat(differences))

    def take_step(self, step: int) -> float:
        """Clips and steps, unless the gradient is not finite; the norm before clipping.

        A weight that no row of the step needed, of a vision tower without images, has a gradient of zero.
        """
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grad_norm = float(self.accelerator.clip_grad_norm_(self.trained, self.config.max_grad_norm))
        if math.isfinite(grad_norm):
            self.optimizer.step()
        else:
            self.skipped_steps += 1
            _log.warning("step %d: gradient norm is %s; the step is skipped", step, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return grad_norm

    def _totals(self, batches: Sequence[MicroBatch]) -> Totals:
        own = torch.tensor([[sum(len(b.advantages) for b in batches), sum(int(b.mask.sum()) for b in batches)]])
        rows, tokens = self.accelerator.gather(own.to(self.accelerator.device)).sum(0).tolist()
        return Totals(rows, tokens)

    def _gathered(self, values: Tensor) -> Tensor:
        """The (tokens,) values of all processes, which may hold different numbers of them."""
        if self.accelerator.num_processes == 1:
            return values
        padded = self.accelerator.pad_across_processes(values, pad_index=-1)
        every = self.accelerator.gather(padded)
        return every[every >= 0]
