"""Objectives, data and trainers of nanollada."""

import sys
from pathlib import Path

# `accelerate launch trainers/causal.py` puts this folder first on the path, where `import data` would find ours.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
