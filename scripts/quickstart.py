"""The whole of nanollada in minutes on two CPU cores: text → AR and diffusion → numbers you can trust → Hub folders.

    python scripts/quickstart.py                     # documentation and sudokus, made from this Python
    python scripts/quickstart.py --data my.jsonl     # the same on your rows
    python scripts/quickstart.py --size 32m          # the same with the full-size model (hours on a CPU)

A run that was killed goes on where it stopped when the same command is given again. One whose figures are far outside
what the recipe's recorded runs gave says so and ends with exit status 3: it is complete, but not to be built on, also
by a script that looks at the status alone.
"""

from nanollada.scripts.first_run.stages import main
from nanollada.trainers.commands.ending import run_program

if __name__ == "__main__":
    run_program(main)
