"""The trainer beside TRL's GRPOTrainer: the same small model, prompts, group, lengths and threads, on the CPU.

Each engine trains in a process of its own, in turns, so that its peak memory is its own. Both freeze the vision tower,
hold a frozen reference for the KL term, take one update a batch of rollouts and step AdamW. TRL's attention is dense:
it has no pruned cache, no kept sets to replay and no selection to score, so what is compared is the time that a step of
training takes, not the same computation. TRL trains in two ways: all of a step's completions in one pass (``trl``), or
a group's (``trl_parts``), which takes less memory. Gradient checkpointing, which takes more time, is off in both.

Run as `python -m sparsity_forcing.bench.training ours|trl|trl_parts FOLDER` it is such a process; it prints one line of
JSON.
"""

from __future__ import annotations

import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparsity_forcing.bench.compare import BenchError, Case, fastest
from sparsity_forcing.bench.rollouts import BUDGETS, prompts_of, setting_of, small_model
from sparsity_forcing.data.digits import load_scans, render
from sparsity_forcing.data.schema import Row
from sparsity_forcing.models.families import freeze_vision

GRID, PROMPTS, GROUP, NEW_TOKENS = 16, 8, 8, 16
STEPS, WARM_UP = 4, 1
BETA, LEARNING_RATE = 0.04, 1e-6
REWARD = "sparsity_forcing.bench.training:even"
TOGETHER = {"trl": None, "trl_parts": GROUP}  # completions that TRL passes through the model at a time, None: a step's
ENGINES = ("ours", *TOGETHER)


def training_case(rounds: int) -> Case:
    """A training step of ours against TRL's, the baseline the faster of its ways: the median step of every round."""
    found: dict[str, list[dict]] = {engine: [] for engine in ENGINES}
    for place in range(rounds):
        turn = place % len(ENGINES)
        for engine in (*ENGINES[turn:], *ENGINES[:turn]):
            found[engine].append(_in_a_process(engine))
    setting = found["ours"][0]["setting"] | {"threads": torch.get_num_threads()}
    setting["trl_settings"] = {_label(engine): found[engine][0]["settings"] for engine in TOGETHER}
    found = {_label(engine): runs for engine, runs in found.items()}
    seconds = {engine: [statistics.median(run["seconds"]) for run in runs] for engine, runs in found.items()}
    notes = {
        "completions_per_second": {e: PROMPTS * GROUP / statistics.median(s) for e, s in seconds.items()},
        "peak_memory_bytes": {e: max(run["peak"] for run in runs) for e, runs in found.items()},
        "peak_above_start_bytes": {e: max(run["peak"] - run["start"] for run in runs) for e, runs in found.items()},
        "mean_length": {e: statistics.mean(run["mean_length"] for run in runs) for e, runs in found.items()},
        "runs": found,
    }
    checked = [
        {"what": "every step had all completions and a gradient that is finite and not 0", "steps": rounds * STEPS}
    ]
    return Case("a training step", setting, "ours", fastest(seconds, besides="ours"), seconds, checked, notes)


def _label(engine: str) -> str:
    return f"TRL, {TOGETHER[engine] or PROMPTS * GROUP} completions a pass" if engine in TOGETHER else engine


def even(prediction: str, answer: str) -> float:
    """A reward that a model with random weights earns now and then, so that advantages and gradients are not 0."""
    return float(len(prediction) % 2 == 0)


def bench_rows(split: str, count: int) -> list[Row]:
    """Seeded questions about digits on a grid."""
    rng, scans = np.random.default_rng(0), load_scans("train" if split == "train" else "test")
    rows = []
    for place in range(count):
        canvas = render(rng, scans, GRID, "sum")
        buffer = io.BytesIO()
        Image.fromarray(canvas.pixels).save(buffer, format="PNG")
        rows.append(Row(f"{split}-{place}", split, "sum", canvas.question, canvas.answer, [buffer.getvalue()]))
    return rows


def train_ours(folder: Path) -> dict:
    from sparsity_forcing.checkpoints import Checkpoints
    from sparsity_forcing.params import SparsityParams, TrainParams
    from sparsity_forcing.rl.trainer import Trainer

    model, processor = small_model()
    rows = bench_rows("train", PROMPTS * (STEPS + WARM_UP))
    config = TrainParams(
        steps=STEPS + WARM_UP,
        prompts_per_step=PROMPTS,
        num_generations=GROUP,
        budgets=BUDGETS,
        reward={"correct": REWARD},
        max_completion_length=NEW_TOKENS,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        checkpoint_every=1000,
        validate_every=1000,
        validation_rows=1,
        log_samples_every=1000,
    )
    start = _peak()
    checkpoints = Checkpoints(folder, "bench")
    clock: list[float] = []  # ends of steps, all that a step does included, as the other engine's

    def on_step(*_: object) -> None:
        clock.append(time.perf_counter())

    history = Trainer(model, processor, rows, rows[:1], config, SparsityParams(), 0, checkpoints, on_step).train()
    measured = history[WARM_UP:]
    _require_whole([row["grad_norm"] for row in measured], [row["rollouts"] for row in measured])
    setting = setting_of(model, GRID, prompts_of(processor, GRID, 1), NEW_TOKENS)
    setting |= {"prompts": PROMPTS, "answers": GROUP, "attention_dtype": config.attention_dtype}
    return {
        "seconds": [after - before for before, after in pairwise(clock)],
        "mean_length": statistics.mean(row["completions/mean_length"] for row in measured),
        "start": start,
        "peak": _peak(),
        "setting": setting,
    }


def train_trl(folder: Path, together: int | None = None) -> dict:
    """In float32, ``together`` completions a pass, or all of a step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from sparsity_forcing.scoring import score_function

    model, processor = small_model()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder / "model")  # its reference model is loaded from where the model was
    model = type(model).from_pretrained(folder / "model", dtype=torch.float32)
    freeze_vision(model)
    rows = bench_rows("train", PROMPTS * (STEPS + WARM_UP))
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row.question}],
                "image": Image.open(io.BytesIO(row.images[0])),
                "answer": row.answer,
            }
            for row in rows
        ]
    )
    score = score_function(REWARD)

    def reward(completions, answer, **_):
        return [score(said[0]["content"], gold) for said, gold in zip(completions, answer, strict=True)]

    together = together or PROMPTS * GROUP
    passes = PROMPTS * GROUP // together
    settings = {
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": passes,
        "steps_per_generation": passes,  # completions are sampled for the whole step at once
        "num_generations": GROUP,
        "max_completion_length": NEW_TOKENS,
        "max_steps": STEPS + WARM_UP,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "temperature": 1.0,
        "loss_type": "grpo",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    start = _peak()
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            clock.append(time.perf_counter())

    trainer = GRPOTrainer(
        model,
        reward,
        GRPOConfig(str(folder), **settings),
        dataset,
        processing_class=processor,
        callbacks=[Clock()],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "grad_norm" in line][WARM_UP:]
    _require_whole([line["grad_norm"] for line in logs], [PROMPTS * GROUP] * len(logs))
    seconds = [after - before for before, after in pairwise(clock)][WARM_UP:]
    return {
        "seconds": seconds,
        "mean_length": statistics.mean(line["completions/mean_length"] for line in logs),
        "start": start,
        "peak": _peak(),
        "settings": settings,
    }


def _require_whole(norms: list[float], completions: list[int]) -> None:
    trained = all(np.isfinite(norms)) and min(norms, default=0) > 0
    if len(norms) != STEPS or not trained or set(completions) != {PROMPTS * GROUP}:
        raise BenchError(f"not {STEPS} whole steps: gradient norms {norms}, completions {completions}")


def _in_a_process(engine: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparsity_forcing.bench.training", engine, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{engine} did not train: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    engine, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(train_trl(folder, TOGETHER[engine]) if engine in TOGETHER else train_ours(folder)))
