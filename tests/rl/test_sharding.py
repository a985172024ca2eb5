"""Which FSDP configurations the training refuses, and in what precision its sharded copy is. Runs: test_processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny_prompts import sharp_model

from sparsity_forcing.rl.errors import TrainingError
from sparsity_forcing.rl.sharding import learner_of, reduce_unused, require_shardable

GOOD = {"fsdp_version": 2, "auto_wrap_policy": "no_wrap", "cpu_ram_efficient_loading": False}
LAYERS = {"auto_wrap_policy": "transformer_based_wrap"}


def launched(precision: str = "no", **changes) -> SimpleNamespace:
    """What is looked at of an Accelerator under FSDP; accelerate makes one where there are accelerators alone."""
    plugin = FullyShardedDataParallelPlugin(**GOOD | changes)
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"fsdp_version": 1}, "shards with fsdp_version: 2, as .*fsdp-zero2.yaml"),
        ({"cpu_ram_efficient_loading": True}, "shards with fsdp_cpu_ram_efficient_loading: false, as"),
        (
            {"activation_checkpointing": True, "precision": "bf16"},
            'shards with fsdp_activation_checkpointing: false, mixed_precision: "no", as',
        ),
        (
            {"auto_wrap_policy": "size_based_wrap"},
            "shards with fsdp_auto_wrap_policy: NO_WRAP or TRANSFORMER_BASED_WRAP",
        ),
        (
            LAYERS | {"reshard_after_forward": False},
            "shards with fsdp_reshard_after_forward: true, as .*fsdp-zero3.yaml",
        ),
        ({"activation_checkpointing": True}, "shards with fsdp_activation_checkpointing: false, as"),
        ({"precision": "bf16"}, 'shards with mixed_precision: "no", as'),
    ],
)
def test_what_the_training_cannot_run_under_is_told_with_the_setting_that_it_can(changes, told):
    require_shardable(launched())
    require_shardable(launched(**LAYERS))
    with pytest.raises(TrainingError, match=told):
        require_shardable(launched(**changes))


def test_a_bfloat16_model_learns_in_float32_and_computes_in_bfloat16():
    model, accelerator = sharp_model(dtype=torch.bfloat16)[0], launched()
    model.lm_head.requires_grad_(False)
    learner = learner_of(model, accelerator)
    for (name, whole), own in zip(model.named_parameters(), learner.parameters(), strict=True):
        assert whole.dtype == torch.bfloat16, name
        assert own.dtype == (torch.float32 if own.requires_grad else torch.bfloat16), name
        assert torch.equal(own.bfloat16(), whole), name
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_the_learner_shares_what_is_frozen_and_only_the_rest_is_sharded():
    model, accelerator = sharp_model(dtype=torch.float32)[0], launched()
    model.model.visual.requires_grad_(False)
    learner = learner_of(model, accelerator)
    for (name, whole), own in zip(model.named_parameters(), learner.parameters(), strict=True):
        assert (whole is own) == (not whole.requires_grad), name
    left_whole = {id(p) for part in accelerator.state.fsdp_plugin.ignored_modules for p in part.parameters()}
    assert left_whole == {id(p) for p in model.model.visual.parameters()}


def test_a_torch_that_cannot_shard_what_some_rows_do_not_use_is_told():
    with pytest.raises(TrainingError, match=r"set train\.freeze_vision: true, or install torch 2\.13"):
        reduce_unused(torch.nn.Linear(1, 1))


def test_a_float32_model_is_copied_as_it_is_even_after_a_bfloat16_model():
    model, accelerator = sharp_model(dtype=torch.float32)[0], launched()
    learner_of(sharp_model(dtype=torch.bfloat16)[0], accelerator)
    learner = learner_of(model, accelerator)
    assert learner is not model
    assert {parameter.dtype for parameter in learner.parameters()} == {torch.float32}
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (None, None)
