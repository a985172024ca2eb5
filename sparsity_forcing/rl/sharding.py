"""Sharded training through accelerate's FSDP2: the trained weights in float32, their gradients and the optimizer's
state are divided over the processes.

What rolls out, validates and is the reference stays whole on every device: an answer may be longer in one process than
in another, and none waits inside. The `learner` is the copy that is sharded; frozen weights are not copied, the learner
has those of the model. The update gathers the trained weights once for a step's pass and its backward, not layer by
layer: completions use keys and values of the visual prefix, which no layer's output shows, so FSDP's hooks on layers
would free weights that the backward pass still needs.
"""

from __future__ import annotations

import copy
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from sparsity_forcing.rl.errors import TrainingError


def launched_sharded() -> bool:
    """Whether the launcher asks for it; before there is an `Accelerator`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def require_shardable(accelerator: Accelerator) -> None:
    """Raises TrainingError where the launcher's FSDP configuration is one that this training cannot run under."""
    plugin = accelerator.state.fsdp_plugin
    faults = [
        fault
        for fault, found in (
            ("fsdp_version: 2", plugin.fsdp_version != 2),
            ("fsdp_auto_wrap_policy: NO_WRAP", plugin.auto_wrap_policy is not None),
            ("fsdp_cpu_ram_efficient_loading: false", plugin.cpu_ram_efficient_loading),
            ("fsdp_activation_checkpointing: false", plugin.activation_checkpointing),
            ('mixed_precision: "no"', accelerator.mixed_precision != "no"),
        )
        if found
    ]
    if faults:
        raise TrainingError(
            f"this training shards with {', '.join(faults)}, as presets/accelerate/fsdp.yaml has it; precision is "
            "model.dtype of params.yaml, checkpointing train.gradient_checkpointing"
        )


def learner_of(model, accelerator: Accelerator):
    """The copy of ``model`` whose trained weights are sharded, before `Accelerator.prepare`; it shares the frozen ones.

    A bfloat16 model's are float32 in it, so that small updates are not rounded away; passes compute in bfloat16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    learner = copy.deepcopy(model, memo=dict(frozen))
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    rounded = any(parameter.dtype == torch.bfloat16 for parameter in trained)
    if rounded:
        for parameter in trained:
            parameter.data = parameter.data.float()
    plugin = accelerator.state.fsdp_plugin  # one for the process
    plugin.ignored_modules = [
        module
        for module in learner.modules()
        if (own := list(module.parameters(recurse=False))) and all(id(parameter) in frozen for parameter in own)
    ]
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if rounded else None,
        reduce_dtype=torch.float32 if rounded else None,
        cast_forward_inputs=False,
    )
    return learner


def reduce_unused(replay) -> None:
    """Weights that a process' rows do not need, of a tower where no row has an image, count as a gradient of zero.

    Else the processes would reduce gradients of different sizes.

    Raises:
        TrainingError: this torch cannot.
    """
    if not hasattr(replay, "set_reduce_scatter_unused_params"):
        raise TrainingError(
            f"torch {torch.__version__} cannot shard a vision tower that some rows do not use: set "
            "train.freeze_vision: true, or install torch 2.13"
        )
    replay.set_reduce_scatter_unused_params(True)


@torch.no_grad()
def gather(learner, model) -> None:
    """Puts the learner's trained weights into ``model``, whole, in every process; a collective."""
    whole = dict(model.named_parameters())
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            whole[name].copy_(parameter.full_tensor())
