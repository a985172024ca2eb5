"""Sparse attention inside transformers: attention and mask functions, the pruned cache, the context manager."""

from sparsity_forcing.torchvision_ops import declare_missing_ops

declare_missing_ops()
