"""Objectives, data and trainers of nanollada."""
