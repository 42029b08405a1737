"""Train small models on narrow jobs by Supervised Reinforcement Learning, then RL with Verifiable Rewards."""

__version__ = "0.1.0"
