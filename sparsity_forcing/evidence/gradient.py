"""How much of the gradient of a part of the reward is signal: its mean over many draws against its noise.

The prompts are fixed, so a draw's gradient is random only through what was sampled. Of gradients g_1 … g_n, independent
with mean m, the products g_i·g_j of different draws have expectation |m|², and g_i·g_i has |m|² plus the variance: both
are estimated without bias from the n x n matrix of products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import fingerprint
from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.evidence.experiment import MadeBy, measured_once
from sparsity_forcing.inputs import BASE, TRAIN, require_inputs
from sparsity_forcing.lineage import code_digest
from sparsity_forcing.models.families import freeze_vision
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params, ParamsError, TrainParams
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.identity import decisive
from sparsity_forcing.rl.loss import LossInputs, grpo_loss
from sparsity_forcing.rl.replay import Replay
from sparsity_forcing.rl.rewards import STD_EPSILON, group_advantages, joint_rewards
from sparsity_forcing.rl.rollout import Rollouts
from sparsity_forcing.rl.sampler import Sampler
from sparsity_forcing.scoring import score_function

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
    def z(self) -> float | None:
        """Signal in standard errors: below about 2 it is not told from none. None where nothing varies."""
        return self.signal / self.error if self.error else None


def signal_of(gradients: Tensor) -> Signal:
    """Of (draws, weights) gradients, at least 2 draws.

    Without a mean the products of the n (n - 1) / 2 pairs are uncorrelated, so that the variance of their average is
    their second moment over their number; it is taken of the gradients less their average.
    """
    draws = len(gradients)
    if draws < 2:
        raise ValueError(f"a signal needs at least 2 draws, got {draws}")
    gradients = gradients.double()
    products, centred = (values @ values.T for values in (gradients, gradients - gradients.mean(0)))
    pairs = tuple(torch.triu_indices(draws, draws, offset=1))
    signal, own = products[pairs].mean(), products.diagonal().mean()
    error = centred[pairs].square().mean().sqrt() / len(pairs[0]) ** 0.5
    return Signal(float(signal), float(error), float(own - signal), draws)


def measure(params: Params, root: Path, draws: int = 40) -> dict:
    """Signal and noise of the parts of the gradient at the base's weights, on the first prompts of the training split;
    metrics/evidence/gradient.json. The gradient is that of all weights but the vision tower's, whether or not the
    training would put adapters on some of them. ``parts`` has, by name:

    - ``theorem``: 1 - tau less its group's mean, through the token log-probabilities. Its expectation is 0 but for what
      dividing by the sampled answer's length (loss_type grpo, dapo) does.
    - ``correct_tokens``, ``efficiency_tokens``: the literal objective's advantage, (r - mean) / std with r taken apart,
      through the token log-probabilities. C and the std depend on the answers too.
    - ``correct_selection``, ``efficiency_selection``: the same of params.yaml, every layer with its own credit, through
      the density of the sampled selection, for a weight of 1.

    Raises:
        InputError: the pipeline has not made the base and the data yet.
        ParamsError: there is no stochastic selection in ``params``, or an advantage that is not taken apart here.
    """
    require_inputs(root, {BASE: "base", TRAIN: "prepare"})
    if reason := why_not(params):
        raise ParamsError(reason)
    return measured_once(
        "gradient", partial(made_by, draws=draws), params, root, partial(_signals, params, root, draws)
    )


def _signals(params: Params, root: Path, draws: int) -> dict:
    found = _gradients(ARMS["literal"].params(params), root, draws, "gradients (literal)")
    found |= _gradients(params, root, draws, "gradients (params.yaml)")
    signals = {name: signal_of(values) for name, values in found.items()}
    parts = {name: {**vars(signal), "z": signal.z} for name, signal in signals.items()}
    return {"draws": draws, "prompts": PROMPTS, "parts": parts}


def why_not(params: Params) -> str | None:
    """Why these parameters allow no such gradient; None if they do."""
    if not params.train.selection_policy.sigma:
        return "the gradient through the selection needs train.selection_policy.sigma above 0, got 0"
    config = params.train
    for name, value, *known in (
        ("scale_rewards", config.scale_rewards, "group"),
        ("selection_policy.credit", config.selection_policy.credit, "layer", "layer_by_share"),
        ("reward.efficiency", config.reward.efficiency, "token_ratio"),
        ("reward.shuffle", config.reward.shuffle, False),
    ):
        if value not in known:
            return f"the advantages are taken apart for train.{name} {' or '.join(map(str, known))} only, got {value}"
    return None


def made_by(params: Params, root: Path, draws: int = 40) -> MadeBy:
    """Names all that decides the result."""
    both = [decisive(one, root, 1) for one in (params, ARMS["literal"].params(params))]
    code = [*(one.pop("code") for one in both), code_digest(["evidence/gradient.py"])]
    return MadeBy(fingerprint([both, params.model.device, PROMPTS, draws]), fingerprint(code))


def _gradients(params: Params, root: Path, draws: int, title: str) -> dict[str, Tensor]:
    """Part of the objective -> (draws, weights) gradients."""
    config = params.train
    model, processor = load(root / BASE, params.model.dtype, params.model.device)
    freeze_vision(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rows = read_rows(root / TRAIN)[:PROMPTS]
    answers = [row.answer for row in rows for _ in range(config.num_generations)]
    sampler, score = Sampler(model, processor, config, params.sparsity), score_function(config.reward.correct)
    dtype = sampler.attention_dtype
    replay = Replay(model, params.sparsity, config.temperature, sampler.suppressed, attention_dtype=dtype)
    found: dict[str, list[Tensor]] = {}
    with decoder_attention(model), Progress(title, draws) as progress:
        for draw in range(draws):
            part = sampler.roll_out(rows, noise_seed=draw)
            scores = [score(text, answer) for text, answer in zip(sampler.texts(part.rollouts), answers, strict=True)]
            model.train()
            logps, selection_logps = replay(part.prompts, part.rollouts, part.group)
            for name, (tokens, selection) in _advantages(torch.tensor(scores), part.rollouts, config).items():
                objective = _surrogate(logps, selection_logps, part.rollouts, tokens, selection, config)
                gradient = torch.autograd.grad(objective, weights, retain_graph=True, allow_unused=True)
                flat = [torch.zeros_like(w) if g is None else g for g, w in zip(gradient, weights, strict=True)]
                found.setdefault(name, []).append(torch.cat([value.flatten() for value in flat]).cpu())
            progress.advance(draw + 1)
    return {name: torch.stack(values) for name, values in found.items()}


def _advantages(scores: Tensor, rollouts: Rollouts, config: TrainParams) -> dict[str, tuple[Tensor, Tensor]]:
    """Part -> advantages of the tokens (rows,) and of the selection (layers, rows), one of them 0."""
    shape = (-1, config.num_generations)
    correct, ratio = scores.view(shape), rollouts.token_ratio.cpu().view(shape)
    budgets = rollouts.p.cpu().view(shape) if config.center_by_budget else None
    layers = rollouts.layer_ratio.cpu()
    no_tokens, no_selection = torch.zeros_like(scores), torch.zeros_like(layers)

    def apart(of_layer: Tensor) -> Iterator[Tensor]:
        """The advantage of the joint reward as the sum of its parts': of correctness, of efficiency."""
        gated = config.reward.gate == "anyone_right"
        rewards = joint_rewards(correct, of_layer.view(shape), config.reward.weight_efficiency, gated)
        deviation = rewards.total.std(dim=1, keepdim=True) + STD_EPSILON
        for part in (rewards.correct, rewards.efficiency):
            yield group_advantages(part / deviation, "none", budgets).flatten()

    if config.selection_policy.sigma:
        by_layer = [tuple(apart(of_layer)) for of_layer in layers]
        by_share = config.selection_policy.credit == "layer_by_share"
        share = layers.mean(1, keepdim=True) / layers.mean() if by_share else 1.0
        return {
            "correct_selection": (no_tokens, share * torch.stack([part for part, _ in by_layer])),
            "efficiency_selection": (no_tokens, share * torch.stack([part for _, part in by_layer])),
        }
    of_correct, of_efficiency = apart(rollouts.token_ratio.cpu())
    plain = group_advantages(1 - ratio, "none").flatten()
    return {
        "theorem": (plain, no_selection),
        "correct_tokens": (of_correct, no_selection),
        "efficiency_tokens": (of_efficiency, no_selection),
    }


def _surrogate(
    logps: Tensor, selection_logps: Tensor, rollouts: Rollouts, tokens: Tensor, selection: Tensor, config: TrainParams
) -> Tensor:
    """The loss of these advantages without the KL term, the selection term with weight 1."""
    policy = config.selection_policy.model_copy(update={"weight": 1.0})
    inputs = LossInputs(
        logps,
        rollouts.logps,
        logps.detach(),
        rollouts.completion_mask,
        tokens.to(logps.device),
        selection_logps,
        rollouts.selection_logps,
        selection[: len(selection_logps)].to(logps.device),
    )
    return grpo_loss(inputs, config.model_copy(update={"beta": 0.0, "selection_policy": policy}))[0]
