"""Sparsity Forcing: makes the attention of vision-language models sparser by reinforcement learning.

from sparsity_forcing import load, sparse_attention

model, processor = load("Qwen/Qwen2.5-VL-7B-Instruct")
with sparse_attention(model, p=0.975) as stats:
    output = model.generate(**inputs, max_new_tokens=64)
stats.token_ratio
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsity_forcing.attention.api import sparse_attention
    from sparsity_forcing.generation.api import sparse_generate
    from sparsity_forcing.models.load import load

__all__ = ["load", "sparse_attention", "sparse_generate"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers when they are first needed, so that `--help` and validation stay quick."""
    if name == "load":
        from sparsity_forcing.models.load import load

        return load
    if name == "sparse_attention":
        from sparsity_forcing.attention.api import sparse_attention

        return sparse_attention
    if name == "sparse_generate":
        from sparsity_forcing.generation.api import sparse_generate

        return sparse_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
