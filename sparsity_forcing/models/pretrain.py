"""Trains the default model from scratch on the `digits` source, phase by phase.

Direct training on the full task stays at chance; a curriculum of small, clean canvases first does not. Canvases are
rendered on the fly from training scans, so no image repeats.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin

from sparsity_forcing.checkpoints import Checkpoints, fingerprint
from sparsity_forcing.data.digits import load_scans, render
from sparsity_forcing.lineage import code_digest, versions
from sparsity_forcing.models.families import ModelError
from sparsity_forcing.models.prompts import append_answers, encode_prompts
from sparsity_forcing.params import ModelParams, Phase

STATE_FILE = "state.pt"
CODE = ("data/digits.py", "models/pretrain.py", "models/prompts.py")  # what decides the weights, and packages that do:
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")


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


@dataclass(frozen=True)
class Step:
    """One step that is done: ``number`` of ``total``, counted from 1; ``accuracy``: share of the batch's answers whose
    every token was the most likely one (before the step)."""

    number: int
    total: int
    loss: float
    accuracy: float


def pretrain(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    params: ModelParams,
    seed: int,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> float:
    """Trains ``model`` in place, from the newest of ``checkpoints`` on; leaves it in eval mode.

    Returns the seconds that its steps took, those of the runs it goes on from included.

    The result depends on the model, ``params`` and ``seed`` alone: a run that was stopped and goes on from a checkpoint
    ends with the weights of a run that was not.

    Raises:
        ModelError: the loss is no longer finite.
    """
    total = sum(phase.steps for phase in params.curriculum)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    done, earlier = _resume(model, optimizer, checkpoints)
    started = time.perf_counter() - earlier
    batches = DataLoader(
        CurriculumBatches(processor, params.curriculum, seed, start_step=done),
        batch_size=None,
        num_workers=1,
        prefetch_factor=4,
    )
    model.train()
    for number, (inputs, labels) in enumerate(batches, start=done + 1):
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate * learning_rate_factor(number - 1, total, params.warmup_steps)
        loss, accuracy = answer_loss(model, inputs, labels)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss is {loss.item()} at step {number} of {total}; lower model.learning_rate "
                f"({params.learning_rate}) or lengthen model.warmup_steps ({params.warmup_steps})"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(Step(number, total, loss.item(), accuracy))
        if checkpoints is not None and (number % params.checkpoint_every == 0 or number == total):
            checkpoints.save(number, partial(_write_state, model, optimizer, time.perf_counter() - started))
    model.eval()
    return time.perf_counter() - started


def answer_loss(model: PreTrainedModel, inputs: dict, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the answer tokens, and the share of answers that are right in every token.

    Args:
        inputs, labels: as `models.prompts.append_answers` gives them, on any device.
    """
    labels = labels.to(model.device)
    first = (labels != -100).any(0).nonzero()[0].item()
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    keep = labels.shape[1] - first + 1  # logits from the last prompt token on
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    labels = labels[:, first:]
    right = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss, right.float().mean().item()


def configuration_fingerprint(model: PreTrainedModel, processor: ProcessorMixin, params: ModelParams, seed: int) -> str:
    """Names everything that decides what `pretrain` makes of the fresh ``model``, for its checkpoints.

    Parameters, code, versions, initial weights, and the first batch of every phase: a change of the rendering, the
    tokenizer or the chat template changes it too.
    """
    tensors = list(model.state_dict().values())
    for phase in params.curriculum:
        inputs, labels = next(iter(CurriculumBatches(processor, (phase,), seed)))
        tensors += [*inputs.values(), labels]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    decisive = params.model_dump(mode="json", include={"scratch", "curriculum", "learning_rate", "warmup_steps"})
    made_by = {"code": code_digest(CODE), "versions": versions(PACKAGES)}
    return fingerprint({"params": decisive, "seed": seed, "tensors": digest.hexdigest(), **made_by})


def _resume(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints | None
) -> tuple[int, float]:
    """Steps that are done already and the seconds they took; brings model and optimizer to where they were then."""
    found = checkpoints.latest() if checkpoints is not None else None
    if found is None:
        return 0, 0.0
    step, directory = found
    state = torch.load(directory / STATE_FILE, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step, state["seconds"]


def _write_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seconds: float, directory: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seconds": seconds}
    torch.save(state, directory / STATE_FILE)
