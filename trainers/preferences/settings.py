"""Fields of TRL's `DPOConfig` that mean nothing, or something else, where a score is an ELBO."""

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
