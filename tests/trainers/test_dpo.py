"""The preference trainer of diffusion models: what its score, its noise and its loss must be."""

import dataclasses
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig
from preference_cases import EOS, batch_of, build_model, build_trainer, likelihood_batch, make_pairs, nudged, words
from trl import DPOConfig, DPOTrainer

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM
from nanollada.trainers.dpo import DIFFUSION_ONLY, DiffusionDPOConfig, DiffusionDPOTrainer, check_causal, objective
from nanollada.trainers.preferences.masks import EVALUATION
from nanollada.trainers.scoring.likelihood import exact_nelbo

LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop"
LOSSES = [*LOSSES.split(), "sft", "sigmoid_norm"]
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_step(folder, batch, accumulation, **settings):
    """The gradient of the first optimizer step over all eight pairs, by name, and its loss."""
    own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    reference = nudged(build_model(), 0.1)
    trainer = build_trainer(folder, ref_model=reference, **own, **settings)
    gradients = {}

    def keep(optimizer, *args, **kwargs):
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return gradients, losses_of(trainer)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block_length", [None, 4])
def test_policy_and_reference_alike_have_the_loss_ln_2_without_noise(dtype, block_length, tmp_path):
    model = build_model(block_length=block_length).to(dtype)
    trainer = build_trainer(tmp_path, model, max_steps=1)
    for key in ({"seed": 1, "step": 0}, {"seed": 2, "step": 9}):
        trainer.noise_key = lambda train, key=key: key
        loss = trainer._compute_loss(trainer.model, batch_of(trainer), False)
        assert loss.item() == pytest.approx(math.log(2), rel=1e-7)
        ratios = trainer._calls.scores[0].draws - trainer._calls.scores[1].draws
        assert ratios.shape == (8, 16) and not ratios.any()
    assert trainer._metrics["train"]["score/variance"] == [0, 0] == trainer._metrics["train"]["rewards/margins"]
    trainer.train()
    assert losses_of(trainer) == pytest.approx([math.log(2)], abs=1e-4)  # logs are rounded


def test_bfloat16_changes_neither_that_nor_the_type_of_a_score(tmp_path):
    trainer = build_trainer(tmp_path, build_model().float(), bf16=True, max_steps=2, learning_rate=1e-2)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0 == trainer.state.log_history[0]["score/variance"]
    assert trainer.state.log_history[1]["rewards/margins"] != 0
    assert trainer._calls.scores[0].log_probs.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
def test_accumulation_does_not_change_the_gradient(tmp_path):
    whole, loss = one_step(tmp_path, 8, 1)
    split, split_loss = one_step(tmp_path, 2, 4)
    assert split_loss == pytest.approx(loss, rel=1e-6) and abs(loss - math.log(2)) > 0.01
    assert len(whole) > 20
    for name, gradient in whole.items():
        assert torch.allclose(gradient, split[name], rtol=1e-6, atol=1e-9), name
    checkpointed, _ = one_step(tmp_path, 8, 1, activation_checkpointing=True)
    assert all(torch.allclose(whole[name], checkpointed[name], rtol=1e-8, atol=1e-10) for name in whole)


def test_chosen_and_rejected_exchanged_is_the_opposite_score(tmp_path):
    trainer = build_trainer(tmp_path, ref_model=nudged(build_model(), 0.1))
    batch = batch_of(trainer)
    loss = trainer._compute_loss(trainer.model, batch, False)
    other = trainer._compute_loss(trainer.model, {name: x.roll(8, 0) for name, x in batch.items()}, False)
    one, exchanged = trainer._metrics["train"]["rewards/margins"]
    assert exchanged == pytest.approx(-one, rel=1e-6) and one != 0
    assert (other - loss).item() == pytest.approx(one, rel=1e-6)  # −log σ(−s) + log σ(s) = s


def test_scores_of_the_log_are_elbos(tmp_path):
    """Over many masks, the logged log-probabilities of both models are those of enumeration."""
    model, reference = build_model(), nudged(build_model(), 0.1)
    rows = make_pairs(2, longest=4)
    trainer = build_trainer(tmp_path, model, rows, ref_model=reference, num_masks=2000)
    trainer._compute_loss(trainer.model, batch_of(trainer, rows), False)
    policy, other = (score.draws.view(2000, 2, 2).mean(0) for score in trainer._calls.scores)  # [side, pair]
    exact = [-exact_nelbo(one, likelihood_batch(rows)).view(2, 2).T for one in (model, reference)]
    assert torch.allclose(policy, exact[0], rtol=0.05) and torch.allclose(other, exact[1], rtol=0.05)
    ratios = exact[0] - exact[1]
    assert (policy - other - ratios).abs().max() < 0.1 * ratios.abs().max()
    metrics = trainer._metrics["train"]
    assert metrics["logps/chosen"][0] == pytest.approx(policy[0].mean().item(), rel=1e-6)
    assert metrics["rewards/rejected"][0] == pytest.approx(0.1 * (policy - other)[1].mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_of_trl_trains(loss_type, tmp_path):
    settings = {"loss_type": [loss_type], "label_smoothing": 0.1} if loss_type in ("robust", "exo_pair") else {}
    trainer = build_trainer(tmp_path, ref_model=nudged(build_model(), 0.1), **{"loss_type": [loss_type], **settings})
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), False)
    loss.backward()
    norm = sum(parameter.grad.square().sum() for parameter in trainer.model.parameters()).sqrt()
    assert torch.isfinite(loss) and torch.isfinite(norm) and norm > 0
    policy, reference = (score.draws.mean(0) for score in trainer._calls.scores)
    chosen, rejected = (policy - reference).chunk(2)
    tokens = torch.tensor([[len(row[name]) for row in make_pairs()] for name in ("chosen_ids", "rejected_ids")])
    expected = {
        "sigmoid": -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean(),
        "sigmoid_norm": -torch.nn.functional.logsigmoid(0.1 * (chosen / tokens[0] - rejected / tokens[1])).mean(),
        "ipo": (chosen / tokens[0] - rejected / tokens[1] - 5).square().mean(),
        "sft": -policy[:8].sum() / tokens[0].sum(),
    }
    if loss_type in expected:
        assert loss.item() == pytest.approx(expected[loss_type].item(), rel=1e-6)


def test_losses_add_up(tmp_path):
    together = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]}
    loss = {}
    for name, settings in {"both": together, "sigmoid": {}, "sft": {"loss_type": ["sft"]}}.items():
        trainer = build_trainer(tmp_path, ref_model=nudged(build_model(), 0.1), **settings)
        loss[name] = trainer._compute_loss(trainer.model, batch_of(trainer), False).item()
    assert loss["both"] == pytest.approx(loss["sigmoid"] + 0.05 * loss["sft"], rel=1e-6)


@pytest.mark.parametrize(("estimator", "low", "high"), [("naive", 0.8, 1.25), ("elbo", 0.8, 3.0)])
def test_the_logged_variance_is_that_of_the_score(estimator, low, high, tmp_path):
    trainer = build_trainer(tmp_path, ref_model=nudged(build_model(), 0.1), estimator=estimator, num_masks=4)
    batch, margins = batch_of(trainer), []
    with torch.no_grad():
        for step in range(100):
            trainer.state.global_step = step
            trainer._compute_loss(trainer.model, batch, False)
            chosen, rejected = (trainer._calls.scores[0].draws - trainer._calls.scores[1].draws).mean(0).chunk(2)
            margins.append(0.1 * (chosen - rejected))
    logged = trainer._metrics["train"]["score/variance"]
    assert low < sum(logged) / len(logged) / torch.stack(margins).var(0).mean().item() < high


def test_masks_change_with_the_step_and_never_in_evaluation(tmp_path):
    trainer = build_trainer(tmp_path, eval_dataset=make_pairs(5), learning_rate=0.0, max_steps=3, eval_seed=3)
    assert trainer.noise_key(False) == {"seed": 3, "step": EVALUATION}
    before = trainer.evaluate()["eval_logps/chosen"]
    trainer.train()
    assert trainer.evaluate()["eval_logps/chosen"] == before
    assert trainer.noise_key(True) == {"seed": 42, "step": 3}
    trainer.args.eval_seed = 4
    assert trainer.evaluate()["eval_logps/chosen"] != before
    assert trainer.predict(trainer.eval_dataset).predictions is None


def test_naive_masks_are_not_shared(tmp_path):
    trainer = build_trainer(tmp_path, estimator="naive")
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), False)
    assert abs(loss.item() - math.log(2)) > 1e-3
    assert trainer._metrics["train"]["score/variance"][0] > 0


def test_one_mask_has_no_variance_to_log(tmp_path):
    trainer = build_trainer(tmp_path, num_masks=1, max_steps=1)
    trainer.train()
    assert "score/variance" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["rewards/margins"] == 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # the model was adapted before
def test_an_adapter_starts_at_its_reference_and_is_reloaded_to_the_last_bit(tmp_path):
    model = build_model().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    trainer = build_trainer(tmp_path, model, peft_config=LORA, max_steps=4, learning_rate=1e-2)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-4) and losses_of(trainer)[3] < 0.69
    assert trainer.state.log_history[0]["score/variance"] == 0 and trainer.ref_model is None
    base = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(base[name.replace("_proj.", "_proj.base_layer.") if name not in base else name], tensor)
               for name, tensor in before.items())  # fmt: skip
    trainer.save_model(tmp_path / "adapter")
    fresh = type(model).from_pretrained(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.tensor([[4, 3, 3, 9, 3, 2]])
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, trainer.model.eval()(ids).logits)
        assert not torch.equal(reloaded(ids).logits, fresh.get_input_embeddings()(ids).sum())
    again = build_trainer(tmp_path, PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True))
    loss = again._compute_loss(again.model, batch_of(again), False)  # the reference is the adapter as it came
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6) and "ref" in again.model.peft_config


def test_the_reference_stays_and_follows_only_when_asked(tmp_path):
    policy = build_model()
    trainer = build_trainer(tmp_path, policy, max_steps=2, learning_rate=1e-2)
    start = [parameter.clone() for parameter in policy.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.ref_model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    follow = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer = build_trainer(tmp_path, build_model(), max_steps=2, learning_rate=1e-2, **follow)
    trainer.train()
    pairs = zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_answers_end_as_sft_taught(tmp_path):
    rows = [{"prompt_ids": [4, 5, 6], "chosen_ids": [7, 8, EOS], "rejected_ids": [9] * 6 + [EOS]}]
    model = build_model(block_length=4)
    widths = {"none": (6, 10), "block": (8, 12), "max_length": (11, 11), None: (8, 12)}
    for kind, expected in widths.items():
        trainer = build_trainer(tmp_path, model, rows, eos_padding=kind, max_length=11 if kind == "max_length" else 64)
        batch = batch_of(trainer, rows)
        assert tuple(batch["attention_mask"].sum(-1).tolist()) == expected, kind
        assert batch["completion_mask"].sum(-1).tolist() == [width - 3 for width in expected]
        assert (batch["input_ids"][0, 5 : expected[0]] == EOS).all()
    growing = build_model()
    growing.generation_config.grow_length, growing.generation_config.block_length = True, 5
    batch = batch_of(build_trainer(tmp_path, growing, rows), rows)
    assert batch["attention_mask"].sum(-1).tolist() == [10, 10]
    with pytest.raises(ValueError, match="`eos_padding` 'block' is for a model that decodes in blocks"):
        build_trainer(tmp_path, rows=rows, eos_padding="block")
    with pytest.raises(ValueError, match="`eos_padding` 'max_length' needs `max_length`, got None"):
        build_trainer(tmp_path, rows=rows, eos_padding="max_length", max_length=None)


REFUSED = [
    ({"ld_alpha": 0.5}, "`ld_alpha` must be None for a diffusion model: it reads the parts"),
    ({"use_weighting": True}, "`use_weighting` must be False"),
    ({"f_divergence_type": "forward_kl"}, "`f_divergence_type` must be 'reverse_kl'"),
    ({"f_alpha_divergence_coef": 0.7}, "`f_alpha_divergence_coef` must be 0.5"),
    ({"padding_free": True}, "`padding_free` must be False"),
    ({"activation_offloading": True}, "`activation_offloading` must be False"),
    ({"use_liger_kernel": True}, "`use_liger_kernel` must be False"),
    ({"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef` must be None"),
    ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` must be None"),
    ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0.0"),
    ({"estimator": "exact"}, "`estimator` must be one of elbo, naive, got 'exact'"),
    ({"num_masks": 0}, "`num_masks` must be >= 1, got 0"),
    ({"beta": -0.1}, "`beta` must be >= 0, got -0.1"),
    ({"eos_padding": "row"}, "`eos_padding` must be one of none, block, max_length, got 'row'"),
    ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "must adapt weights"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_an_elbo_cannot_do_is_refused_by_name(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, **settings)


def test_models_must_denoise_in_the_same_blocks(tmp_path):
    causal = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1)).double()
    with pytest.raises(ValueError, match="`model` must be a NanoLLaDAForMaskedLM, got a NanoLLaDAForCausalLM"):
        build_trainer(tmp_path, causal)
    with pytest.raises(ValueError, match="`ref_model` must be a NanoLLaDAForMaskedLM"):
        build_trainer(tmp_path, ref_model=causal)
    with pytest.raises(ValueError, match="`ref_model` must have the policy's `block_length`, got 4 and None"):
        build_trainer(tmp_path, ref_model=build_model(block_length=4))
    causal.save_pretrained(tmp_path / "causal")
    words().save_pretrained(tmp_path / "causal")
    args = DiffusionDPOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`model` must be a NanoLLaDAForMaskedLM, got a NanoLLaDAForC"):
        DiffusionDPOTrainer(str(tmp_path / "causal"), args=args, train_dataset=Dataset.from_list(make_pairs()))


def test_a_path_is_a_policy(tmp_path):
    build_model().float().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    args = DiffusionDPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = DiffusionDPOTrainer(str(tmp_path / "model"), args=args, train_dataset=Dataset.from_list(make_pairs()))
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), False)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_texts_become_rows_and_run_json_says_how_they_end(tmp_path):
    rows = [{"prompt": "w4 w5", "chosen": f"w{n} w7", "rejected": f"w{n} w8 w9"} for n in range(10, 18)]
    trainer = build_trainer(tmp_path, build_model(block_length=4), rows, max_steps=1)
    assert trainer.train_dataset[0] == {"prompt_ids": [4, 5], "chosen_ids": [10, 7, 2], "rejected_ids": [10, 8, 9, 2],
                                        "index": 0}  # fmt: skip
    trainer.train()
    said = objective(trainer)
    assert said["name"] == "DPO on ELBOs" and said["loss_type"] == ["sigmoid"]
    assert (said["eos_padding"], said["block_length"], said["num_masks"]) == ("block", 4, 8)


@pytest.mark.parametrize(("kind", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_a_model_in_shards_is_refused(kind, name, tmp_path, monkeypatch):
    own = DPOTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        DPOTrainer, "create_accelerator_and_postprocess", lambda self: (own(self), setattr(self, kind, True))
    )
    with pytest.raises(ValueError, match=f"A score needs whole models on every rank .*, got {name}"):
        build_trainer(tmp_path)


def test_fields_of_the_score_are_refused_for_an_ar_model():
    own = {field.name for field in dataclasses.fields(DiffusionDPOConfig)}
    assert own - {field.name for field in dataclasses.fields(DPOConfig)} == set(DIFFUSION_ONLY)
    check_causal(DiffusionDPOConfig(use_cpu=True, ld_alpha=0.5, f_divergence_type="forward_kl"))  # TRL's own
    for change in ({"estimator": "naive"}, {"num_masks": 4}, {"eos_padding": "none"}, {"eval_seed": 1}):
        with pytest.raises(ValueError, match=f"`{[*change][0]}` must be left out for an AR checkpoint"):
            check_causal(DiffusionDPOConfig(use_cpu=True, **change))


def test_a_missing_key_is_named(tmp_path):
    trainer = build_trainer(tmp_path)
    with pytest.raises(ValueError, match="`index` must be a column of the rows"):
        trainer.data_collator(make_pairs())
    batch = batch_of(trainer)
    batch.pop("index")
    with pytest.raises(ValueError, match="`index` must be a column of the batch"):
        trainer._compute_loss(trainer.model, batch, False)
    batch = batch_of(trainer) | {"position_ids": batch["input_ids"]}
    with pytest.raises(ValueError, match="`inputs` must hold what a score reads, got position_ids"):
        trainer._compute_loss(trainer.model, batch, False)
    with pytest.raises(ValueError, match="`return_outputs` must be False"):
        trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)


def test_trl_on_its_own_is_still_refused(tmp_path):
    """Its scores are of next tokens; the guard of the model says so."""
    args = DiffusionDPOConfig(str(tmp_path), use_cpu=True)
    rows = Dataset.from_list([{"prompt": "w4", "chosen": "w5", "rejected": "w6"}])
    with pytest.raises(ValueError, match="the trainer scores next tokens"):
        DPOTrainer(build_model(), nudged(build_model(), 0.1), args, train_dataset=rows, processing_class=words())
