"""The trainers there are. A new one is a program with a `TRAINER`, and its name here."""

from nanollada.trainers import causal, diffusion, dpo, grpo
from nanollada.trainers.run import RunEntry

TRAINERS: dict[str, RunEntry] = {member.TRAINER.name: member.TRAINER for member in (causal, diffusion, dpo, grpo)}
