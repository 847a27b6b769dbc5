"""Trains a tokenizer: byte-level BPE, or one token per character.

python scripts/train_tokenizer.py --data corpus.jsonl --output_dir outputs/tokenizer
"""

from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.data.tokenizers import main

if __name__ == "__main__":
    run_program(main)
