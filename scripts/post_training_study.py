"""Evidence on post-training: ELBOs under shared masks against naive ones for DPO, replay against ELBO for GRPO.

    python scripts/post_training_study.py --part preferences --data pairs.jsonl --eval_data held_out.jsonl \\
        --diffusion runs/diffusion_sft --ar runs/ar_sft --seeds 1 2 3 --learning_rate 5e-5
    python scripts/post_training_study.py --part problems --puzzle sudoku --unlike sft.jsonl \\
        --diffusion runs/early_sft --steps 300 --seeds 1 2 3 --learning_rate 2e-5 --output runs/rl

Part preferences: DPO, judged on held-out pairs. Part problems: GRPO, judged on problems of the puzzle's test side.
Each run is a process of its own and is not done again; every other option goes to the trainer. The output gets
`<part>.json` and `.md`.
"""

from nanollada.scripts.studies.post_training import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
