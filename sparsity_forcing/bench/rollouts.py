"""Whole answers of the small default model: a group against separate answers, the loop against `model.generate`."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsity_forcing import sparse_attention, sparse_generate
from sparsity_forcing.bench.compare import Case, fastest, require_equal, time_arms
from sparsity_forcing.data.digits import corpus, load_scans, render
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.models.tiny import build_model, build_processor
from sparsity_forcing.params import ScratchModel

SEPARATE, UNSHARED = "8 separate generations", "one unshared 8-row call"
BUDGETS = (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)


def small_model():
    """The default model with random weights, and its processor. It never stops by itself: all arms do equal work."""
    processor = build_processor(corpus())
    model = build_model(ScratchModel(), processor.tokenizer, seed=0).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def group_case(grid: int, new_tokens: int, repetitions: int) -> Case:
    """Eight answers of one prompt, each with its own budget: together; against eight generations by themselves, and
    against one call of eight rows that share no prefix."""
    model, processor = small_model()
    inputs = prompts_of(processor, grid, 1)
    eight = prompts_of(processor, grid, 1, only=0, times=8)
    p = torch.tensor(BUDGETS)

    def together() -> Tensor:
        return sparse_generate(model, inputs, p, num_return_sequences=8, max_new_tokens=new_tokens).tokens

    def separate() -> Tensor:
        return torch.cat([sparse_generate(model, inputs, float(b), max_new_tokens=new_tokens).tokens for b in BUDGETS])

    def unshared() -> Tensor:
        return sparse_generate(model, eight, p, max_new_tokens=new_tokens).tokens

    checked = [
        require_equal(together(), separate(), "the tokens of all answers"),
        require_equal(together(), unshared(), "the tokens of all answers, in one unshared call"),
    ]
    seconds = time_arms({"group": together, SEPARATE: separate, UNSHARED: unshared}, repetitions)
    setting = setting_of(model, grid, inputs, new_tokens) | {"prompts": 1, "answers": 8}
    name = f"group of 8, {grid * grid} visual tokens"
    return Case(name, setting, "group", SEPARATE, seconds, checked, _rates(seconds, 8))


def one_case(grid: int, new_tokens: int, repetitions: int) -> Case:
    """What the other seven of a group of eight cost: seconds per rollout of the group, against one rollout alone.
    ``notes.group_over_one``: the whole group over the one. (`group_case` is against eight, each with its budget.)"""
    model, processor = small_model()
    inputs, p = prompts_of(processor, grid, 1), torch.tensor(BUDGETS)

    def group() -> Tensor:
        return sparse_generate(model, inputs, p, num_return_sequences=8, max_new_tokens=new_tokens).tokens

    def one() -> Tensor:
        return sparse_generate(model, inputs, BUDGETS[-1], max_new_tokens=new_tokens).tokens

    checked = [require_equal(group()[-1:], one(), "the group's last answer and the answer alone")]
    seconds = time_arms({"group": group, "one": one}, repetitions)
    pairs = zip(seconds["group"], seconds["one"], strict=True)
    notes = {"group_over_one": statistics.median(group / one for group, one in pairs)}
    per_rollout = {"group": [value / 8 for value in seconds["group"]], "one": seconds["one"]}
    setting = setting_of(model, grid, inputs, new_tokens) | {"prompts": 1, "answers": 8}
    name = f"a rollout of a group of 8, {grid * grid} visual tokens"
    return Case(name, setting, "group", "one", per_rollout, checked, notes)


def loop_case(grid: int, prompts: int, new_tokens: int, repetitions: int) -> Case:
    """Rollouts of several prompts, eight budgets each: our loop, against the faster of `model.generate` looped over
    rollouts and `model.generate` with all rollouts of a prompt in one call."""
    model, processor = small_model()
    inputs = prompts_of(processor, grid, prompts)
    alone = [prompts_of(processor, grid, prompts, only=index) for index in range(prompts)]
    eight = [prompts_of(processor, grid, prompts, only=index, times=8) for index in range(prompts)]
    p = torch.tensor(BUDGETS)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def loop() -> Tensor:
        budgets = p.repeat(prompts)
        return sparse_generate(model, inputs, budgets, num_return_sequences=8, max_new_tokens=new_tokens).tokens

    @torch.no_grad()
    def generate() -> Tensor:
        answers = []
        for prompt in alone:
            for budget in BUDGETS:
                with sparse_attention(model, p=budget):
                    answers.append(model.generate(**prompt, **options)[:, -new_tokens:])
        return torch.cat(answers)

    @torch.no_grad()
    def generate_batched() -> Tensor:
        answers = []
        for prompt in eight:
            with sparse_attention(model, p=p):
                answers.append(model.generate(**prompt, **options)[:, -new_tokens:])
        return torch.cat(answers)

    checked = [
        require_equal(loop(), generate(), "the tokens of all rollouts"),
        require_equal(loop(), generate_batched(), "the tokens of all rollouts, batched by prompt"),
    ]
    arms = {"loop": loop, "model.generate, 1 row a call": generate, "model.generate, 8 rows a call": generate_batched}
    seconds = time_arms(arms, repetitions)
    setting = setting_of(model, grid, inputs, new_tokens) | {"prompts": prompts, "rollouts": 8 * prompts}
    name = f"rollouts, {grid * grid} visual tokens"
    return Case(name, setting, "loop", fastest(seconds, "loop"), seconds, checked, _rates(seconds, 8 * prompts))


def prompts_of(processor, grid: int, count: int, only: int | None = None, times: int = 1) -> dict:
    """Model inputs of ``count`` seeded canvases, or of one of them ``times`` times."""
    rng = np.random.default_rng(0)
    scans = load_scans("test")
    canvases = [render(rng, scans, grid, "sum") for _ in range(count)]
    if only is not None:
        canvases = [canvases[only]] * times
    images = [[Image.fromarray(canvas.pixels)] for canvas in canvases]
    return encode_prompts(processor, [canvas.question for canvas in canvases], images)


def setting_of(model, grid: int, inputs: dict, new_tokens: int) -> dict:
    return {
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, random weights",
        "layers": model.config.get_text_config().num_hidden_layers,
        "visual_tokens": grid * grid,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": new_tokens,
        "budgets": BUDGETS,
        "prefill": "suffix",
        "device": "cpu",
        "dtype": "float32",
    }


def _rates(seconds: dict[str, list[float]], answers: int) -> dict:
    return {"rollouts_per_second": {arm: answers / statistics.median(samples) for arm, samples in seconds.items()}}
