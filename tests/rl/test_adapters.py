"""LoRA: adapters are trained, the reference is the model without them, what comes back is a plain model."""

from __future__ import annotations

import torch
from runs import trainer_of

LORA = {"r": 4, "alpha": 8.0, "targets": ["q_proj", "k_proj"]}


def test_only_adapters_of_the_decoder_are_trained(tmp_path):
    trainer = trainer_of(tmp_path, lora=LORA)
    names = list(trainer._trained())
    assert len(names) == 2 * 2 * 2  # layers, targets, two matrices
    assert all("language_model.layers" in name and ".lora_" in name for name in names)
    assert trainer.reference is None  # no second model


def test_a_plain_model_comes_back_with_other_attention_weights(tmp_path):
    trainer = trainer_of(tmp_path, lora=LORA)
    model = trainer.model
    trainer.train()
    after = model.state_dict()
    plain = trainer_of(tmp_path / "plain").model.state_dict()
    assert after.keys() == plain.keys()
    assert not any("lora" in name for name in after)
    for name, value in after.items():
        changed = name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")) and "visual" not in name
        assert torch.equal(value, plain[name]) != changed, name


def test_the_reference_is_the_base_without_adapters(tmp_path):
    full, adapted = trainer_of(tmp_path / "full"), trainer_of(tmp_path / "lora", lora=LORA)
    first, expected = adapted.train(), full.train()
    assert first[0]["kl"] == expected[0]["kl"]  # adapters start at zero: the same policy, the same reference
    assert first[0]["reward"] == expected[0]["reward"]
    assert first[-1]["kl"] != expected[-1]["kl"]


def test_adapters_start_from_the_seed(tmp_path):
    torch.manual_seed(1)
    one = trainer_of(tmp_path, lora=LORA)._trained()
    torch.manual_seed(2)
    other = trainer_of(tmp_path, lora=LORA)._trained()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
