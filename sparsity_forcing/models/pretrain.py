"""Trains the default model from scratch on the `digits` source, phase by phase.

Direct training on the full task stays at chance; a curriculum of small, clean canvases first does not, if each phase
lasts until the model can do it: when that is depends on the seed, and on the rounding of the processor. Canvases are
rendered on the fly from training scans, so no image repeats.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean

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
WINDOW = 50  # batches whose accuracy decides whether a phase ends
CODE = ("data/digits.py", "models/pretrain.py", "models/prompts.py")  # what decides the weights, and packages that do:
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")


class PhaseBatches(IterableDataset):
    """Supervised batches of one phase, without end: (inputs, labels). Every batch has one grid size.

    ``start_step``: the number of the first one in the whole training, from 0; a batch's number seeds it.
    """

    def __init__(self, processor, phase: Phase, seed: int, start_step: int = 0) -> None:
        self.processor, self.phase, self.seed, self.start_step = processor, phase, seed, start_step

    def __iter__(self) -> Iterator[tuple[dict, torch.Tensor]]:
        for step in count(self.start_step):
            yield self._batch(self.phase, step)

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


def learning_rate_factor(step: int, left: int, warmup: int, decay: int) -> float:
    """Linear warm-up, constant, then a cosine to 2% over the last ``decay`` steps.

    Args:
        step: steps done. left: steps to come, this one included.
    """
    if step < warmup:
        return (step + 1) / warmup
    if left > decay:
        return 1.0
    progress = (decay - left) / max(1, decay)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Step:
    """One step that is done: ``number`` of ``total``, counted from 1, which a phase that goes on makes more;
    ``accuracy``: share of the batch's answers whose every token was the most likely one (before the step)."""

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
        ModelError: the loss is no longer finite, or a phase is not learned in `at_most` steps.
    """
    phases = params.curriculum
    total = sum(phase.steps for phase in phases)
    decay = total - total // 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    at, earlier = _resume(model, optimizer, checkpoints)
    started = time.perf_counter() - earlier
    model.train()
    while at.phase < len(phases):
        phase = phases[at.phase]
        for inputs, labels in _loaded(processor, phase, seed, at):
            left = max(1, phase.steps - at.steps_in_phase) + sum(later.steps for later in phases[at.phase + 1 :])
            factor = learning_rate_factor(at.step, left, params.warmup_steps, decay)
            for group in optimizer.param_groups:
                group["lr"] = params.learning_rate * factor
            loss, accuracy = answer_loss(model, inputs, labels)
            done = Step(at.step + 1, at.step + left, loss.item(), accuracy)
            _take_step(model, optimizer, loss, done, params)
            at.advance(accuracy)
            on_step(done)
            ends = _ends(phase, at, params)
            if ends:
                at.next_phase()
            if checkpoints is not None and (at.step % params.checkpoint_every == 0 or at.phase == len(phases)):
                checkpoints.save(at.step, partial(_write_state, model, optimizer, at, time.perf_counter() - started))
            if ends:
                break
    model.eval()
    return time.perf_counter() - started


def _take_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: Step, params: ModelParams
) -> None:
    if not torch.isfinite(loss):
        raise ModelError(
            f"the loss is {step.loss} at step {step.number} of {step.total}; lower model.learning_rate "
            f"({params.learning_rate}) or lengthen model.warmup_steps ({params.warmup_steps})"
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _ends(phase: Phase, at: Position, params: ModelParams) -> bool:
    """Whether the phase is over; raises ModelError where the most steps are done and the model still cannot do it."""
    if at.steps_in_phase < phase.steps:
        return False
    if phase.until is None or mean(at.recent) >= phase.until:
        return True
    if at.steps_in_phase < phase.at_most:
        return False
    raise ModelError(
        f"phase {at.phase + 1} of model.curriculum is right on {mean(at.recent):.1%} of its questions after "
        f"{phase.at_most} steps, `until` asks for {phase.until:.1%}; raise at_most and it goes on from here, or lower "
        f"model.learning_rate ({params.learning_rate}), or try another seed"
    )


@dataclass
class Position:
    """How far a training is: ``step`` steps in all, of which ``steps_in_phase`` in the phase of this number; the
    accuracies of its last `WINDOW` batches."""

    phase: int = 0
    step: int = 0
    steps_in_phase: int = 0
    recent: list[float] = field(default_factory=list)

    def advance(self, accuracy: float) -> None:
        self.step += 1
        self.steps_in_phase += 1
        self.recent = [*self.recent, accuracy][-WINDOW:]

    def next_phase(self) -> None:
        self.phase, self.steps_in_phase, self.recent = self.phase + 1, 0, []


def _loaded(processor, phase: Phase, seed: int, at: Position) -> DataLoader:
    """The phase's batches from where the training is, made ahead in another process."""
    batches = PhaseBatches(processor, phase, seed, at.step)
    return DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)


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
        inputs, labels = next(iter(PhaseBatches(processor, phase, seed)))
        tensors += [*inputs.values(), labels]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    decisive = params.model_dump(mode="json", include={"scratch", "learning_rate", "warmup_steps"})
    decisive["curriculum"] = [phase.model_dump(mode="json", exclude={"at_most"}) for phase in params.curriculum]
    made_by = {"code": code_digest(CODE), "versions": versions(PACKAGES)}
    return fingerprint({"params": decisive, "seed": seed, "tensors": digest.hexdigest(), **made_by})


def _resume(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints | None
) -> tuple[Position, float]:
    """Where the training is, and the seconds that it took; brings model and optimizer to where they were then."""
    found = checkpoints.latest() if checkpoints is not None else None
    if found is None:
        return Position(), 0.0
    state = torch.load(found[1] / STATE_FILE, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"]), state["seconds"]


def _write_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, at: Position, seconds: float, directory: Path
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"position": asdict(at), "seconds": seconds}, directory / STATE_FILE)
