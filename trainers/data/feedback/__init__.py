"""Rows for what follows SFT: pairs of a better and a worse answer, and prompts whose answers are rewarded."""
