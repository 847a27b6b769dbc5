"""A page on which a diffusion model, and an AR model beside it, answer one prompt; every step can be looked at.

python scripts/demo.py --diffusion outputs/diffusion_sft --ar outputs/ar_sft   # then open http://127.0.0.1:7860
"""

from nanollada.scripts.decoding.demo_page import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
