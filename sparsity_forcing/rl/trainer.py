"""The GRPO loop: rollouts with one budget each, joint reward, replayed update, exact resume.

Where it departs from the usual GRPO: every rollout of a group has its own budget p and its own kept sets; the update
replays them; the visual prefix of a query is computed once per pass and shared by its group; the selection itself is a
stochastic action during rollouts (sigma > 0), because with token log-probabilities alone the efficiency reward has no
expected gradient towards a lower τ; advantages are centred by budget. A step is a pure function of (weights, optimizer,
step number): batches and noise are seeded by the step, so a resumed run is the run that was never interrupted.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import get_scheduler

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.schema import Row
from sparsity_forcing.files import write_json_atomic
from sparsity_forcing.models.families import freeze_vision, require_supported
from sparsity_forcing.params import SparsityParams, TrainParams
from sparsity_forcing.rl.adapters import add_adapters
from sparsity_forcing.rl.batches import rows_of_step, share_of
from sparsity_forcing.rl.cost import cost_model
from sparsity_forcing.rl.errors import TrainingError, explained_memory, explained_score
from sparsity_forcing.rl.facts import Credit, Facts, counts, credit
from sparsity_forcing.rl.master_weights import adamw
from sparsity_forcing.rl.metrics import budget_metric, peak_memory_gib, sample_table, step_metrics, throughput
from sparsity_forcing.rl.parts import Part
from sparsity_forcing.rl.replay import Replay
from sparsity_forcing.rl.requirements import arithmetic, cautions, prompts_together, require_trainable
from sparsity_forcing.rl.sampler import Sampler
from sparsity_forcing.rl.sharding import by_layer, gather, is_sharded, learner_of, reduce_unused
from sparsity_forcing.rl.stopping import StoppedError, StopSignal
from sparsity_forcing.rl.update import MicroBatch, Updater
from sparsity_forcing.rl.validation import validate
from sparsity_forcing.scoring import score_function

_log = logging.getLogger(__name__)
TARGET_WINDOW = 10  # steps whose mean says whether the target is reached
REPLAY_LIMIT = 1e-5  # of |rollout − replay| in float32; more means that the replay is not the rollout


class Trainer:
    """One training run, in this process or data-parallel in all processes of an `accelerate launch`.

    Args:
        model, processor: the base; the model is trained in place. Its dense copy (or, with adapters, the model without
            them) is the frozen reference.
        rows, validation_rows: the training and validation splits.
        config, sparsity: how to train; how a layer selects. ``sparsity.p`` is the deployment budget of validation.
        seed: of batches, noise and samples.
        checkpoints: where the run is saved and resumed from; all processes see the same directory.
        on_step: called after every step with its metrics, and with a sample table on the steps that log one, unless
            their validation is another process's that was stopped in it; in the main process only.

    Raises:
        TrainingError: the model or the parameters do not allow the training.
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
        parallel = DistributedDataParallelKwargs(find_unused_parameters=not config.freeze_vision)
        self.accelerator = Accelerator(cpu=model.device.type == "cpu", kwargs_handlers=[parallel])
        self.config, self.sparsity, self.seed = config, sparsity, seed
        require_trainable(model, len(rows), config, self.accelerator)
        self.model, self.processor = model, processor
        self.rows, self.validation_rows = rows, validation_rows[: config.validation_rows]
        self.checkpoints, self.on_step = checkpoints, on_step
        with explained_score():
            self.score = score_function(config.reward.correct)
        self.costs = cost_model(model, config.reward.efficiency, config.reward.latency_batch)
        self.sampler = Sampler(model, processor, config, sparsity)
        with explained_memory("set train.lora, or train.beta: 0 (no reference), or model.dtype: bfloat16"):
            self._prepare_weights()
        trained = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        self.optimizer = adamw(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        updates = config.steps * config.num_iterations
        self.schedule = get_scheduler(config.lr_scheduler_type, self.optimizer, config.warmup_steps, updates)
        self.passes = Replay(
            self.learner,
            sparsity,
            config.temperature,
            self.sampler.suppressed,
            config.logits_chunk,
            config.gradient_checkpointing,
            self.sampler.attention_dtype,
            prefix_always=is_sharded(self.accelerator) and by_layer(self.accelerator),
        )
        replay, optimizer = self.accelerator.prepare(self.passes, self.optimizer)
        if is_sharded(self.accelerator) and not config.freeze_vision:
            reduce_unused(replay)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.updater = Updater(self.accelerator, replay, optimizer, self.schedule, config)
        self.history: list[dict] = []
        self.step = 0
        self.seconds = 0.0  # what training took so far, the processes before a resume included
        self.best: dict | None = None
        self._unfinished: dict | None = None  # metrics of a step whose validation was cut off
        self._stop: StopSignal | None = None
        self._unsaved = False  # whether there is more than the newest checkpoint holds
        self._below_guard = 0  # validations in a row
        self._replay_warned = False

    def train(self) -> list[dict]:
        """Runs to the last step, from the newest whole checkpoint if there is one; returns every step's metrics.

        A number that is not finite (of a step that was skipped) is left out of its step's metrics.
        """
        self._began = time.perf_counter()
        self._resume()
        sizes = (
            sum(value.numel() for value in values) for values in (self._trained().values(), self.model.parameters())
        )
        for line in arithmetic(self.config, self.accelerator.num_processes, len(self.rows), *sizes):
            _log.info("%s", line)
        for line in cautions(self.config):
            _log.warning("%s", line)
        with StopSignal() as stop, ExitStack() as attention:
            self._stop, self.sampler.cut_off = stop, lambda: stop.noted
            for model in {id(model): model for model in (self.model, self.learner, self.reference) if model}.values():
                attention.enter_context(decoder_attention(model))
            self._run_steps()
        self._take_best()
        self.seconds = time.perf_counter() - self._began
        if self.adapters is not None:
            self.adapters.merge_and_unload()
        return self.history

    def _run_steps(self) -> None:
        try:
            if self.step == 0:
                self._start = {f"start_{name}": value for name, value in self.validate().items()}
            while self._unfinished or (self.step < self.config.steps and not self._stays_below_guard):
                self._one_step()
                if self.step % self.config.checkpoint_every == 0:
                    self._save()
                self._look_for_stop()
        except StoppedError as stopped:
            if self._unsaved:
                self._save()
            what = f"saved step {self.step}" if self.step else "before the first step: there is nothing to save"
            _log.warning("stopped by signal %d; %s", stopped.number, what)
            sys.exit(128 + stopped.number)
        if self.step < self.config.steps:
            _log.warning(
                "stopped early at step %d: %d validations in a row fell below train.accuracy_guard (%g)",
                self.step, self._below_guard, self.config.accuracy_guard,
            )  # fmt: skip

    def _look_for_stop(self) -> None:
        """Ends the run if a process was asked to, with what the last step left.

        Looked for after rollouts, before the passes of a step until the optimizer has moved, and after a batch of
        validation; a process that was asked cuts its answers off. So it takes a pass, not a step, where all processes
        are asked; scoring the answers, further updates of `num_iterations`, and the rollouts of a process that was not
        asked are waited for.
        """
        if self._stop is not None:
            self._stop.look(self.accelerator)

    def _one_step(self) -> None:
        """A step and its validation; of a step that was stopped in its validation the validation alone."""
        table = None
        if self._unfinished is None:
            rows = self._own(rows_of_step(self.rows, self.step, self.config.prompts_per_step, self.seed))
            metrics, table = self.learn(rows)
            self._follow_learner()
            self.step += 1
            metrics |= {"learning_rate": self.schedule.get_last_lr()[0], "skipped_steps": self.updater.skipped_steps}
            if self.step == 1:
                metrics |= self._start
            self._unfinished = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self._unsaved = True
        metrics = self._unfinished
        if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
            began = time.perf_counter()
            found = self._validate_and_keep_best()
            metrics |= {f"validation_{name}": value for name, value in found.items()}
            metrics["seconds_validation"] = time.perf_counter() - began
        self._unfinished, self._unsaved = None, True
        self.history.append(metrics)
        if self.accelerator.is_main_process:
            logs_samples = self.step % self.config.log_samples_every == 0 or self.step == self.config.steps
            self.on_step(metrics, table() if table is not None and logs_samples else None)

    def learn(self, rows: Sequence[Row]) -> tuple[dict[str, float], Callable[[], list[dict]]]:
        """What a step does with its rows; its metrics, and what makes the table of its samples.

        The metrics hold at least ``step`` (from 1), ``accuracy`` and ``rollouts``. Another objective replaces this
        method alone.
        """
        clock, config = [time.perf_counter()], self.config
        together = prompts_together(config, self.accelerator.num_processes)
        with explained_memory(f"lower train.rollout_prompts ({together} now), or train.max_completion_length"):
            parts = self._roll_out(rows)
        clock.append(time.perf_counter())
        texts = [text for part in parts for text in self.sampler.texts(part.rollouts)]
        facts, judged = self._judge(rows, texts, parts)
        clock.append(time.perf_counter())
        with explained_memory(
            f"lower train.micro_batch_prompts ({config.micro_batch_prompts or together} now), set "
            "train.logits_chunk (1024, say), train.gradient_checkpointing: true, or train.lora"
        ):
            batches = self._micro_batches(parts, facts, judged)
            clock.append(time.perf_counter())
            updated = self.updater.update(batches, self.step + 1, self._look_for_stop)
        clock.append(time.perf_counter())
        metrics = step_metrics(self.step + 1, facts, judged) | updated
        metrics["sigma"] = parts[0].rollouts.sigma
        if config.beta == 0:
            del metrics["kl"]  # there is no reference
        self._look_at_replay(metrics)
        metrics |= {
            "seconds": clock[4] - clock[0],
            "seconds_rollout": clock[1] - clock[0],
            "seconds_reward": clock[2] - clock[1],
            "seconds_reference": clock[3] - clock[2],
            "seconds_update": clock[4] - clock[3],
            **throughput(metrics, clock[1] - clock[0], clock[4] - clock[0], self.accelerator.num_processes),
            "peak_memory_gib": peak_memory_gib(self.accelerator.device),
        }
        return metrics, partial(sample_table, rows, texts, facts, judged.rewards, judged.advantages)

    def _roll_out(self, rows: Sequence[Row]) -> list[Part]:
        """The rollouts of this process's rows. Noise belongs to the rows that are rolled out together."""
        size = prompts_together(self.config, self.accelerator.num_processes)
        first = self.accelerator.process_index * (len(rows) // size)
        parts = []
        for place in range(len(rows) // size):
            noise_seed = (self.seed * 1_000_003 + self.step) * 1024 + first + place
            parts.append(self.sampler.roll_out(rows[place * size : (place + 1) * size], noise_seed, self.step))
            self._look_for_stop()
        return parts

    def _judge(self, rows: Sequence[Row], texts: list[str], parts: list[Part]) -> tuple[Facts, Credit]:
        group = self.config.num_generations
        with explained_score():
            correct = torch.tensor([self.score(text, rows[i // group].answer) for i, text in enumerate(texts)])
        facts = Facts.gathered(correct, [part.rollouts for part in parts], self.accelerator)
        pays = not self._reached_target
        return facts, credit(facts, self.config, self.costs, self.seed * 1_000_003 + self.step, pays)

    @property
    def _reached_target(self) -> bool:
        """Whether the rollouts of the last steps at the budget nearest to the deployed one kept at most the target."""
        budget, target = (
            min(self.config.budgets, key=lambda p: abs(p - self.sparsity.p)),
            self.config.reward.target_ratio,
        )
        name = budget_metric(budget, "visual_token_ratio")
        kept = [row[name] for row in self.history[-TARGET_WINDOW:] if name in row]
        return target is not None and bool(kept) and sum(kept) / len(kept) <= target

    def _micro_batches(self, parts: list[Part], facts: Facts, judged: Credit) -> list[MicroBatch]:
        """What the update goes through, with the reference's log-probabilities."""
        config = self.config
        counted = counts(facts, config)
        selection_advantages = judged.selection_advantages * counted
        done = self.accelerator.process_index * config.prompts_per_step // self.accelerator.num_processes
        done *= config.num_generations
        batches = []
        pixels_of = lambda rows: self.sampler.prompts(rows).media  # noqa: E731
        for part in [small for whole in parts for small in whole.split(config.micro_batch_prompts, pixels_of)]:
            self._look_for_stop()
            rollouts = part.rollouts
            own = slice(done, done + len(rollouts.p))
            done = own.stop
            batches.append(
                MicroBatch(
                    part,
                    self._reference_logps(part),
                    rollouts.completion_mask & counted[own, None],
                    judged.advantages.flatten()[own],
                    selection_advantages[:, own],
                )
            )
        return batches

    def _reference_logps(self, part: Part) -> Tensor:
        if self.config.beta == 0:
            return part.rollouts.logps
        if self.adapters is None:
            return self.passes.reference_logps(self.reference, part.prompts, part.rollouts, part.group)
        self.model.eval()
        with self.adapters.disable_adapter():
            return self.passes.reference_logps(self.model, part.prompts, part.rollouts, part.group)

    def validate(self) -> dict[str, float]:
        """Accuracy and token ratios of greedy answers at the deployment budget."""
        advice = f"lower train.validation_batch_size ({self.config.validation_batch_size} now)"
        with explained_memory(advice), explained_score():
            return validate(self.sampler, self.validation_rows, self.score, self.accelerator, self._look_for_stop)

    def _validate_and_keep_best(self) -> dict[str, float]:
        """Validates; stores the weights if no validated step within the accuracy guard is better, see `_rank`."""
        found = self.validate()
        candidate = {"step": self.step, "reached_target": self._reached_target, **found}
        start = self.history[0] if self.history else self._unfinished or self._start
        within = found["accuracy"] >= start["start_accuracy"] - self.config.accuracy_guard
        self._below_guard = 0 if within else self._below_guard + 1
        if within and (self.best is None or _rank(candidate) < _rank(self.best)):
            self.best = candidate
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(self.step, self._write_weights)
        return found

    @property
    def _stays_below_guard(self) -> bool:
        return 0 < self.config.stop_below_guard <= self._below_guard

    def _take_best(self) -> None:
        """Puts the weights of the best validated step into the model."""
        if self.best is None:
            _log.warning(
                "no validated step kept its accuracy within train.accuracy_guard (%g) of the start's; "
                "the policy is that of the last step",
                self.config.accuracy_guard,
            )
            return
        found = self.checkpoints.best(self.best["step"])
        if found is None:
            raise TrainingError(
                f"the chosen weights of step {self.best['step']} are gone or damaged; start again, and the "
                "training goes on from a checkpoint before them"
            )
        weights = load_file(found / "weights.safetensors", device=str(self.model.device))
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(weights[name])

    def _write_weights(self, directory: Path) -> None:
        weights = {name: parameter.detach().contiguous() for name, parameter in self._trained().items()}
        save_file(weights, directory / "weights.safetensors")

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _save(self) -> None:
        """One checkpoint of all processes: the main one writes, but every one adds the state of its generators."""

        def write(directory: Path) -> None:
            broadcast_object_list([str(directory)])
            self._write_state(directory)

        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, write)
        else:
            directory = [""]
            broadcast_object_list(directory)
            self._write_state(Path(directory[0]))
        self.accelerator.wait_for_everyone()
        self._unsaved = False

    def _write_state(self, directory: Path) -> None:
        self.accelerator.save_state(str(directory), safe_serialization=True)
        if self.accelerator.is_main_process:
            state = {"step": self.step, "skipped_steps": self.updater.skipped_steps, "best": self.best}
            state |= {"below_guard": self._below_guard, "seconds": time.perf_counter() - self._began}
            state |= {"history": self.history, "unfinished": self._unfinished}
            write_json_atomic(directory / "trainer.json", state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one. The main process decides which that is."""
        found = [self._newest() if self.accelerator.is_main_process else None]
        broadcast_object_list(found)
        if found[0] is None:
            return
        directory, state = found[0]
        self.accelerator.load_state(directory)
        self._follow_learner()
        self.step, self.updater.skipped_steps = state["step"], state["skipped_steps"]
        self.history, self.best, self._below_guard = state["history"], state["best"], state["below_guard"]
        self._unfinished = state["unfinished"]
        self._began -= state["seconds"]
        if self.accelerator.is_main_process:
            for metrics in self.history:  # the record of this process is whole
                self.on_step(metrics, None)
        _log.warning("resumed from %s at step %d of %d", directory, self.step, self.config.steps)

    def _newest(self) -> tuple[str, dict] | None:
        """Directory and state of the newest whole checkpoint, of one whose chosen weights are whole where there is."""
        newest = None
        for path in self.checkpoints.whole():
            state = json.loads((path / "trainer.json").read_text())
            if state["best"] is None or self.checkpoints.best(state["best"]["step"]) is not None:
                return str(path), state
            newest = newest or (str(path), state | {"best": None})
        if newest is not None:
            _log.warning("no checkpoint has its chosen weights: they are chosen among the validated steps to come")
        return newest

    def _prepare_weights(self) -> None:
        """Decides what is trained, what the reference is, and whether a sharded copy learns."""
        self.adapters = self.reference = None
        if self.config.lora is not None:
            self.adapters = add_adapters(self.model, self.config.lora, self.seed)
        else:
            if self.config.beta:
                self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            if self.config.freeze_vision:
                freeze_vision(self.model)
        self.learner = learner_of(self.model, self.accelerator) if is_sharded(self.accelerator) else self.model

    def _follow_learner(self) -> None:
        """Brings the whole weights, which roll out, to the learner's, where these are sharded."""
        if self.learner is not self.model:
            gather(self.learner, self.model)

    def _own(self, rows: Sequence[Row]) -> Sequence[Row]:
        return share_of(rows, self.accelerator.process_index, self.accelerator.num_processes)

    def _look_at_replay(self, metrics: dict) -> None:
        difference = metrics.get("replay_max_difference", 0.0)
        if self.model.dtype == torch.float32 and difference > REPLAY_LIMIT and not self._replay_warned:
            self._replay_warned = True
            _log.warning(
                "step %d: log-probabilities of rollout and replay differ by %.2g (more than %g): the update does not "
                "see what was sampled; later steps are not named",
                self.step, difference, REPLAY_LIMIT,
            )  # fmt: skip


def _rank(validated: dict) -> tuple[float, ...]:
    """Of a validated step, lower is better: the fewer tokens kept; once the target was reached the higher accuracy."""
    if validated["reached_target"]:
        return 0.0, -validated["accuracy"], validated["token_ratio"]
    return 1.0, validated["token_ratio"]
