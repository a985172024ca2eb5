"""Operations of sparse attention. One folder each; its eager reference defines it. Knows nothing of transformers.

| operation | what it does |
|---|---|
| `attention_mass` | column sums of causal attention over scoring rows, mean over heads, with a backward |
| `top_p` | budgets and masses to counts, counts and ranks to kept sets |
| `compaction` | the kept keys and values of a layer, in a ragged cache that grows in place |
| `ragged_attention` | decode attention over the ragged cache |
| `kept_attention` | prefill and training attention over listed keys, forward and backward |

Each takes ``impl="auto" | "eager" | "triton"`` (`backend`).
"""

from sparsity_kernels.attention_mass import attention_mass
from sparsity_kernels.backend import BackendError, Impl, device_of
from sparsity_kernels.compaction import CapacityError, RaggedCache, compact
from sparsity_kernels.kept_attention import causal_attention, kept_attention
from sparsity_kernels.ragged_attention import ragged_attention
from sparsity_kernels.top_p import keep_highest, top_p_count

__all__ = [
    "BackendError",
    "CapacityError",
    "Impl",
    "RaggedCache",
    "attention_mass",
    "causal_attention",
    "compact",
    "device_of",
    "keep_highest",
    "kept_attention",
    "ragged_attention",
    "top_p_count",
]
