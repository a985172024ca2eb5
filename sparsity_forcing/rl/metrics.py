"""What a training step reports: numbers per step, per budget and per layer, and a table of samples."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsity_forcing.data.schema import Row
from sparsity_forcing.rl.facts import Credit, Facts
from sparsity_forcing.rl.rewards import Rewards


def step_metrics(step: int, facts: Facts, judged: Credit) -> dict:
    """Flat metrics of one step. Names follow TRL where it has one; ``p0.94/…`` are per budget, ``layer00/…`` per layer.

    ``p0.94/advantage`` is that of the group, before advantages are centred by budget: afterwards its mean is 0.
    """
    correct, rewards, total = facts.correct, judged.rewards, judged.rewards.total.flatten()
    metrics = {
        "step": step,
        "reward": rewards.total.mean(),
        "reward_std": rewards.total.std(dim=1).mean(),
        "reward_correct": correct.mean(),
        "reward_efficiency": rewards.efficiency.mean(),
        "accuracy": correct.mean(),
        "anyone_right": (rewards.correct > 0.5).any(1).float().mean(),
        "frac_reward_zero_std": (rewards.total.std(dim=1) < 1e-6).float().mean(),
        "token_ratio": facts.token_ratio.mean(),
        "visual_token_ratio": facts.visual_token_ratio.nanmean(),
        "completions/mean_length": facts.length.mean(),
        "completions/clipped_ratio": facts.truncated.mean(),
        "prompt_tokens": facts.prompt.double().sum(),
        "new_tokens": facts.length.sum(),
        "rollouts": len(facts.p),
        "entropy": -(facts.logps / facts.length.sum().clamp_min(1)),
    }
    for budget in torch.unique(facts.p):
        rows = facts.p == budget
        metrics[budget_metric(budget, "accuracy")] = correct[rows].mean()
        metrics[budget_metric(budget, "token_ratio")] = facts.token_ratio[rows].mean()
        metrics[budget_metric(budget, "visual_token_ratio")] = facts.visual_token_ratio[rows].nanmean()
        metrics[budget_metric(budget, "reward")] = total[rows].mean()
        metrics[budget_metric(budget, "advantage")] = judged.group_advantages.flatten()[rows].mean()
    for name, ratios in (("token_ratio", facts.layer_ratio), ("visual_token_ratio", facts.layer_visual_ratio)):
        for layer, ratio in enumerate(ratios.nanmean(-1)):
            metrics[f"layer{layer:02d}/{name}"] = ratio
    return {name: float(value) if isinstance(value, Tensor) else value for name, value in metrics.items()}


def budget_metric(budget: float | Tensor, name: str) -> str:
    """The name of a metric of the rollouts at this budget, which is a float32 there."""
    return f"p{float(torch.as_tensor(budget, dtype=torch.float32)):.6g}/{name}"


def throughput(metrics: dict, seconds_rollout: float, seconds: float, processes: int) -> dict[str, float]:
    """Tokens a second: sampled ones in the rollouts of all processes, and all those of prompts and answers in the whole
    step for each process (a device). A prompt's tokens count for each of its rollouts, though they share one pass."""
    every = metrics["prompt_tokens"] + metrics["new_tokens"]
    return {
        "new_tokens_per_second": metrics["new_tokens"] / seconds_rollout,
        "tokens_per_second_per_device": every / seconds / processes,
    }


def peak_memory_gib(device: torch.device) -> float:
    """The most memory so far: what torch had allocated on an accelerator, what was resident of a process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


def replay_metrics(differences: Tensor) -> dict[str, float]:
    """Size of the |rollout − replay| differences of log-probabilities, (tokens,); about 0 where the replay is right."""
    if differences.numel() == 0:
        return {}
    return {
        "replay_max_difference": float(differences.max()),
        "replay_mean_difference": float(differences.mean()),
        **{
            f"replay_q{name}_difference": float(differences.kthvalue(max(1, round(share * differences.numel()))).values)
            for name, share in (("99", 0.99), ("999", 0.999))
        },
    }


def sample_table(
    rows: Sequence[Row], texts: Sequence[str], facts: Facts, rewards: Rewards, advantages: Tensor
) -> list[dict]:
    """One record per rollout of the first two queries: what was asked, answered, kept and earned."""
    group = rewards.correct.shape[1]
    table = []
    for query, row in enumerate(rows[:2]):
        for place in range(group):
            index = query * group + place
            table.append(
                {
                    "id": row.id,
                    "task": row.label,
                    "question": row.question,
                    "answer": row.answer,
                    "completion": texts[index],
                    "p": round(float(facts.p[index]), 4),
                    "token_ratio": float(facts.token_ratio[index]),
                    "visual_token_ratio": float(facts.visual_token_ratio[index]),
                    "reward_correct": float(rewards.correct[query, place]),
                    "reward_efficiency": float(rewards.efficiency[query, place]),
                    "advantage": float(advantages[query, place]),
                    "image": row.images[0] if row.images else None,
                }
            )
    return table
