"""How much of the gradient of a part of the reward is signal: its mean over many draws against its noise.

The prompts are fixed, so a draw's gradient is random only through what was sampled. Of gradients g_1 … g_n, independent
with mean m, the products g_i·g_j of different draws have expectation |m|², and g_i·g_i has |m|² plus the variance: both
are estimated without bias from the n x n matrix of products, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.files import write_json_atomic
from sparsity_forcing.models.families import vision_tower
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.loss import LossInputs, grpo_loss
from sparsity_forcing.rl.replay import Replay
from sparsity_forcing.rl.rewards import group_advantages, joint_rewards
from sparsity_forcing.rl.sampler import Sampler
from sparsity_forcing.scoring import score_function
from sparsity_forcing.stages.inputs import require_inputs
from sparsity_forcing.stages.train import BASE, TRAIN

RESULT = Path("metrics/evidence/gradient.json")
PROMPTS = 32  # the base answers most questions rightly every time: these tell nothing about correctness


@dataclass(frozen=True)
class Signal:
    """``signal``: |mean gradient|², may be negative where there is none; ``error``: the standard error it would have if
    there were none. ``noise``: variance of one draw's gradient, summed over the weights."""

    signal: float
    error: float
    noise: float
    draws: int

    @property
    def z(self) -> float:
        """Signal in standard errors: below about 2 it is not told from none."""
        return self.signal / self.error if self.error else 0.0


def signal_of(gradients: Tensor) -> Signal:
    """Of (draws, weights) gradients, at least 2 draws.

    The products of the n (n - 1) / 2 pairs are uncorrelated where the mean is 0, so that the variance of their mean is
    their second moment over their number.
    """
    draws = len(gradients)
    if draws < 2:
        raise ValueError(f"a signal needs at least 2 draws, got {draws}")
    products = gradients.double() @ gradients.double().T
    own = products.diagonal().mean()
    pairs = products[tuple(torch.triu_indices(draws, draws, offset=1))]
    signal, error = pairs.mean(), pairs.square().mean().sqrt() / len(pairs) ** 0.5
    return Signal(float(signal), float(error), float(own - signal), draws)


def measure(params: Params, root: Path, draws: int = 40) -> dict[str, dict]:
    """Signal and noise of three gradients at the base's weights, on the first prompts of the training split.

    ``correct_tokens``, ``efficiency_tokens``: the two parts of the paper's advantage, (r - mean) / std with r taken
    apart, through the token log-probabilities, as the literal objective has them. ``efficiency_selection``: the joint
    reward's advantage, centred by budget, through the density of the sampled selection, as the default has it.
    """
    require_inputs(root, {BASE: "base", TRAIN: "prepare"})
    found = {
        "literal": _gradients(ARMS["literal"].params(params), root, draws, "literal"),
        "default": _gradients(params, root, draws, "default"),
    }
    gradients = {
        "correct_tokens": found["literal"]["correct_tokens"],
        "efficiency_tokens": found["literal"]["efficiency_tokens"],
        "efficiency_selection": found["default"]["selection"],
    }
    result = {}
    for name, values in gradients.items():
        signal = signal_of(values)
        result[name] = {**vars(signal), "z": signal.z}
    write_json_atomic(root / RESULT, result)
    return result


def _gradients(params: Params, root: Path, draws: int, name: str) -> dict[str, Tensor]:
    """Part of the objective -> (draws, weights) gradients."""
    config, sigma = params.train, params.train.selection_policy.sigma
    model, processor = load(root / BASE, params.model.dtype, params.model.device)
    vision_tower(model).requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rows = read_rows(root / TRAIN)[:PROMPTS]
    sampler, score = Sampler(model, processor, config, params.sparsity), score_function(config.reward.correct)
    replay = Replay(
        model, params.sparsity, config.temperature, sampler.suppressed, sigma, attention_dtype=sampler.attention_dtype
    )
    found: dict[str, list[Tensor]] = {}
    with decoder_attention(model), Progress(f"gradients ({name})", draws) as progress:
        for draw in range(draws):
            part = sampler.roll_out(rows, noise_seed=draw)
            rollouts = part.rollouts
            texts = sampler.texts(rollouts)
            answers = [row.answer for row in rows for _ in range(config.num_generations)]
            scores = torch.tensor([score(text, answer) for text, answer in zip(texts, answers, strict=True)])
            shape = (-1, config.num_generations)
            gated = config.reward.gate == "anyone_right"
            ratios = rollouts.token_ratio.cpu().view(shape)
            rewards = joint_rewards(scores.view(shape), ratios, config.reward.weight_efficiency, gated)
            budgets = rollouts.p.cpu().view(shape)
            model.train()
            logps, selection_logps = replay(part.prompts, rollouts, part.group)
            for name, objective in _objectives(rewards, budgets, rollouts, logps, selection_logps, config).items():
                gradient = torch.autograd.grad(objective(), weights, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(w) if g is None else g for g, w in zip(gradient, weights, strict=True)]
                found.setdefault(name, []).append(torch.cat([value.flatten() for value in flat]).cpu())
            progress.advance(draw + 1)
    return {name: torch.stack(values) for name, values in found.items()}


def _objectives(rewards, budgets, rollouts, logps, selection_logps, config) -> dict[str, Callable[[], Tensor]]:
    """The parts of the loss at the weights that sampled, without the KL term."""
    plain = config.model_copy(update={"beta": 0.0})
    deviation = rewards.total.std(dim=1, keepdim=True) + 1e-4
    nothing = torch.zeros_like(rewards.total)

    def loss(token_advantages: Tensor, selection_advantages: Tensor) -> Tensor:
        device = logps.device
        layers = selection_advantages.flatten().to(device).expand(len(selection_logps), -1)
        inputs = LossInputs(
            logps,
            rollouts.logps,
            logps.detach(),
            rollouts.completion_mask,
            token_advantages.flatten().to(device),
            selection_logps,
            rollouts.selection_logps,
            layers,
        )
        return grpo_loss(inputs, plain)[0]

    def centred(values: Tensor) -> Tensor:
        return (values - values.mean(dim=1, keepdim=True)) / deviation

    if not len(selection_logps):
        return {
            "correct_tokens": lambda: loss(centred(rewards.correct), nothing),
            "efficiency_tokens": lambda: loss(centred(rewards.efficiency), nothing),
        }
    return {"selection": lambda: loss(nothing, group_advantages(rewards.total, config.scale_rewards, budgets))}
