"""Options of GRPO with a diffusion policy that are refused, and why."""

import pytest
import torch
from rollout_cases import evenness, policy, prompts, trainer_of
from transformers import AutoModelForCausalLM

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM
from nanollada.trainers.grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer
from nanollada.trainers.rollouts.generating import left_padded, seed_of
from nanollada.trainers.rollouts.options import REFUSED
from nanollada.trainers.rollouts.policy import replaced

REFUSALS = [
    ({"top_k": 5}, "`top_k` must be 0: tokens would be drawn from another distribution than the one that is scored"),
    ({"top_p": 0.9}, "`top_p` must be 1.0: tokens would be drawn from another distribution"),
    ({"min_p": 0.1}, "`min_p` must be None: tokens would be drawn from another distribution"),
    ({"repetition_penalty": 1.2}, "`repetition_penalty` must be 1.0: tokens would be drawn from another distribution"),
    ({"temperature": 0.0}, "`temperature` must be above 0 for rollouts, which are drawn, got 0.0"),
    ({"use_vllm": True}, "`use_vllm` must be False: rollouts are written by the diffusion `generate`, got True"),
    ({"vllm_mode": "server"}, "`vllm_mode` must be .*: it goes with vLLM, which writes left to right, got 'server'"),
    ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching` must be False"),
    ({"cast_lm_head_to_fp32": True}, "`cast_lm_head_to_fp32` must be False: scores are float32 in any case"),
    ({"max_tool_calling_iterations": 2}, "`max_tool_calling_iterations` must be None: .* calls no tools, got 2"),
    ({"model_init_kwargs": {"dtype": "float32"}}, "`model_init_kwargs` must be None: the model is loaded before"),
    ({"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef` must be None: there are no experts"),
    ({"disable_dropout": False}, "`disable_dropout` must be True: dropout would make the ratio of a policy to itself"),
    ({"estimator": "elbo", "beta": 0.1}, "`beta` must be 0.0: under the estimator 'elbo' the KL penalty is an estim"),
    ({"estimator": "mean_field", "beta": 0.1}, "`beta` must be 0.0: under the estimator 'mean_field' the KL penalty"),
    ({"estimator": "elbo", "entropy_coef": 0.1}, "`entropy_coef` must be 0.0: under the estimator 'elbo' the entrop"),
    ({"estimator": "elbo", "top_entropy_quantile": 0.2}, "`top_entropy_quantile` must be 1.0: under the estimator"),
    ({"estimator": "elbo", "use_adaptive_entropy": True}, "`use_adaptive_entropy` must be False: under the estimator"),
    (
        {"estimator": "elbo", "importance_sampling_level": "token"},
        "`importance_sampling_level` must be 'sequence': the estimator 'elbo' scores rows, not tokens, got 'token'",
    ),
    ({"loss_type": "luspo"}, "`importance_sampling_level` must be 'sequence': the loss 'luspo' is that of sequences"),
    (
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        "`importance_sampling_level` must be 'token': the loss 'vespo' makes sequence weights of token ratios",
    ),
    ({"generation_kwargs": {"top_k": 5}}, "`top_k` leaves tokens out of a draw"),
    ({"generation_kwargs": {"position_score": "sampled_prob"}}, "`position_score` must not be 'sampled_prob'"),
    ({"generation_kwargs": {"remdm": "cap", "steps": 4}}, "`remdm` takes decisions back"),
    ({"generation_kwargs": {"num_return_sequences": 2}}, "`generation_kwargs` must leave `num_return_sequences` to"),
    ({"generation_kwargs": {"block_lenght": 2}}, "`block_lenght` is no setting of the diffusion `generate` .did you"),
    ({"ref_model": "policy"}, "`ref_model` needs `beta`, got a NanoLLaDAForMaskedLM and `beta` 0.0"),
]


@pytest.mark.parametrize("settings, message", REFUSALS, ids=lambda value: str(value)[:50])
def test_refused_by_name(tmp_path, char_tokenizer, settings, message):
    if "ref_model" in settings:
        settings = {"ref_model": policy(char_tokenizer)}
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, char_tokenizer, **settings)


def test_the_default_of_every_refused_option_is_let_through(tmp_path, char_tokenizer):
    assert trainer_of(tmp_path, char_tokenizer).estimator.exact and len(REFUSED) > 20


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory", "quantization_config"])
def test_arguments_of_trls_trainer_that_are_refused(tmp_path, char_tokenizer, name):
    args = DiffusionGRPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=f"`{name}` must be None"):
        DiffusionGRPOTrainer(policy(char_tokenizer), evenness, args, prompts(), **{name: [len]})


def test_an_ar_model_is_refused_by_the_diffusion_trainer(tmp_path, char_tokenizer):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=len(char_tokenizer), **shape))
    with pytest.raises(ValueError, match="`model` must be a NanoLLaDAForMaskedLM, got a NanoLLaDAForCausalLM"):
        trainer_of(tmp_path, char_tokenizer, model)


def test_images_are_refused(tmp_path, char_tokenizer):
    trainer = trainer_of(tmp_path, char_tokenizer)
    with pytest.raises(ValueError, match="`train_dataset` must hold texts"):
        trainer._generate_single_turn([[4, 5]], [["image"]], {}, 4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"estimator": "elba"}, "`estimator` must be one of replay, elbo, mean_field, got 'elba'"),
        ({"score_steps": 0}, "`score_steps` must be >= 1, got 0"),
        ({"num_iterations": 0}, "`num_iterations` must be >= 1, got 0"),
        ({"max_completion_length": 0}, "`max_completion_length` must be >= 1, got 0"),
        ({"beta": -1.0}, "`beta` must be >= 0, got -1.0"),
        ({"epsilon": -1.0}, "`epsilon` must be >= 0, got -1.0"),
        ({"epsilon_high": -0.1}, "`epsilon_high` must be >= 0, got -0.1"),
        ({"loss_type": "gpo"}, "`loss_type` must be one of grpo, dr_grpo, dapo, .*, got 'gpo'"),
        ({"scale_rewards": "batches"}, "`scale_rewards` must be one of none, group, batch, .*, got 'batches'"),
    ],
)
def test_values_that_a_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionGRPOConfig(str(tmp_path), use_cpu=True, **settings)


def test_a_new_option_of_trls_is_an_error(tmp_path, char_tokenizer, monkeypatch):
    monkeypatch.setattr("nanollada.trainers.rollouts.options.WORKING", frozenset({"beta"}))
    with pytest.raises(ValueError, match="is new in this TRL and not known to do anything here"):
        trainer_of(tmp_path, char_tokenizer)


def test_a_policy_is_loaded_from_its_folder(tmp_path, char_tokenizer):
    model = policy(char_tokenizer).float()
    model.save_pretrained(tmp_path / "policy")
    trainer = trainer_of(tmp_path / "run", char_tokenizer, str(tmp_path / "policy"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
    assert isinstance(trainer.model, type(AutoModelForCausalLM.from_pretrained(tmp_path / "policy")))


def test_prompts_are_padded_on_the_left():
    ids, mask = left_padded([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = left_padded([[5, 6, 7], [8]], 0, 4)
    assert ids.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]] and mask.sum() == 4


def test_each_generation_has_a_seed_of_its_own():
    keys = [
        (seed, step, purpose, rank) for seed in (0, 1) for step in range(20) for purpose in (0, 1) for rank in (1, 2)
    ]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [seed_of(*key) for key in keys]


def test_a_name_that_a_module_does_not_have_is_not_replaced():
    with pytest.raises(AttributeError, match="no_such_name"), replaced(torch, no_such_name=None):
        pass
