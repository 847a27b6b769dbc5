"""Everything that programs print is ours and known: no warning of a library that we caused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import SHAPE, command_line, corpus

ROOT = Path(__file__).parents[3]
BLOCK = r"(Training|Done|Next|  [a-z].*|)"
STEP = r"step +\d+/\d+  .*"
TOKENIZER = (r"bpe tokenizer with \d+ entries: .*", r"Next: .*accelerate launch .*")
KNOWN = {
    "tokenizer": TOKENIZER,
    "training": (BLOCK, STEP),
    "resumed": (BLOCK, STEP),
    "diffusion": (BLOCK, STEP),
    "generate": (r".*",),  # the text is a model's
    "evaluate": (r"[ ┏┓┗┛┳┻┡┩╇└┘┴━─│┃].*", r"results: .*"),
}


class Programs:
    """Runs programs as a user does, in a folder of their own; not in a terminal."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.environment |= {"COLUMNS": "100", "PYTHONWARNINGS": "default"}

    def __call__(self, known, program, *words, **options):
        """Checks standard output and error of a program line by line; returns the former."""
        command = [sys.executable, str(ROOT / program), *words, *command_line(options)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder, timeout=300
        )
        assert done.returncode == 0, done.stderr
        odd = [line for line in done.stdout.splitlines() if not any(re.fullmatch(form, line) for form in KNOWN[known])]
        errors = [line for line in re.split(r"[\r\n]", done.stderr) if not EXPECTED.match(line)]
        assert (odd, errors) == ([], []), program
        return done.stdout


EXPECTED = re.compile(r"\s*$|Scoring .*rows|\[\d+ tokens in .*\]$")  # of standard error: bars, and what a text took


@pytest.mark.slow
def test_programs_print_known_lines_alone(tmp_path):
    """Of a tied model, data workers, the best model, a resumption, AR → diffusion, a text, a score."""
    run, data = Programs(tmp_path), corpus(tmp_path / "data.jsonl", 200)
    run("tokenizer", "scripts/train_tokenizer.py", data=data, vocab_size=280, output_dir="tokenizer")
    job = {
        "data": data,
        "held_out_fraction": 0.1,
        "max_length": 32,
        "max_steps": 4,
        "logging_steps": 2,
        "eval_steps": 2,
    }
    job |= {"eval_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    job |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 1}
    fresh = {**SHAPE, "tie_word_embeddings": True, "tokenizer_name_or_path": "tokenizer"}
    run("training", "trainers/causal.py", output_dir="ar", **job, **fresh)
    again = {**job, **fresh, "resume_from_checkpoint": "ar/checkpoint-2", "output_dir": "again"}
    run("resumed", "trainers/causal.py", **again)
    run("diffusion", "trainers/diffusion.py", **job, model_name_or_path="ar", output_dir="diffusion")
    for folder in ("ar", "diffusion"):
        run("generate", "scripts/generate.py", checkpoint=folder, prompt="the cat", max_new_tokens=8)
        run("evaluate", "scripts/evaluate.py", checkpoint=folder, data=data, max_length=32, samples=2)
    assert json.loads((tmp_path / "again" / "run.json").read_text())["steps"] == 4
