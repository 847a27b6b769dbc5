"""What of TRL's `DPOTrainer` means nothing, or something else, where a score is an ELBO."""

import dataclasses

from trl import DPOConfig

from nanollada.trainers.arguments import default_of

_PER_TOKEN = "it reads the parts of a score as probabilities of tokens, and those of an ELBO are none"
_RATIO = "its function of the ratio of probabilities is not one of bounds"
_UNSHARED = "policy and reference would not see the same"
# The reason. The only value is TRL's default.
REFUSED = {
    "ld_alpha": _PER_TOKEN,
    "use_weighting": _PER_TOKEN,
    "f_divergence_type": _RATIO,
    "f_alpha_divergence_coef": _RATIO,
    "padding_free": "TRL does nothing for it",
    "activation_offloading": "TRL's hooks look for one forward a step (`gradient_checkpointing` saves memory)",
    "use_liger_kernel": "there is no kernel for this model",
    "liger_kernel_config": "there is no kernel for this model",
    "router_aux_loss_coef": "the model has no experts",
    "neftune_noise_alpha": _UNSHARED,
    "label_smoothing_factor": "the loss is `loss_type`'s (`label_smoothing` is for its robust ones)",
    "parallelism_config": "processes share the rows of a step, and not a row",
    "include_for_metrics": "a score has no logits",
    "batch_eval_metrics": "a score has no logits",
}


def check_settings(args: DPOConfig) -> None:
    """
    Checks that a diffusion model's score can do what the settings ask for.

    Raises:
        `ValueError`: naming a field that has another value than TRL's default.
    """
    defaults = {field.name: default_of(field) for field in dataclasses.fields(DPOConfig)}
    for name, reason in REFUSED.items():
        if (value := getattr(args, name)) != defaults[name]:
            raise ValueError(f"`{name}` must be {defaults[name]!r} for a diffusion model: {reason}, got {value!r}")


def check_models(model, ref_model, peft_config) -> None:
    """
    Raises:
        `ValueError`: unless both denoise, in the same blocks and with the same vocabulary; and for an adapter that
            puts tokens before the row.
    """
    for name, one in (("model", model), ("ref_model", ref_model)):
        if one is not None and getattr(one, "is_diffusion", None) is not True:
            raise ValueError(f"`{name}` must be a NanoLLaDAForMaskedLM, got a {type(one).__name__}")
    for name in () if ref_model is None else ("block_length", "vocab_size", "label_shift"):
        own, other = getattr(model.config, name), getattr(ref_model.config, name)
        if own != other:
            raise ValueError(f"`ref_model` must have the policy's `{name}`, got {other} and {own}")
    configs = [peft_config] if peft_config is not None else list(getattr(model, "peft_config", {}).values())
    for config in configs:
        if config.is_prompt_learning:
            raise ValueError(f"`peft_config` must adapt weights, got {config.peft_type.value}, which adds tokens")


def check_whole(trainer) -> None:
    """
    Raises:
        `ValueError`: for a model in shards: its ranks must call it equally often, and the parts of a score hang on
            the rows of each.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(f"A score needs whole models on every rank (DDP does that), got {kind}")
