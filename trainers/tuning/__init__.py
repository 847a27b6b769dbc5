"""A whole run of TRL's trainers: what `trainers/dpo.py` and `trainers/grpo.py` share."""
