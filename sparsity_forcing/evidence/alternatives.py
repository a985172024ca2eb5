"""What the RL stage is compared with: other objectives, in the loop of `Trainer`, with its data and its validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.data.schema import Row
from sparsity_forcing.generation.forward import run_prefix, run_rest, token_logps
from sparsity_forcing.models.prompts import answer_tokens
from sparsity_forcing.params import TrainParams
from sparsity_forcing.rl.errors import TrainingError
from sparsity_forcing.rl.sharding import is_sharded
from sparsity_forcing.rl.trainer import Trainer

Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]
SOFTNESS = 0.5  # of the relaxed ratio, in units of log attention
DPO_BETA = 0.1


class ObservedContext(SparseContext):
    """Keeps the log of every layer's attention shares, with gradient: ``log_shares[layer]`` (batch, prompt)."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.log_shares: dict[int, Tensor] = {}

    def mass(self, layer: int, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        found = super().mass(layer, query, key, first, scale)
        self.log_shares[layer] = self.log_share(found)
        return found.detach()  # the selection has no gradient


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
    ``penalty`` of the layers. Without a penalty: fine-tuning under the rule itself. No rollouts, no reference.

    A step is one pass over its rows, whatever train.micro_batch_prompts, logits_chunk and gradient_checkpointing say.
    """

    def __init__(self, *args: object, penalty: Penalty | None = None, weight: float = 0.0) -> None:
        super().__init__(*args)
        require_one_pass(self.config, self.accelerator)
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
        right = ((logits.argmax(-1) == answers) | ~mask).all(-1)  # what a greedy answer needs
        metrics = {"cross_entropy": float(loss.detach()), "accuracy": float(right.float().mean())}
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
    of the others, so that most pairs of a good model are one answer at two budgets; groups without a right answer make
    no pair. The reference is the dense one of `Trainer`; a step is one pass, as of `Supervised`."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        require_one_pass(self.config, self.accelerator)
        if not self.config.beta:
            raise TrainingError("DPO needs the dense reference: set train.beta above 0, got 0")

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
            "accuracy": float(facts.correct.mean()),
            "rollouts": float(facts.correct.numel()),
            "prompt_tokens": float(facts.prompt.sum()),
            "new_tokens": float(facts.length.sum()),
            "visual_token_ratio": float(part.rollouts.visual_token_ratio.mean()),
        }
        metrics["grad_norm"] = self.updater.take_step(self.step + 1)
        return metrics | {"seconds": time.perf_counter() - began}, list


def require_one_pass(config: TrainParams, accelerator: Accelerator) -> None:
    """Raises TrainingError where the parameters ask for more than one pass a step, or where the weights are sharded."""
    if is_sharded(accelerator):
        raise TrainingError("an alternative trains whole weights; start it without a configuration that shards")
    if config.num_iterations != 1 or config.rollout_prompts is not None:
        raise TrainingError(
            "an alternative takes one pass a step: set train.num_iterations to 1 and leave train.rollout_prompts out, "
            f"got {config.num_iterations} and {config.rollout_prompts}"
        )


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
