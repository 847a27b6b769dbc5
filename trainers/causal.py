"""Trains the autoregressive model: `accelerate launch trainers/causal.py --config scripts/recipes/<recipe>.yaml`."""

from dataclasses import dataclass
from functools import partial

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM
from nanollada.trainers import run
from nanollada.trainers.base import NanoLLaDATrainer, NanoLLaDATrainingArguments
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.run import TrainerEntry
from nanollada.trainers.scoring.likelihood import model_inputs


@dataclass
class CausalConfig(NanoLLaDATrainingArguments):
    """Settings of AR pretraining and SFT (the rows decide which); nothing beside the shared ones."""


class CausalTrainer(NanoLLaDATrainer):
    """Next-token cross-entropy on the target tokens, over the step's number of targets."""

    config_class, model_class = CausalConfig, NanoLLaDAForCausalLM

    def micro_batch_loss(self, model, inputs, num_items_in_batch):
        labels = inputs["labels"]  # [B, L]; a target at position i + 1 is predicted at position i, by the model
        weights = (labels != -100).float()
        outputs = model(
            inputs["input_ids"],
            labels=labels,
            loss_weights=weights,
            num_items_in_batch=num_items_in_batch,
            use_cache=False,
            **model_inputs(inputs),
        )
        return outputs.loss, weights.sum()

    def objective(self) -> dict:
        """What `run.json` says of the objective."""
        return {"name": "next-token cross-entropy"}

    @staticmethod
    def data_settings(args) -> dict:
        """What the objective asks of `prepare_data`."""
        return {"eos_padding": "none"}

    @staticmethod
    def variable_length(args, format: str) -> float:
        """Share of rows cut to a random length."""
        return 0.0


TRAINER = TrainerEntry("ar", CausalTrainer, CausalConfig, NanoLLaDAForCausalLM, "Trains the autoregressive model.")

main = partial(run.main, TRAINER)

if __name__ == "__main__":
    run_program(main)
