"""Sharded training through accelerate's FSDP2: the trained weights in float32, their gradients and the optimizer's
state are divided over the processes.

What rolls out, validates and is the reference stays whole on every device: an answer may be longer in one process than
in another, and none waits inside. The `learner` is the copy that is sharded; frozen weights are not copied, the learner
has those of the model. The update gathers the trained weights either once for a step's pass and its backward (as ZeRO-2
does) or layer by layer (as ZeRO-3 does).

Layer by layer needs two things that FSDP's hooks do not know of. Completions use keys and values of the visual prefix,
which are no output of a layer: they are made one (`_Outputs`), so that a layer's weights are back before their gradient
arrives. And every process must run a layer as often as the others: one whose rows show no image runs a prefix that
counts nothing (`uncounted_prefix`).
"""

from __future__ import annotations

import copy
import os
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from sparsity_forcing.attention.cache import pruned_cache
from sparsity_forcing.rl.errors import TrainingError
from sparsity_forcing.rl.layer_checkpoints import decoder_layers


def launched_sharded() -> bool:
    """Whether the launcher asks for it; before there is an `Accelerator`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def by_layer(accelerator: Accelerator) -> bool:
    """Whether the update gathers the trained weights layer by layer."""
    policy = accelerator.state.fsdp_plugin.auto_wrap_policy
    return getattr(policy, "func", policy) is transformer_auto_wrap_policy  # accelerate binds the classes to it


def require_shardable(accelerator: Accelerator) -> None:
    """Raises TrainingError where the launcher's FSDP configuration is one that this training cannot run under."""
    plugin = accelerator.state.fsdp_plugin
    layers = by_layer(accelerator)
    faults = [
        fault
        for fault, found in (
            ("fsdp_version: 2", plugin.fsdp_version != 2),
            (
                "fsdp_auto_wrap_policy: NO_WRAP or TRANSFORMER_BASED_WRAP",
                plugin.auto_wrap_policy is not None and not layers,
            ),
            ("fsdp_reshard_after_forward: true", layers and not plugin.reshard_after_forward),
            ("fsdp_cpu_ram_efficient_loading: false", plugin.cpu_ram_efficient_loading),
            ("fsdp_activation_checkpointing: false", plugin.activation_checkpointing),
            ('mixed_precision: "no"', accelerator.mixed_precision != "no"),
        )
        if found
    ]
    if faults:
        raise TrainingError(
            f"this training shards with {', '.join(faults)}, as presets/accelerate/fsdp-zero"
            f"{3 if layers else 2}.yaml has it; precision is model.dtype of params.yaml, checkpointing "
            "train.gradient_checkpointing"
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
    # A module of their own: of one that is named, accelerate leaves out what is inside too, trained or not.
    plugin.ignored_modules = [nn.ParameterList(frozen.values())]
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if rounded else None,
        reduce_dtype=torch.float32 if rounded else None,
        cast_forward_inputs=False,
    )
    if by_layer(accelerator):
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in decoder_layers(learner)})
        for layer in decoder_layers(learner):  # before FSDP adds its own hook, which is to see what this one returns
            layer.register_forward_hook(partial(_with_keys_and_values, layer.self_attn.layer_idx), with_kwargs=True)
    return learner


class _Outputs(torch.autograd.Function):
    """Lets no gradient of a layer's hidden states, keys or values through before that of all three is known."""

    @staticmethod
    def forward(ctx, hidden: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return hidden.clone(), keys.view_as(keys), values.view_as(values)  # models add to hidden states in place

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients


def _with_keys_and_values(index: int, layer: nn.Module, args, kwargs, hidden: Tensor) -> Tensor:
    """A forward hook: what the layer leaves in the cache becomes an output beside its hidden states."""
    stored = kwargs["past_key_values"].layers[index]
    hidden, stored.keys, stored.values = _Outputs.apply(hidden, stored.keys, stored.values)
    return hidden


def uncounted_prefix(model, token: Tensor) -> Tensor:
    """Zero, made of the keys and values of a prefix of one ``token``, (1, 1).

    Added to what the passes give, it runs every layer once more in both directions, as the visual prefix of other
    processes does, and changes no gradient.
    """
    cache = pruned_cache(model.config.get_text_config().num_hidden_layers)
    model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return sum(layer.keys.sum() + layer.values.sum() for layer in cache.layers) * 0.0


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
