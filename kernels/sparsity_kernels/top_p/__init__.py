from sparsity_kernels.top_p.eager import keep_highest, top_p_count

__all__ = ["keep_highest", "top_p_count"]
