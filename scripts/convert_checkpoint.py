"""Brings foreign checkpoints to nanollada, and autoregressive nanollada checkpoints to Qwen3, Llama or Qwen2.

python scripts/convert_checkpoint.py --source models/Qwen3-0.6B --to masked --output runs/qwen3
python scripts/convert_checkpoint.py --source runs/ar --to qwen3 --output runs/ar_qwen3
python scripts/convert_checkpoint.py --source diffusion.pt --to masked --tokenizer Nano-LLaDA --output runs/seed

Nothing is guessed, dropped or rounded: what is not understood is refused by name. `conversion.json` in the output says
where it came from, and has what the way back needs.
"""

from nanollada.scripts.conversion.to_ours import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
