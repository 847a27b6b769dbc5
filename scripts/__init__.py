"""Programs a person runs, and the rooms with what they do."""

import sys
from pathlib import Path

# `python scripts/evaluate.py` puts this folder first on the path, where `import evaluate` would find the program.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
