"""Answers through the pruned cache: prompts cut at the visual prefix, the shared passes, the decode loop."""

from sparsity_forcing.torchvision_ops import declare_missing_ops

declare_missing_ops()
