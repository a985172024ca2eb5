from sparsity_kernels.compaction.eager import gather_kept

__all__ = ["gather_kept"]
