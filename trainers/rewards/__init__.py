"""Rewards: what an answer is worth, as functions with TRL's signature."""
