"""The GRPO loop: rollouts with one budget each, joint reward, replayed update, exact resume.

Where it departs from the usual GRPO: every rollout of a group has its own budget p and its own kept sets; the update
replays them; the visual prefix of a query is computed once per pass and shared by its group; the selection itself is a
stochastic action during rollouts (sigma > 0), because with token log-probabilities alone the efficiency reward has zero
expected gradient. A step is a pure function of (weights, optimizer, step number): batches and noise are seeded by the
step, so a resumed run is the run that was never interrupted.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import get_scheduler

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.schema import Row
from sparsity_forcing.files import replace_directory, write_json_atomic
from sparsity_forcing.generation.prompts import Prompts, build_prompts, shares_prefix
from sparsity_forcing.models.families import require_supported, vision_tower, visual_token_ids
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.params import SparsityParams, TrainParams
from sparsity_forcing.rl.batches import rows_of_step
from sparsity_forcing.rl.loss import LossInputs, grpo_loss
from sparsity_forcing.rl.metrics import sample_table, step_metrics
from sparsity_forcing.rl.replay import Replay, reference_logps
from sparsity_forcing.rl.rewards import Rewards, group_advantages, joint_rewards
from sparsity_forcing.rl.rollout import Rollouts, Sampling, roll_out
from sparsity_forcing.scoring import score_function

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to change."""


class Trainer:
    """One training run.

    Args:
        model, processor: the base; the model is trained in place. Its dense copy is the frozen reference.
        rows, validation_rows: the training and validation splits.
        config, sparsity: how to train; how a layer selects. ``sparsity.p`` is the deployment budget of validation.
        seed: of batches, noise and samples.
        checkpoints: where the run is saved and resumed from.
        on_step: called after every step with its metrics, and with a sample table on the steps that log one.
    """

    def __init__(
        self,
        model,
        processor,
        rows: Sequence[Row],
        validation_rows: Sequence[Row],
        config: TrainParams,
        sparsity: SparsityParams,
        seed: int,
        checkpoints: Checkpoints,
        on_step: Callable[[dict, list[dict] | None], None],
    ) -> None:
        require_supported(model.config)
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        world = self.accelerator.num_processes
        if config.prompts_per_step % world:
            raise TrainingError(f"train.prompts_per_step ({config.prompts_per_step}) must divide by {world} processes")
        if len(rows) < config.prompts_per_step:
            raise TrainingError(
                f"{len(rows)} training rows are fewer than train.prompts_per_step ({config.prompts_per_step})"
            )
        self.model, self.processor = model, processor
        self.rows, self.validation_rows = rows, validation_rows[: config.validation_rows]
        self.config, self.sparsity, self.seed = config, sparsity, seed
        self.checkpoints, self.on_step = checkpoints, on_step
        self.score = score_function(config.reward.correct)
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        if config.freeze_vision:
            vision_tower(model).requires_grad_(False)

        self.suppressed = torch.tensor(visual_token_ids(model.config), device=model.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, config.steps)
        sigma = config.selection_policy.sigma
        replay = Replay(model, sparsity, config.temperature, self.suppressed, sigma)
        self.replay, self.optimizer = self.accelerator.prepare(replay, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.history: list[dict] = []
        self.step = 0
        self.skipped_steps = 0
        self.best: dict | None = None
        self._stop_signal: int | None = None

    def train(self) -> list[dict]:
        """Runs to the last step, from the newest whole checkpoint if there is one; returns every step's metrics.

        A number that is not finite (of a step that was skipped) is left out of its step's metrics.
        """
        self._resume()
        self._print_arithmetic()
        self._listen()
        try:
            with decoder_attention(self.model), decoder_attention(self.reference):
                self._run_steps()
        finally:
            self._listen(False)
        self._take_best()
        return self.history

    def _run_steps(self) -> None:
        if self.step == 0:
            self._start = {f"start_{name}": value for name, value in self.validate().items()}
        while self.step < self.config.steps:
            self._one_step()
            if self.step % self.config.checkpoint_every == 0 or self._stop_signal:
                self._save()
            if self._stop_signal:
                _log.warning("stopped by signal %d; saved step %d", self._stop_signal, self.step)
                sys.exit(128 + self._stop_signal)

    def _one_step(self) -> None:
        started = time.perf_counter()
        config = self.config
        rows = self._own(rows_of_step(self.rows, self.step, config.prompts_per_step, self.seed))
        prompts, rollouts, group = self._roll_out(rows)
        rolled = time.perf_counter()
        texts = self.processor.batch_decode(
            rollouts.completions.masked_fill(~rollouts.completion_mask, self._pad_id), skip_special_tokens=True
        )
        rewards, advantages, selection_advantages = self._credit(rows, texts, rollouts)
        referred = reference_logps(self.reference, prompts, rollouts, group, config.temperature, self.suppressed)
        scored = time.perf_counter()
        loss, loss_metrics, grad_norm = self._update(
            prompts, rollouts, group, referred, advantages, selection_advantages
        )
        updated = time.perf_counter()

        self.step += 1
        metrics = step_metrics(self.step, rollouts, rewards, advantages, config.num_generations)
        metrics |= {name: float(value) for name, value in loss_metrics.items()}
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self.schedule.get_last_lr()[0],
            "skipped_steps": self.skipped_steps,
            "seconds": updated - started,
            "seconds_rollout": rolled - started,
            "seconds_reference": scored - rolled,
            "seconds_update": updated - scored,
            "prompt_tokens": int(prompts.layout.valid.sum()) * group,
            "new_tokens_per_second": metrics["new_tokens"] / (rolled - started),
        }
        if self.step == 1:
            metrics |= self._start
        if self.step % config.validate_every == 0 or self.step == config.steps:
            metrics |= {f"validation_{name}": value for name, value in self._validate_and_keep_best().items()}
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.history.append(metrics)
        logs_samples = self.step % config.log_samples_every == 0 or self.step == config.steps
        table = sample_table(rows, texts, rollouts, rewards, advantages) if logs_samples else None
        self.on_step(metrics, table)

    def _roll_out(self, rows: Sequence[Row]) -> tuple[Prompts, Rollouts, int]:
        """Prompts, rollouts of all groups, and how often the prompts' rows repeat inside the passes."""
        config = self.config
        group = config.num_generations
        shared = shares_prefix(self.sparsity)
        repeated = rows if shared else [row for row in rows for _ in range(group)]
        prompts = self._prompts(repeated)
        budgets = torch.tensor(config.budgets * (group // len(config.budgets)), device=self.model.device)
        noise = torch.Generator(self.model.device).manual_seed(self._noise_seed())
        self.model.eval()
        rollouts = roll_out(
            self.model,
            prompts,
            budgets.repeat(len(rows)),
            group if shared else 1,
            self.sparsity,
            self._sampling(config.temperature),
            config.selection_policy.sigma,
            noise,
        )
        return prompts, rollouts, group if shared else 1

    def _credit(self, rows: Sequence[Row], texts: list[str], rollouts: Rollouts) -> tuple[Rewards, Tensor, Tensor]:
        """Rewards (queries, group), advantages (queries, group) and selection advantages (layers, rows) of this
        process's groups. Advantages are centred over the groups of all processes."""
        config, group = self.config, self.config.num_generations
        correct = torch.tensor([self.score(text, rows[i // group].answer) for i, text in enumerate(texts)])
        local = torch.stack([correct.to(rollouts.p.device), rollouts.p, rollouts.token_ratio, *rollouts.layer_ratio])
        score, budget, ratio, *layers = self.accelerator.gather(local.T.contiguous()).T.unflatten(1, (-1, group))
        budgets = budget if config.center_by_budget else None

        def credit(token_ratio: Tensor) -> tuple[Rewards, Tensor]:
            rewards = joint_rewards(score, token_ratio, config.reward.weight_efficiency)
            return rewards, group_advantages(rewards.total, config.scale_rewards, budgets)

        rewards, advantages = credit(ratio)
        if not len(rollouts.selection_logps):
            selection = rollouts.selection_logps
        elif config.selection_policy.credit == "layer":
            selection = torch.stack([credit(layer)[1] for layer in layers])
        else:
            selection = advantages.expand(len(layers), -1, -1)
        first = self.accelerator.process_index * len(rows)
        own = slice(first, first + len(rows))
        selection = selection[:, own].flatten(1) if len(selection) else selection
        return Rewards(rewards.correct[own], rewards.efficiency[own]), advantages[own], selection

    def _update(
        self,
        prompts: Prompts,
        rollouts: Rollouts,
        group: int,
        referred: Tensor,
        advantages: Tensor,
        selection_advantages: Tensor,
    ) -> tuple[float, dict[str, Tensor], float]:
        self.replay.train()
        logps, selection_logps = self.replay(prompts, rollouts, group)
        loss, metrics = grpo_loss(
            LossInputs(
                logps,
                rollouts.logps,
                referred,
                rollouts.completion_mask,
                advantages.flatten(),
                selection_logps,
                rollouts.selection_logps,
                selection_advantages,
            ),
            self.config,
        )
        self.accelerator.backward(loss)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grad_norm = float(self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm))
        if math.isfinite(grad_norm):
            self.optimizer.step()
        else:
            self.skipped_steps += 1
            _log.warning("step %d: gradient norm is %s; the step is skipped", self.step + 1, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return float(loss.detach()), metrics, grad_norm

    def _validate_and_keep_best(self) -> dict[str, float]:
        """Validates; stores the weights if no validated step within the accuracy guard keeps fewer tokens."""
        found = self.validate()
        start = self.history[0] if self.history else self._start
        within = found["accuracy"] >= start["start_accuracy"] - self.config.accuracy_guard
        if within and (self.best is None or found["token_ratio"] < self.best["token_ratio"]):
            self.best = {"step": self.step, **found}
            if self.accelerator.is_main_process:
                with replace_directory(self.checkpoints.best) as directory:
                    save_model(self.model, str(directory / "model.safetensors"))
        return found

    def _take_best(self) -> None:
        """Puts the weights of the best validated step into the model."""
        if self.best is None:
            _log.warning(
                "no validated step kept its accuracy within train.accuracy_guard (%g) of the start's; "
                "the policy is that of the last step",
                self.config.accuracy_guard,
            )
            return
        self.accelerator.wait_for_everyone()
        load_model(self.model, str(self.checkpoints.best / "model.safetensors"), device=str(self.model.device))

    @torch.no_grad()
    def validate(self, batch_size: int = 48) -> dict[str, float]:
        """Accuracy and token ratios of greedy answers at the deployment budget."""
        self.model.eval()
        totals = torch.zeros(4, dtype=torch.float64)
        rows = self._own(
            self.validation_rows[
                : len(self.validation_rows) // self.accelerator.num_processes * self.accelerator.num_processes
            ]
        )
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            p = torch.full((len(part),), self.sparsity.p, device=self.model.device)
            found = roll_out(self.model, self._prompts(part), p, 1, self.sparsity, self._sampling(0.0))
            texts = self.processor.batch_decode(found.completions, skip_special_tokens=True)
            right = sum(self.score(text, row.answer) for text, row in zip(texts, part, strict=True))
            visual = found.visual_token_ratio.nan_to_num(1.0)
            totals += torch.tensor([right, float(found.token_ratio.sum()), float(visual.sum()), len(part)])
        totals = self.accelerator.gather(totals[None].to(self.model.device)).sum(0).cpu()
        names = ("accuracy", "token_ratio", "visual_token_ratio")
        return {name: float(value / totals[3]) for name, value in zip(names, totals[:3], strict=True)}

    def _prompts(self, rows: Sequence[Row]) -> Prompts:
        inputs = encode_prompts(self.processor, [row.question for row in rows], [row.images for row in rows])
        return build_prompts(self.model, inputs, self.sparsity, encode_images=self.config.freeze_vision)

    def _sampling(self, temperature: float) -> Sampling:
        stop = self.model.generation_config.eos_token_id
        stop = self.processor.tokenizer.eos_token_id if stop is None else stop
        stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
        return Sampling(temperature, self.config.max_completion_length, stop_ids, self._pad_id, self.suppressed)

    @property
    def _pad_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _own(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This process's share, contiguous, so that gathered rows are in the order of the whole batch."""
        share = len(rows) // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        return rows[first : first + share]

    def _noise_seed(self) -> int:
        return (self.seed * 1_000_003 + self.step) * 1024 + self.accelerator.process_index

    def _save(self) -> None:
        def write(directory: Path) -> None:
            self.accelerator.save_state(str(directory), safe_serialization=True)
            state = {"step": self.step, "skipped_steps": self.skipped_steps, "best": self.best, "history": self.history}
            write_json_atomic(directory / "trainer.json", state)

        self.checkpoints.save(self.step, write)

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            return
        self.accelerator.load_state(str(found[1]))
        state = json.loads((found[1] / "trainer.json").read_text())
        self.step, self.skipped_steps, self.history = state["step"], state["skipped_steps"], state["history"]
        self.best = state["best"]
        _log.warning("resumed from %s at step %d of %d", found[1], self.step, self.config.steps)

    def _listen(self, on: bool = True) -> None:
        """SIGTERM lets the running step end, saves and exits; a second one ends at once."""

        def stop(number: int, _frame: object) -> None:
            self._stop_signal = number
            signal.signal(number, before)

        if on:
            before = signal.getsignal(signal.SIGTERM)
            self._before = before
            signal.signal(signal.SIGTERM, stop)
        else:
            signal.signal(signal.SIGTERM, self._before)

    def _print_arithmetic(self) -> None:
        config, world = self.config, self.accelerator.num_processes
        rollouts = config.prompts_per_step * config.num_generations
        _log.info(
            "%d steps x %d prompts x %d generations = %d rollouts (%d a step, %d a process); %.2f epochs of %d rows",
            config.steps, config.prompts_per_step, config.num_generations, config.steps * rollouts, rollouts,
            rollouts // world, config.steps * config.prompts_per_step / len(self.rows), len(self.rows),
        )  # fmt: skip
