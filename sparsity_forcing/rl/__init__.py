"""The RL stage: rollouts, rewards, advantages, losses, trainer, checkpoints."""
