"""What a training needs before it starts, and what it is about to do."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from sparsity_forcing.params import TrainParams
from sparsity_forcing.rl.errors import TrainingError
from sparsity_forcing.rl.sharding import is_sharded, require_shardable

PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def require_trainable(model, rows: int, config: TrainParams, accelerator: Accelerator) -> None:
    """Raises TrainingError unless ``model`` can be trained like this on so many training rows."""
    world = accelerator.num_processes
    if accelerator.distributed_type not in PARALLEL:
        raise TrainingError(
            f"training runs in one process, data-parallel or under FSDP2, not under "
            f"{accelerator.distributed_type.value}; use a configuration of presets/accelerate/"
        )
    if is_sharded(accelerator):
        require_shardable(accelerator)
    if model.dtype == torch.float16:
        raise TrainingError(
            "model.dtype 'float16' cannot be trained: its gradients underflow; use 'bfloat16' or 'float32'"
        )
    if config.prompts_per_step % world:
        raise TrainingError(f"train.prompts_per_step ({config.prompts_per_step}) must divide by {world} processes")
    own, together = config.prompts_per_step // world, prompts_together(config, world)
    if own % together:
        raise TrainingError(
            f"train.rollout_prompts ({together}) must divide the {own} prompts of a process: "
            f"train.prompts_per_step ({config.prompts_per_step}) over {world} process{'es' if world > 1 else ''}"
        )
    if rows < config.prompts_per_step:
        raise TrainingError(f"{rows} training rows are fewer than train.prompts_per_step ({config.prompts_per_step})")


def prompts_together(config: TrainParams, world: int) -> int:
    """Prompts of a process that are rolled out together."""
    return config.rollout_prompts or config.prompts_per_step // world


def cautions(config: TrainParams) -> list[str]:
    """What these parameters allow but will not do, in words."""
    pairs = config.num_generations == len(config.budgets) == 2
    if pairs and config.center_by_budget and config.scale_rewards == "group":
        return [
            "train.num_generations is 2, one rollout for each of two train.budgets: divided by the deviation of two "
            "rewards nothing but their order is left, and train.center_by_budget takes that away. Efficiency is not "
            "learned; set train.num_generations to 4 or more"
        ]
    return []


def arithmetic(config: TrainParams, world: int, rows: int, trained: int, weights: int) -> list[str]:
    """The batch arithmetic in words: ``rows`` of training data, ``trained`` of so many ``weights``."""
    rollouts = config.prompts_per_step * config.num_generations
    together = prompts_together(config, world)
    micro = min(config.micro_batch_prompts or together, together)
    updates = config.num_iterations
    return [
        f"{config.steps} steps x {config.prompts_per_step} prompts x {config.num_generations} generations = "
        f"{config.steps * rollouts} rollouts ({rollouts} a step, {rollouts // world} a process); "
        f"{config.steps * config.prompts_per_step / rows:.2f} epochs of {rows} rows",
        f"{world} process{'es' if world > 1 else ''}; {together} prompts roll out together, {micro} share a backward "
        f"pass; {updates} update{'s' if updates > 1 else ''} a step; {trained:,} of {weights:,} weights are trained",
    ]
