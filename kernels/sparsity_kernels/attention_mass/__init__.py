from sparsity_kernels.attention_mass.eager import attention_mass

__all__ = ["attention_mass"]
