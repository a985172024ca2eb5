"""What an answer costs, as a share of what it costs with dense attention: what the efficiency reward is paid for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CostModel:
    """``kind``: see `params.RewardParams`. ``weights``: what a decode step reads of weights for one answer, counted in
    cache entries (keys and values of one token in all layers); 0 unless the kind is ``latency``."""

    kind: str = "token_ratio"
    weights: float = 0.0

    def relative(self, token_ratio: Tensor, prompt: Tensor, new: Tensor) -> Tensor:
        """Cost of every answer in 0-1, shape (rows,).

        Decoding is bound by the bytes it reads, so a step's time is taken as the weights, shared by the answers that
        are decoded together, and the answer's own cache at its last token.

        Args:
            token_ratio: (rows,) share of the prompt that is kept. prompt, new: (rows,) tokens of prompt and answer.
        """
        if self.kind == "token_ratio":
            return token_ratio
        return (self.weights + token_ratio * prompt + new) / (self.weights + prompt + new)


TOKEN_RATIO = CostModel()


def cost_model(model, kind: str, batch: int) -> CostModel:
    """The cost model of ``model`` with ``batch`` answers decoded together."""
    if kind != "latency":
        return CostModel(kind)
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    decoder = sum(weight.numel() for weight in model.model.language_model.parameters())
    decoder += model.lm_head.weight.numel() - model.get_input_embeddings().weight.numel()  # one row of these is read
    return CostModel(kind, decoder / entry / batch)
