"""Trains the default model from scratch on the `digits` source, phase by phase.

Direct training on the full task stays at chance; a curriculum of small, clean canvases first does not. Canvases are
rendered on the fly from training scans, so no image repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from sparsity_forcing.data.digits import load_scans, render
from sparsity_forcing.models.prompts import append_answers, encode_prompts
from sparsity_forcing.params import ModelParams, Phase


class CurriculumBatches(IterableDataset):
    """Supervised batches of the whole curriculum in order: (inputs, labels). Every batch has one grid size."""

    def __init__(self, processor, phases: tuple[Phase, ...], seed: int, start_step: int = 0) -> None:
        self.processor, self.phases, self.seed, self.start_step = processor, phases, seed, start_step

    def __iter__(self) -> Iterator[tuple[dict, torch.Tensor]]:
        step = 0
        for phase in self.phases:
            for _ in range(phase.steps):
                if step >= self.start_step:
                    yield self._batch(phase, step)
                step += 1

    def _batch(self, phase: Phase, step: int) -> tuple[dict, torch.Tensor]:
        rng = np.random.default_rng([self.seed, step])
        scans = load_scans("train")
        grid = phase.grids[int(rng.integers(len(phase.grids)))]
        canvases = [
            render(
                rng,
                scans,
                grid,
                phase.tasks[i % len(phase.tasks)],
                phase.grey_share,
                phase.clutter_share,
                phase.coloured,
            )
            for i in range(phase.batch_size)
        ]
        inputs = encode_prompts(
            self.processor,
            [canvas.question for canvas in canvases],
            [[Image.fromarray(canvas.pixels)] for canvas in canvases],
        )
        return append_answers(self.processor, inputs, [canvas.answer for canvas in canvases])


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, constant, then a cosine to 2% over the second half."""
    if step < warmup:
        return (step + 1) / warmup
    if step < total // 2:
        return 1.0
    progress = (step - total // 2) / max(1, total - total // 2)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(model, processor, params: ModelParams, seed: int, on_step: Callable[[int, int, float], None]) -> None:
    """Trains ``model`` in place. ``on_step(step, total, loss)`` is called after every step."""
    total = sum(phase.steps for phase in params.curriculum)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total, params.warmup_steps)
    )
    batches = DataLoader(
        CurriculumBatches(processor, params.curriculum, seed), batch_size=None, num_workers=1, prefetch_factor=4
    )
    model.train()
    for step, (inputs, labels) in enumerate(batches):
        answer = (labels != -100).any(0).nonzero()[0].item()
        keep = labels.shape[1] - answer + 1  # logits from the last prompt token on
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, answer:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        on_step(step + 1, total, loss.item())
    model.eval()
