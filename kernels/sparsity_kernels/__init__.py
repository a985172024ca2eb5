"""Operations of sparse attention. One folder each; its eager reference defines it. Knows nothing of transformers.

| operation | what it does |
|---|---|
| `attention_mass` | column sums of causal attention over scoring rows, mean over heads |
| `top_p` | budget and masses to counts, counts and ranks to kept sets |
| `compaction` | gathers the kept keys and values of a layer |
| `kept_attention` | attention of few queries among visible keys, grouped-query, forward and backward |
"""

from sparsity_kernels.attention_mass import attention_mass
from sparsity_kernels.compaction import gather_kept
from sparsity_kernels.kept_attention import kept_attention
from sparsity_kernels.top_p import keep_highest, top_p_count

__all__ = ["attention_mass", "gather_kept", "keep_highest", "kept_attention", "top_p_count"]
