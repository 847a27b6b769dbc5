"""Every option of TRL's GRPO: it works with a diffusion policy as TRL says, or is refused by name."""

import dataclasses

from transformers import TrainingArguments

from nanollada.modeling_nanollada.generation_config_nanollada import NanoLLaDAGenerationConfig
from nanollada.trainers.arguments import default_of
from nanollada.trainers.rollouts.decoding import check_replayable
from nanollada.trainers.rollouts.likelihoods import ESTIMATORS

DIFFUSION_ONLY = ("estimator", "score_steps")
# What TRL's `GRPOConfig` has beside transformers' fields and does here what TRL's help says.
WORKING = frozenset(
    """
    disable_dropout num_generations num_generations_eval max_completion_length shuffle_dataset pad_to_multiple_of
    ds3_gather_for_generation generation_batch_size steps_per_generation temperature generation_kwargs
    chat_template_kwargs cache_implementation beta num_iterations epsilon epsilon_high delta
    sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
    importance_sampling_level reward_weights multi_objective_aggregation scale_rewards loss_type
    mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta
    entropy_target off_policy_mask_threshold use_bias_correction_kl
    log_completions num_completions_to_print log_unique_prompts
    """.split()
)
_DRAWN = "rollouts are written by the diffusion `generate`"
_LAW = "tokens would be drawn from another distribution than the one that is scored"
_TEXT = "prompts are texts"
_LOADED = "the model is loaded before"
_BLOCKED = "it goes with vLLM, which writes left to right"
REFUSED = {
    **dict.fromkeys("top_p top_k min_p repetition_penalty".split(), _LAW),
    **dict.fromkeys("use_vllm use_transformers_continuous_batching use_transformers_paged".split(), _DRAWN),
    "transformers_continuous_batching_config": _DRAWN,
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), _LOADED),
    "router_aux_loss_coef": "there are no experts",
    "cast_lm_head_to_fp32": "scores are float32 in any case, and the head may be tied",
    "max_tool_calling_iterations": "a diffusion policy calls no tools",
    "log_multimodal": _TEXT,
    "log_completions_hub_repo": "publishing is hub_upload/, which checks what it sends",
    **dict.fromkeys(
        """
        vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url
        vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
        vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction
        vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
        vllm_importance_sampling_cap
        """.split(),
        _BLOCKED,
    ),
}
# What asks for the policy's own probabilities, which a bound's pieces or one all-masked pass are not.
_NEEDS_PROBABILITIES = {
    "beta": (0.0, "the KL penalty is an estimate of a divergence only with the decoder's own probabilities"),
    "top_entropy_quantile": (1.0, "the entropies would not be those that tokens are drawn with"),
    "entropy_coef": (0.0, "the entropies would not be those that tokens are drawn with"),
    "use_adaptive_entropy": (False, "the entropies would not be those that tokens are drawn with"),
}
# What a checkpoint's generation config says of the rows that it was trained on: rollouts are written in these.
TRAINED = ("block_length", "grow_length", "eos_policy")
# What TRL's trainer takes as an argument.
REFUSED_ARGUMENTS = {
    "tools": "a diffusion policy calls no tools",
    "environment_factory": "a diffusion policy calls no tools",
    "rollout_func": _DRAWN,
    "quantization_config": "a quantised model is none of ours",
}


def _refuse(args, name: str, expected, reason: str) -> None:
    if (value := getattr(args, name)) != expected:
        raise ValueError(f"`{name}` must be {expected!r}: {reason}, got {value!r}")


def check_autoregressive(args) -> None:
    """
    Checks the arguments of an AR policy, which TRL trains as it does any other.

    Raises:
        `ValueError`: naming an option that only a diffusion policy reads.
    """
    for name in DIFFUSION_ONLY:
        if (value := getattr(args, name)) is not None:
            raise ValueError(
                f"`{name}` is a diffusion policy's: it must not be given for an AR checkpoint, got {value!r}"
            )


def check_reference(args, reference, adapter) -> None:
    """
    Raises:
        `ValueError`: for a reference that nothing is compared with.
    """
    if reference is not None and (not args.beta or adapter):
        rule = (
            "must be left out with an adapter, without which the policy is the reference"
            if adapter
            else "needs `beta`"
        )
        raise ValueError(f"`ref_model` {rule}, got a {type(reference).__name__} and `beta` {args.beta}")


def check_diffusion(args) -> None:
    """
    Checks the arguments of a diffusion policy.

    Raises:
        `ValueError`: naming an option that can't mean here what TRL says, one that this nanollada doesn't know (a
            newer TRL has it), and values that contradict the estimator.
    """
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)} | {*DIFFUSION_ONLY, "reward_funcs"}
    for field in dataclasses.fields(args):
        if field.name in REFUSED:
            _refuse(args, field.name, default_of(field), REFUSED[field.name])
        elif field.name not in WORKING | theirs:
            raise ValueError(f"`{field.name}` is new in this TRL and not known to do anything here")
    if not args.temperature > 0:
        raise ValueError(f"`temperature` must be above 0 for rollouts, which are drawn, got {args.temperature}")
    _refuse(args, "disable_dropout", True, "dropout would make the ratio of a policy to itself differ from 1")
    _check_estimator(args)


def _check_estimator(args) -> None:
    name, estimator = args.estimator, ESTIMATORS[args.estimator]
    if not estimator.exact:
        for option, (expected, reason) in _NEEDS_PROBABILITIES.items():
            _refuse(args, option, expected, f"under the estimator {name!r} {reason}")
    if estimator.ratio == "sequence":
        _refuse(args, "importance_sampling_level", "sequence", f"the estimator {name!r} scores rows, not tokens")
    elif args.loss_type == "luspo":
        _refuse(args, "importance_sampling_level", "sequence", "the loss 'luspo' is that of sequences")
    if args.loss_type == "vespo" and estimator.ratio == "token":
        _refuse(args, "importance_sampling_level", "token", "the loss 'vespo' makes sequence weights of token ratios")


def rollout_settings(args, config, saved, eos_token_ids: list[int]) -> NanoLLaDAGenerationConfig:
    """
    How rollouts are decoded: as `args` say, in the rows that the model was trained for (`TRAINED`), and else as
    `generate` does by default: one token a step, drawn from all tokens.

    Args:
        args ([`~trainers.grpo.DiffusionGRPOConfig`]): Its `temperature`, `max_completion_length`,
            `cache_implementation` and `generation_kwargs`, which override these.
        config ([`NanoLLaDAConfig`]): Of the model.
        saved (`GenerationConfig`): The checkpoint's own.
        eos_token_ids (`list[int]`): What ends a completion.

    Raises:
        `ValueError`: for settings under which a rollout can't be scored, naming them.
    """
    given = {
        **{name: getattr(saved, name, None) for name in TRAINED},
        "max_new_tokens": args.max_completion_length,
        "do_sample": True,
        "temperature": args.temperature,
        "cache_implementation": args.cache_implementation,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_token_ids,
        "return_dict_in_generate": True,
    }
    chosen = args.generation_kwargs or {}
    for name in {"return_dict_in_generate", "num_return_sequences", "max_length"} & chosen.keys():
        raise ValueError(f"`generation_kwargs` must leave `{name}` to the trainer, got {chosen[name]!r}")
    settings = NanoLLaDAGenerationConfig(**{**given, **chosen})
    check_replayable(settings)
    return settings
