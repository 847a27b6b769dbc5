"""Answers that a model is let write in numbers, and what is made of them."""
