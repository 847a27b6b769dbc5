"""Scores a checkpoint: bits per byte on any data, and exact match of generated answers on prompt/answer rows.

python scripts/evaluate.py --checkpoint outputs/diffusion --data held_out.jsonl
python scripts/evaluate.py --checkpoint outputs/diffusion_sft --data test.jsonl --metrics likelihood exact_match
python scripts/evaluate.py --checkpoint outputs/block32 --data books.jsonl --rolling_context 256 --eval_block_length 16

Results are kept in the checkpoint's `evaluation.json`, which the model card reads. With `--suite` a whole protocol of
tasks runs (`--suite x --help` says what it may hold):

python scripts/evaluate.py --suite scripts/suites/quickstart.yaml --suite_data runs/quickstart/corpus --checkpoints …
"""

from nanollada.scripts.evaluation.checkpoint import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
