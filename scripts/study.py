"""Evidence on your text: AR, masked and block diffusion with equal parameters, training tokens and tokenizer.

    python scripts/study.py --data train.jsonl --eval_data english.jsonl chinese.jsonl --part a --seeds 1 2 3
    python scripts/study.py --data train.jsonl --eval_data english.jsonl chinese.jsonl --part a b c --jobs 2
    python scripts/study.py --data train.jsonl --eval_data english.jsonl --part a --size 32m --tokens 30000000

Part a: objectives and block lengths, from scratch and from AR. Part b: exact-count against Bernoulli masks. Part c:
many epochs on a small part of the text. Part d: what an AR start may keep for a while. Each run is a process of its
own and is not done again; every other option goes to the trainers (`--learning_rate 1e-3`, `--bf16 false`). The
output gets `<part>.json`, `.md` and `.png`.
"""

from nanollada.scripts.studies.runs import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
