"""Answers drawn in numbers, and rows to learn from that are made of them."""
