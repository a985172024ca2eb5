"""LoRA through peft: adapters on the decoder's linear layers; the reference is the model without them."""

from __future__ import annotations

import torch

from sparsity_forcing.params import LoraParams
from sparsity_forcing.rl.errors import TrainingError


def add_adapters(model, lora: LoraParams, seed: int):
    """Puts an adapter on every target layer of the decoder, in place, and freezes all else.

    Returns peft's handle: ``handle.disable_adapter()`` is a block in which the model is the one it was,
    ``handle.merge_and_unload()`` adds the adapters to the weights and leaves a plain model.

    Raises:
        TrainingError: no layer has such a name.
    """
    from peft import LoraConfig, get_peft_model  # here, as its import takes a second that only adapters need

    decoder = model.get_decoder()
    linear = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
    unknown = sorted(set(lora.targets) - linear)
    if unknown:
        raise TrainingError(
            f"train.lora.targets {unknown} are no linear layers of the decoder; it has {', '.join(sorted(linear))}"
        )
    root = next(name for name, part in model.named_modules() if part is decoder)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=rf"{root}\..*\.({'|'.join(lora.targets)})", bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
