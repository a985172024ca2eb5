"""bfloat16 models are trained in float32."""

from __future__ import annotations

import pytest
import torch
from runs import trainer_of
from torch import nn

from sparsity_forcing.rl.master_weights import MasterAdamW, adamw


def quadratic(weights: list[nn.Parameter]) -> None:
    """A gradient that always points the same way."""
    for weight in weights:
        weight.grad = torch.ones_like(weight)


def test_small_updates_add_up():
    """Adam moves a weight by about the learning rate; 300 such moves are visible in bfloat16, a single one is not."""
    master, plain = (nn.Parameter(torch.full((8,), 0.02, dtype=torch.bfloat16)) for _ in range(2))
    exact = nn.Parameter(master.detach().float())
    optimizers = [
        MasterAdamW([master], lr=1e-6, weight_decay=0.0),
        *(torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0) for weight in (plain, exact)),
    ]
    for _ in range(300):
        quadratic([master, plain, exact])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, torch.full_like(plain, 0.02))  # what the copies are for
    assert torch.equal(master, exact.to(torch.bfloat16))
    assert not torch.equal(master, plain)


def test_its_state_goes_on_where_it_was():
    start = torch.linspace(-1, 1, 8).to(torch.bfloat16)
    straight, halted = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first, second = (MasterAdamW([weight], lr=1e-3) for weight in (straight, halted))
    for _ in range(3):
        quadratic([straight, halted])
        first.step()
        second.step()
    resumed = nn.Parameter(halted.detach().clone())
    third = MasterAdamW([resumed], lr=1e-3)
    third.load_state_dict(second.state_dict())
    for _ in range(3):
        quadratic([straight, resumed])
        first.step()
        third.step()
    assert torch.equal(resumed, straight)
    assert torch.equal(third.masters[0], first.masters[0])


def test_clearing_gradients_clears_those_of_the_model():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = adamw([weight], lr=1.0)
    quadratic([weight])
    optimizer.zero_grad()
    assert weight.grad is None


@pytest.mark.parametrize("dtype, kind", [(torch.float32, torch.optim.AdamW), (torch.bfloat16, MasterAdamW)])
def test_only_bfloat16_needs_copies(dtype, kind):
    assert type(adamw([nn.Parameter(torch.ones(2, dtype=dtype))], lr=1.0)) is kind


def test_a_bfloat16_model_learns_at_a_small_learning_rate(tmp_path):
    trainer = trainer_of(tmp_path, dtype=torch.bfloat16, learning_rate=1e-6, warmup_steps=0)
    before = [master.detach().clone() for master in trainer.optimizer.masters]
    trainer.train()
    moved = [(master - start).abs() for master, start in zip(trainer.optimizer.masters, before, strict=True)]
    share = sum(int((change > 0).sum()) for change in moved) / sum(change.numel() for change in moved)
    assert share > 0.5
    assert trainer.model.dtype == torch.bfloat16
