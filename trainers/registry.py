"""The trainers there are. A new one is a program with a `TRAINER`, and its name here."""

from nanollada.trainers import causal, diffusion
from nanollada.trainers.run import TrainerEntry

TRAINERS: dict[str, TrainerEntry] = {member.TRAINER.name: member.TRAINER for member in (causal, diffusion)}
