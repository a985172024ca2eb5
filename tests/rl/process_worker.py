"""One process of a two-process training: `accelerate launch … process_worker.py DIRECTORY`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from sparsity_forcing.rl.layer_checkpoints import decoder_layers
from sparsity_forcing.rl.sharding import launched_sharded
from sparsity_forcing.torchvision_ops import declare_missing_ops

# Five validation rows, two a batch: the processes have two and three rows, so one batch and two. Noise belongs to one
# prompt, so it is that of one process.
CONFIG = {"prompts_per_step": 4, "rollout_prompts": 1, "validate_every": 1, "validation_rows": 5, "accuracy_guard": 1.0}
CONFIG |= {"validation_batch_size": 2}
CONFIG |= {"dtype": torch.float64, "num_iterations": 2, "reward": {"correct": "scenes:always_right"}}
SCENES = {
    "all weights": {"freeze_vision": False},
    "text alone": {"freeze_vision": False, "micro_batch_prompts": 1},
    "text alone, adapters": {"lora": {"r": 4}, "micro_batch_prompts": 1},
    "llava_next": {"family": "llava_next"},  # has frozen weights beside its decoder, not in a module of their own
    "little memory": {"gradient_checkpointing": True, "logits_chunk": 5, "loss_type": "dapo"},
    "adapters": {"lora": {"r": 4}},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 adapters": {"dtype": torch.bfloat16, "lora": {"r": 4}},
    "resumed": {"lr_scheduler_type": "constant_with_warmup"},  # the same rate in the first half of more steps
}


def train(directory: Path, scene: str, steps: int = 4) -> tuple[dict, dict]:
    """Weights after the steps; the history and what was reported. Goes on from a checkpoint in ``directory``."""
    from runs import Recorder, rows, trainer_of  # once the operators that transformers needs are declared

    recorder = Recorder()
    config = CONFIG | SCENES[scene] | {"steps": steps}
    asked = rows("train", 6)
    if scene.startswith("text alone"):  # some parts of a step have no image where those of the other process do
        asked = [row if place % 2 else replace(row, images=[]) for place, row in enumerate(asked)]
    trainer = trainer_of(directory / "checkpoints", recorder, train=asked, **config)
    whole, images = whole_layers(trainer.learner), []
    trainer.passes.register_forward_pre_hook(lambda _, given: images.append(given[0].prefix > 0))
    history = trainer.train()
    reported = [row["step"] for row in recorder.steps]
    found = {"history": history, "reported": reported, "tables": len(recorder.tables)}
    return trainer.model.state_dict(), found | {"whole_layers": sorted(whole), "images": images}


def whole_layers(learner) -> set[int]:
    """Of how many decoder layers the weights are whole when one of them runs; filled while the learner does."""
    layers, counts = decoder_layers(learner), set()

    def count(*_) -> None:
        divided = [any(isinstance(parameter, DTensor) for parameter in layer.parameters()) for layer in layers]
        counts.add(divided.count(False))

    for layer in layers:
        layer.register_forward_pre_hook(count)
    return counts


def shard_on_the_cpu() -> None:
    """accelerate shards on accelerators alone; torch's FSDP2 works on the CPU as well."""
    PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_XPU


if __name__ == "__main__":
    declare_missing_ops()
    if launched_sharded():
        shard_on_the_cpu()
    for name in SCENES:
        out = Path(sys.argv[1]) / name
        out.mkdir(exist_ok=True)
        if name == "resumed":
            train(out, name, steps=2)
        weights, found = train(out, name)
        rank = PartialState().process_index
        save_file({name: value.clone() for name, value in weights.items()}, out / f"rank-{rank}.safetensors")
        (out / f"rank-{rank}.json").write_text(json.dumps(found))
