"""The model that is tuned and the one that it is compared with, by what their checkpoints hold."""

from dataclasses import dataclass, field, replace

from transformers import AutoModelForCausalLM, set_seed

from nanollada.modeling_nanollada import NanoLLaDAPreTrainedModel
from nanollada.trainers.models import DROPOUTS, ModelArguments, load_model_and_tokenizer


@dataclass
class PolicyArguments(ModelArguments):
    """
    The model that is trained further, and its reference.

    Raises:
        `ValueError`: without a checkpoint, for dropout, and as [`~trainers.models.ModelArguments`].
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to train further; what it holds (AR or diffusion) decides how."}
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint that the policy is compared with. Default: the policy's own, or with use_peft "
        "the policy without its adapter."},
    )  # fmt: skip

    lora_dropout: float = field(default=0.0, metadata={"help": "Must stay 0: a text must score the same each time."})

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` must be a checkpoint to train further, got None")
        super().__post_init__()
        for name in DROPOUTS:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` must be left out: the same text is scored more than once, and must score the same, got "
                    f"{getattr(self, name)}"
                )
        if self.lora_dropout:
            raise ValueError(
                "`lora_dropout` must be 0: the same text is scored more than once, and must score the same, got "
                f"{self.lora_dropout}"
            )


def load_policy(args: PolicyArguments, seed: int) -> tuple:
    """
    The model of a checkpoint, of the class that its config names, and its tokenizer.

    Raises:
        `ValueError`: for a checkpoint of none of our two heads, and as `load_model_and_tokenizer`.
    """
    set_seed(seed)
    model, tokenizer = load_model_and_tokenizer(AutoModelForCausalLM, args, seed)
    if not isinstance(model, NanoLLaDAPreTrainedModel) or type(model).__name__ not in (
        model.config.architectures or ()
    ):
        raise ValueError(
            "`model_name_or_path` must hold a NanoLLaDAForCausalLM or a NanoLLaDAForMaskedLM, got "
            f"{args.model_name_or_path} with {model.config.architectures}"
        )
    return model, tokenizer


def load_reference(args: PolicyArguments, policy, seed: int):
    """
    A second model, which stays as it is.

    Raises:
        `ValueError`: for a checkpoint of the other kind or with another vocabulary, and as `load_policy`.
    """
    path = args.ref_model_name_or_path or args.model_name_or_path
    revision = args.model_revision if path == args.model_name_or_path else "main"
    reference, _ = load_policy(replace(args, model_name_or_path=path, model_revision=revision), seed)
    if type(reference) is not type(policy) or reference.config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"`ref_model_name_or_path` must hold a {type(policy).__name__} of {policy.config.vocab_size} tokens, got "
            f"{path} with a {type(reference).__name__} of {reference.config.vocab_size}"
        )
    return reference.eval().requires_grad_(False)
