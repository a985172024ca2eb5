"""Families of vision-language models: load, save, build from scratch, and turn rows into model inputs."""

from sparsity_forcing.torchvision_ops import declare_missing_ops

declare_missing_ops()
