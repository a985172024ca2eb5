"""What the RL stage is compared with: other objectives, in the loop of `Trainer`, with its data and its validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.data.schema import Row
from sparsity_forcing.generation.forward import run_prefix, run_rest, token_logps
from sparsity_forcing.models.prompts import answer_tokens
from sparsity_forcing.rl.trainer import Trainer

Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]
SOFTNESS = 0.5  # of the relaxed ratio, in units of log attention
DPO_BETA = 0.1


class ObservedContext(SparseContext):
    """Keeps the log of every layer's attention shares, with gradient: ``log_shares[layer]`` (batch, prompt)."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.log_shares: dict[int, Tensor] = {}

    def choose(self, layer: int, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        self.log_shares[layer] = self.log_share(self.mass(layer, query, key, first, scale))
        with torch.no_grad():
            return super().choose(layer, query, key, first, scale)


def entropy(log_share: Tensor, droppable: Tensor, kept: Tensor) -> Tensor:
    """(batch,) entropy of the attention over the droppable tokens, over that of an even one: in 0-1."""
    terms = (log_share.exp() * log_share).masked_fill(~droppable, 0.0)
    return -terms.sum(-1) / droppable.sum(-1).clamp_min(2).log()


def not_in_one(log_share: Tensor, droppable: Tensor, kept: Tensor) -> Tensor:
    """(batch,) one less the largest share (the L-infinity norm): in 0-1."""
    return 1 - log_share.masked_fill(~droppable, -torch.inf).amax(-1).exp()


def relaxed_ratio(log_share: Tensor, droppable: Tensor, kept: Tensor) -> Tensor:
    """(batch,) share of the droppable tokens that are kept, every token counted by a sigmoid of how far its log
    attention lies above that of the last kept token. The threshold itself has no gradient."""
    last = log_share.masked_fill(~(kept & droppable), torch.inf).amin(-1, keepdim=True).detach()
    soft = torch.sigmoid((log_share - last) / SOFTNESS).masked_fill(~droppable, 0.0)
    return soft.sum(-1) / droppable.sum(-1).clamp_min(1)


class Supervised(Trainer):
    """Cross-entropy of the rows' answers under sparse attention at the deployed budget, plus ``weight`` times the mean
    ``penalty`` of the layers. Without a penalty: fine-tuning of the rule itself. No rollouts, no reference."""

    def __init__(self, *args: object, penalty: Penalty | None = None, weight: float = 0.0) -> None:
        super().__init__(*args)
        self.penalty, self.weight = penalty, weight

    def learn(self, rows: Sequence[Row]) -> tuple[dict[str, float], Callable[[], list[dict]]]:
        began = time.perf_counter()
        self.model.train()
        answers, mask = answer_tokens(self.processor.tokenizer, [row.answer for row in rows])
        answers, mask = answers.to(self.model.device), mask.to(self.model.device)
        prompts = self.sampler.prompts(rows)
        p = torch.full((len(rows),), self.sparsity.p, device=self.model.device)
        context = ObservedContext(self.sparsity, prompts.layout, p)
        cache = run_prefix(self.model, prompts, 1)
        logits = run_rest(self.model, prompts, 1, cache, answers, mask, context, answers.shape[1] + 1)[:, :-1]
        loss = -token_logps(logits, answers, 1.0, self.sampler.suppressed)[mask].mean()
        metrics = {"cross_entropy": float(loss.detach())}
        if self.penalty is not None:
            penalties = [
                self.penalty(share, context.droppable, context.kept[layer]).mean()
                for layer, share in context.log_shares.items()
            ]
            penalty = torch.stack(penalties).mean()
            metrics["penalty"] = float(penalty.detach())
            loss = loss + self.weight * penalty
        metrics |= {"loss": float(loss.detach()), "rollouts": 0}
        loss.backward()
        metrics["grad_norm"] = self.updater.take_step(self.step + 1)
        return metrics | {"step": self.step + 1, "seconds": time.perf_counter() - began}, list


class Preferences(Trainer):
    """DPO (arXiv 2305.18290) on pairs of rollouts of one group: the right answer with the lowest token ratio over each
    of the others; groups without a right answer make no pair. The reference is the dense one of `Trainer`."""

    def learn(self, rows: Sequence[Row]) -> tuple[dict[str, float], Callable[[], list[dict]]]:
        began = time.perf_counter()
        (part,) = self._roll_out(rows)
        facts, _ = self._judge(rows, self.sampler.texts(part.rollouts), [part])
        group = (len(rows), self.config.num_generations)
        chosen, pairs = preferred(facts.correct.view(group), facts.token_ratio.view(group))
        reference = self._reference_logps(part)
        self.model.train()
        logps, _ = self.passes(part.prompts, part.rollouts, part.group)
        gain = (logps - reference).sum(-1).view(group)
        margin = DPO_BETA * (gain.gather(1, chosen[:, None]) - gain)
        loss = -logsigmoid(margin)[pairs].sum() / max(1, int(pairs.sum()))
        loss.backward()
        metrics = {
            "step": self.step + 1,
            "loss": float(loss.detach()),
            "pairs": float(pairs.sum()),
            "rollouts": float(facts.correct.numel()),
            "visual_token_ratio": float(part.rollouts.visual_token_ratio.mean()),
        }
        metrics["grad_norm"] = self.updater.take_step(self.step + 1)
        return metrics | {"seconds": time.perf_counter() - began}, list


def preferred(correct: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(queries,) rollout that is right with the lowest ratio; (queries, group) bool, those it is preferred to.

    Args:
        correct, ratio: (queries, group).
    """
    right = correct > 0.5
    chosen = ratio.masked_fill(~right, torch.inf).argmin(1)
    others = torch.ones_like(right).scatter(1, chosen[:, None], False)
    return chosen, others & right.any(1, keepdim=True)


OBJECTIVES: dict[str, Callable[..., Trainer]] = {
    "grpo": Trainer,
    "sft": Supervised,
    "entropy": partial(Supervised, penalty=entropy, weight=0.1),
    "largest_share": partial(Supervised, penalty=not_in_one, weight=0.1),
    "relaxed_ratio": partial(Supervised, penalty=relaxed_ratio, weight=0.1),
    "dpo": Preferences,
}
