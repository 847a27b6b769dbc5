"""`--use_peft`: a run that trains an adapter, goes on bit for bit, and ends in a folder that loads."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from training_cases import KINDS, SHAPE, command_line, fresh_model_and_rows, run, weights

from nanollada.hub_upload.evaluation_file import config_digest, weights_digest
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.checkpoint import load_checkpoint
from nanollada.scripts.decoding.writing import generate
from nanollada.scripts.evaluation.checkpoint import evaluate_checkpoint
from nanollada.trainers.models import ModelArguments, config_for
from nanollada.trainers.run import main
from nanollada.trainers.weights import adapters

QUIET = {"use_cpu": True, "report_to": "none", "plot_loss": False, "disable_tqdm": True}
CLASSES = {"causal": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}


def saved(folder, kind, tokenizer, **config):
    torch.manual_seed(1)
    model = CLASSES[kind](config_for(tokenizer, **{**SHAPE, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def job(tmp_path, tokenizer):
    rows = fresh_model_and_rows(tmp_path, tokenizer)
    rows = {name: value for name, value in rows.items() if name not in (*SHAPE, "tokenizer_name_or_path")}
    steps = {"max_steps": 6, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-2}
    return {**rows, **steps, **QUIET, "per_device_train_batch_size": 4, "use_peft": True, "lora_r": 4}


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["causal", pytest.param("diffusion", marks=pytest.mark.slow)])
def test_a_run_ends_in_a_folder_that_loads(kind, job, tmp_path, tokenizer):
    """The base stays as it was; interrupted at a checkpoint, the run ends in the same adapter."""
    base = saved(tmp_path / "base", kind, tokenizer)
    before = {name: value.clone() for name, value in weights(base).items()}
    facts = run(kind, {**job, "model_name_or_path": base}, output_dir=tmp_path / "run")
    assert facts["adapter"] == {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]},
        **{"lora_alpha": 32, "lora_dropout": 0.05, "trained_parameters": 2 * 2 * 4 * (16 + 16)},
    }
    assert set(facts["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert facts["init"] == str(base) and not (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert all(torch.equal(before[name], value) for name, value in weights(base).items())

    for name in ("run.json", "trainer_state.json", "adapter_model.safetensors"):  # as if killed behind step 3
        (tmp_path / "run" / name).rename(tmp_path / name)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = run(kind, {**job, "model_name_or_path": base}, output_dir=tmp_path / "run", resume_from_checkpoint="last")
    assert again["evaluation"] == facts["evaluation"] and again["sha256"] == facts["sha256"]
    finished = run(
        kind, {**job, "model_name_or_path": base}, output_dir=tmp_path / "run", resume_from_checkpoint="last"
    )
    assert finished["sha256"] == facts["sha256"]

    model, own = load_checkpoint(str(tmp_path / "run"), device="cpu")
    ids = torch.tensor([own("the cat")["input_ids"]])
    plain = CLASSES[kind].from_pretrained(base).eval()
    others = [AutoPeftModelForCausalLM, PeftModel]
    others = [others[0].from_pretrained(tmp_path / "run"), others[1].from_pretrained(plain, tmp_path / "run")]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert all(torch.equal(other.eval()(input_ids=ids).logits, logits) for other in others)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, logits)
    assert model.is_diffusion is (kind == "diffusion") and generate(model, own, ids[0].tolist(), max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"ema_decay": 0.5}, {"merge_top_k": 2}])
def test_averages_are_of_the_adapter(settings, job, tmp_path, tokenizer):
    """They hold no weight of the model, and what is saved is what was evaluated."""
    job |= {"model_name_or_path": saved(tmp_path / "base", "causal", tokenizer), "lora_dropout": 0.0}
    run("causal", job, output_dir=tmp_path / "plain")
    facts = run("causal", {**job, **settings}, output_dir=tmp_path / "run")
    found, last = adapter(tmp_path / "run"), adapter(tmp_path / "plain")
    assert found.keys() == last.keys() and not all(torch.equal(found[name], last[name]) for name in found)
    kept = next((tmp_path / "run").rglob("ema.safetensors" if "ema_decay" in settings else "step-3.safetensors"))
    assert len(load_file(kept)) == len(found) and all("lora_" in name for name in load_file(kept))
    if "merge_top_k" in settings:
        states = [adapter(tmp_path / "run" / f"checkpoint-{step}") for step in (3, 6)]
        for name in found:
            torch.testing.assert_close(found[name], (states[0][name] + states[1][name]) / 2)
    assert facts["evaluation"]["nats"] > 0


REFUSED = [
    (
        "diffusion",
        {"block_length": 4},
        {},
        "`block_length` must be the checkpoint's with an adapter, .* got 4 and None",
    ),
    ("diffusion", {"label_shift": "true"}, {}, "`label_shift` must be the checkpoint's with an adapter"),
    ("causal", {"lora_r": 4, "use_peft": "false"}, {}, "`lora_r` is for `use_peft`, got 4 without"),
    (
        "causal",
        {"load_in_4bit": "true"},
        {},
        "`load_in_4bit` must be False: a quantised model is none of ours, got True",
    ),
    (
        "causal",
        {"dtype": "bfloat16"},
        {},
        "`dtype` must be 'float32': weights are trained in float32 .*, got 'bfloat16'",
    ),
    ("causal", {"lora_task_type": "SEQ_CLS"}, {}, "`lora_task_type` must be 'CAUSAL_LM': both models write"),
]


@pytest.mark.parametrize(("kind", "settings", "config", "message"), REFUSED)
def test_what_an_adapter_cannot_carry_is_refused(kind, settings, config, message, job, tmp_path, tokenizer):
    job |= {"model_name_or_path": saved(tmp_path / "base", kind, tokenizer, **config), **settings}
    with pytest.raises(ValueError, match=message):
        main(KINDS[kind], command_line(job, output_dir=tmp_path / "run"))


def test_an_adapter_needs_a_checkpoint_of_its_own_kind(job, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`use_peft` needs `model_name_or_path`, got True without"):
        ModelArguments(tokenizer_name_or_path="x", use_peft=True)
    job |= {"model_name_or_path": saved(tmp_path / "ar", "causal", tokenizer)}
    with pytest.raises(ValueError, match="must hold a NanoLLaDAForMaskedLM, got NanoLLaDAForCausalLM"):
        run("diffusion", job, output_dir=tmp_path / "run")
    run("causal", {**job, "max_steps": 1, "eval_strategy": "no"}, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="must be a model, got .*run, which holds an adapter .*--adapter .*run"):
        run("causal", {**job, "model_name_or_path": tmp_path / "run"}, output_dir=tmp_path / "other")
    shutil.rmtree(tmp_path / "ar")
    with pytest.raises(
        ValueError, match="`checkpoint` must be an adapter whose model is there, got .*run, which adapts"
    ):
        load_checkpoint(str(tmp_path / "run"))


def test_what_is_no_config_and_a_model_that_has_an_adapter(tokenizer):
    model = CLASSES["causal"](config_for(tokenizer, **SHAPE))
    with pytest.raises(ValueError, match="`peft_config` must be PEFT's, such as a LoraConfig, got dict"):
        adapters.adapted(model, {}, 1)
    settings = adapters.adapted(CLASSES["causal"](model.config), LoraConfig(r=2), 1).active_peft_config
    assert settings.task_type == "CAUSAL_LM"  # without one AutoPeftModelForCausalLM refuses the folder
    first, second = (adapters.adapted(CLASSES["causal"](model.config), LoraConfig(r=2), 1) for _ in range(2))
    names = [name for name, value in first.named_parameters() if value.requires_grad]
    assert names and all(torch.equal(first.get_parameter(name), second.get_parameter(name)) for name in names)
    with pytest.raises(ValueError, match="`peft_config` must be left out for a model that has an adapter"):
        adapters.adapted(first, LoraConfig(r=2), 1)


def test_an_adapters_folder_is_evaluated(tmp_path, tokenizer):
    model = CLASSES["causal"].from_pretrained(saved(tmp_path / "base", "causal", tokenizer))
    adapters.adapted(model, LoraConfig(r=2), 1).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat sat"}\n' * 2)
    facts = evaluate_checkpoint(str(tmp_path / "adapter"), [str(tmp_path / "rows.jsonl")], max_length=16)
    own, base = (facts["weights_sha256"], facts["config_sha256"]), facts["base"]
    assert facts["results"] and own == (weights_digest(tmp_path / "adapter"), config_digest(tmp_path / "adapter"))
    assert base["weights_sha256"] == weights_digest(tmp_path / "base") not in own
