"""Preference pairs of a model's own right and wrong answers to problems with a verifier.

python scripts/puzzles.py --puzzle sudoku --rows 2000 --format prompts --output runs/prompts.jsonl
python scripts/pairs.py --checkpoint outputs/diffusion_sft --data runs/prompts.jsonl --samples 8 --temperature 1 \\
    --output runs/pairs.jsonl
accelerate launch trainers/dpo.py --model_name_or_path outputs/diffusion_sft --data runs/pairs.jsonl \\
    --output_dir outputs/diffusion_dpo
"""

from nanollada.scripts.sampling.pairs import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
