"""Writes text with an AR or a diffusion checkpoint: continues a prompt, fills its gaps, or chats.

python scripts/generate.py --checkpoint outputs/diffusion --prompt "The module" --watch
python scripts/generate.py --checkpoint outputs/diffusion_sft   # chat; /reset, /quit
python scripts/generate.py --checkpoint outputs/diffusion --infill --prompt "The <|mask|> sat." --trace out.html
"""

from nanollada.scripts.decoding.prompting import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
