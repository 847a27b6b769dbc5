"""An AR and a diffusion checkpoint side by side on the same prompts: texts, times, tokens per forward pass.

python scripts/compare.py --ar outputs/ar --diffusion outputs/diffusion --prompts "The module" "A class" --steps 8
"""

from nanollada.scripts.decoding.comparison import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
