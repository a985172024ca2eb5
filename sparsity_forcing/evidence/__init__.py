"""The experiments behind the claim that training makes attention sparser: arms, controls, gradients, their table."""
