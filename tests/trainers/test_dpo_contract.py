"""What DPO on ELBOs relies on in TRL: each seam by its name, so that a TRL that changes one fails here."""

import dataclasses
import inspect

import pytest
import torch
from peft import LoraConfig
from preference_cases import VOCABULARY, batch_of, build_model, build_trainer, make_pairs, nudged, words
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM
from nanollada.trainers import dpo
from nanollada.trainers.preferences import installing
from nanollada.trainers.preferences.installing import ScoreCalls, in_place_of_fused_head, install_score
from nanollada.trainers.preferences.settings import REFUSED

# Every field of TRL's `DPOConfig` that is its own, and what becomes of it for a diffusion model.
WORKING = """
model_init_kwargs trust_remote_code disable_dropout dataset_num_proc max_length truncation_mode pad_to_multiple_of
precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights label_smoothing beta discopop_tau
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token
""".split()


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_every_field_of_trl_is_known():
    own = {field.name for field in dataclasses.fields(DPOConfig)}
    inherited = {field.name for field in dataclasses.fields(inspect.getmro(DPOConfig)[2])}  # transformers' own
    assert own - inherited == set(WORKING) | (REFUSED.keys() - inherited)
    assert REFUSED.keys() <= own


def test_the_name_that_binds_a_forward():
    assert dpo_trainer.add_fused_lm_head is dpo_trainer.__dict__[installing.NAME]
    signature = inspect.signature(dpo_trainer.add_fused_lm_head)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert defaults.pop("model") is inspect.Parameter.empty
    assert defaults == {"temperature": 1.0, "cast_lm_head_to_fp32": False, "outputs": ("log_probs",)}
    source = inspect.getsource(dpo_trainer.DPOTrainer)
    assert source.count("add_fused_lm_head(") == 2  # policy and reference, both in __init__
    assert inspect.getsource(DPOTrainer.__init__).count("add_fused_lm_head(") == 2
    fields = [field.name for field in dataclasses.fields(FusedCausalLMOutput)]
    assert fields == "loss log_probs entropy log_sum_sq_probs mean_logits is_top1 label_mask aux_loss".split()


@pytest.mark.parametrize("kind", ["full", "adapter", "precomputed"])
def test_it_is_called_once_for_a_model(kind, tmp_path, monkeypatch):
    installed = []
    monkeypatch.setattr(dpo, "install_score", lambda model, *args, **kwargs: installed.append(model) or install_score(
        model, *args, **kwargs))  # fmt: skip
    model, given = build_model(), dpo_trainer.add_fused_lm_head
    settings = {
        "full": {},
        "adapter": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},
        "precomputed": {"precompute_ref_log_probs": True},
    }
    trainer = build_trainer(tmp_path, model, **settings[kind])
    assert installed == ([model, trainer.ref_model] if kind == "full" else [model])
    assert dpo_trainer.add_fused_lm_head is given
    assert inspect.signature(model.forward) == inspect.signature(type(model)(model.config).forward)


def test_a_trl_that_scores_in_another_way_is_refused():
    with pytest.raises(RuntimeError, match="DPOTrainer must call `add_fused_lm_head`, got no call"):
        with in_place_of_fused_head(lambda model: None):
            pass
    with pytest.raises(TypeError, match="unexpected keyword"):
        with in_place_of_fused_head(lambda model: None):
            dpo_trainer.add_fused_lm_head(build_model(), next_token=True)


def test_the_methods_that_are_overridden():
    assert parameters(DPOTrainer._prepare_dataset) == "self dataset processing_class args dataset_name".split()
    assert parameters(DPOTrainer._set_signature_columns_if_needed) == ["self"]
    assert parameters(DPOTrainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]
    assert parameters(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert parameters(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]
    assert parameters(DPOTrainer.prediction_step)[:4] == ["self", "model", "inputs", "prediction_loss_only"]
    ours = parameters(dpo.DiffusionDPOTrainer.__init__)
    assert ours == parameters(DPOTrainer.__init__)
    source = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "self._precompute_model_hash" in source and "self.compute_ref_log_probs(" in source
    assert DPOTrainer.loss_is_scaled_for_ga is False


def test_columns_and_collator():
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._signature_columns, trainer._is_vision_dataset = None, False
    trainer._set_signature_columns_if_needed()
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
    assert trainer._signature_columns == columns
    rows = [{"prompt_ids": [4], "chosen_ids": [n], "rejected_ids": [n + 10, n + 11]} for n in (5, 6)]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 0], [4, 6, 0], [4, 15, 16], [4, 16, 17]]  # all chosen, all rejected
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    assert "DataCollatorForPreference(\n                    pad_token_id=" in inspect.getsource(DPOTrainer.__init__)
    names = [field.name for field in dataclasses.fields(DataCollatorForPreference)]
    assert names == ["pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"]


def causal_trainer(folder, **settings):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = [NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **shape)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    return build_trainer(folder, models[0], trainer_class=dpo.CausalDPOTrainer, ref_model=models[1], **settings)


def test_an_ar_model_has_trl_s_own_trainer(tmp_path):
    """A class that makes rows, and nothing else; its score is the log-likelihood of next tokens."""
    own = {name for kind in dpo.CausalDPOTrainer.__mro__[:2] for name in vars(kind) if not name.startswith("__")}
    assert own == {"_prepare_dataset"} and dpo.CausalDPOTrainer.__mro__[2] is DPOTrainer
    trainer = causal_trainer(tmp_path, max_steps=2)
    trainer.train()
    first = trainer.state.log_history[0]
    assert float(first["loss"]) == pytest.approx(0.6931, abs=1e-4)
    # every number that TRL logs of a batch: what is new here must be checked for a diffusion model
    assert {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"} == set(dpo.NOT_OURS)
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    common = {"loss", "grad_norm", "learning_rate", "num_tokens", "logps/chosen", "logps/rejected", "epoch", "step"}
    assert set(first) == common | rewards | set(dpo.NOT_OURS)
    diffusion = build_trainer(tmp_path, max_steps=1)
    diffusion.train()
    assert set(diffusion.state.log_history[0]) == common | rewards | {"score/variance", "masked_token_accuracy"}


def test_the_policy_is_scored_before_the_reference(tmp_path):
    """Also with an adapter, whose reference is the same model: the order says which of them is meant."""
    reference = nudged(build_model(), 0.1)
    trainer = build_trainer(tmp_path, ref_model=reference)
    order = []
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        model.register_forward_hook(lambda *args, name=name: order.append((name, trainer._calls.of_reference)))
    trainer._compute_loss(trainer.model, batch_of(trainer), False)
    assert order == [("policy", True), ("reference", True)] and len(trainer._calls.scores) == 2
    assert ScoreCalls().of_reference is False and ScoreCalls(reference_only=True).of_reference is True


def test_other_calls_are_the_model_s_own(tmp_path):
    model = build_model()
    ids = torch.tensor([[4, 3, 3, 9, 3, 2]])
    before = model(ids, labels=ids.masked_fill(ids == 3, 5))
    trainer = build_trainer(tmp_path, model)
    after = trainer.model(ids, labels=ids.masked_fill(ids == 3, 5))
    assert torch.equal(before.logits, after.logits) and before.loss == after.loss
    assert trainer.model.generate(ids[:, :1], max_new_tokens=3, do_sample=False).shape == (1, 4)
    with pytest.raises(TypeError, match="index"):
        trainer.model(ids, index=ids[0])
    model._install_forward()
    assert "forward" not in vars(model) and torch.equal(model(ids).logits, before.logits)
    with pytest.raises(ValueError, match="the trainer scores next tokens"):  # the guard is as strict as before
        dpo_trainer.add_fused_lm_head(model)


def test_rows_come_through_with_their_keys(tmp_path):
    rows = [{**row, "index": 7 + number} for number, row in enumerate(make_pairs())]
    trainer = build_trainer(tmp_path, rows=rows, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["index"].tolist()) == list(range(14, 30))
    assert torch.equal(batch["index"][8:], batch["index"][:8] + 1)
    assert words().eos_token_id == 2  # the answers' end in these tests
