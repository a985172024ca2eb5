from sparsity_kernels.kept_attention.eager import kept_attention

__all__ = ["kept_attention"]
