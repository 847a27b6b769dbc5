"""Evidence on editing: quality against forward passes with and without edits, and plain training as the baseline.

    python scripts/editing_study.py --part sudoku --diffusion runs/sudoku --seeds 1 2 3 --steps 300 \\
        --per_device_train_batch_size 64 --learning_rate 1e-3 --max_length 48 --output runs/editing
    python scripts/editing_study.py --part text --diffusion runs/diffusion --ar runs/ar --data train.jsonl \\
        --eval_data held_out.jsonl --max_length 128 --output runs/editing_text

Every arm trains the same start for as many steps on the same rows in the same order; then all decoders write the same
held-out rows. Each run is a process of its own and is not done again; every other option goes to the trainer. The
output gets `<part>.json`, `.md` and `.png`.
"""

from nanollada.scripts.studies.editing.study import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
