"""The RL stage: rollouts, rewards, advantages, losses, trainer, checkpoints."""

from sparsity_forcing.torchvision_ops import declare_missing_ops

declare_missing_ops()
