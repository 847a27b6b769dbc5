"""An adapter in its model's weights: what the merge computes, what lies beside it, and what can't be merged."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, TaskType
from safetensors.torch import load_file, save_file
from training_cases import SHAPE

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.checkpoint import load_checkpoint
from nanollada.scripts.merge_checkpoints import main
from nanollada.trainers.models import config_for
from nanollada.trainers.weights import adapters
from nanollada.trainers.weights.merging import merge_checkpoints

CLASSES = {"causal": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM}
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def saved(folder, kind, tokenizer, **config):
    torch.manual_seed(1)
    model = CLASSES[kind](config_for(tokenizer, **{**SHAPE, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(folder, base, kind, tokenizer=None, settings=None, **options):
    """A folder with an adapter that changes every module that it adapts; the model with it."""
    settings = settings or LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **options})
    model = adapters.adapted(CLASSES[kind].from_pretrained(base), settings, 1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model.eval()


def logits_of(model):
    ids = torch.arange(40).view(2, 20) % model.config.vocab_size
    with torch.no_grad():
        return model(input_ids=ids).logits


EMBEDDING = {"target_modules": [*PROJECTIONS, "embed_tokens"]}
CASES = [("causal", False, {}), ("causal", True, {"use_dora": True}), ("causal", True, EMBEDDING)]
CASES += [("diffusion", False, EMBEDDING), ("diffusion", True, {}), ("diffusion", True, {"use_rslora": True})]


@pytest.mark.parametrize(("kind", "tied", "options"), CASES)
def test_the_merge_computes_what_the_adapted_model_does(kind, tied, options, tmp_path, tokenizer):
    """Within rounding, whatever is adapted, while the adapted model comes back exactly; its base stays as it is."""
    shape = {"tie_word_embeddings": tied, "block_length": 4 if kind == "diffusion" and tied else None}
    base = saved(tmp_path / "base", kind, tokenizer, **shape)
    before = (base / "model.safetensors").read_bytes()
    model = adapted(tmp_path / "adapter", base, kind, tokenizer, **options)
    assert logits_of(load_checkpoint(str(tmp_path / "adapter"), device="cpu")[0]).equal(logits_of(model))
    main(["--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    merged, own = load_checkpoint(str(tmp_path / "merged"), device="cpu")
    assert type(merged) is CLASSES[kind] and own.get_vocab() == tokenizer.get_vocab()
    assert merged.config.block_length == shape["block_length"]
    assert merged.config.tie_word_embeddings is (tied and "embed_tokens" not in options.get("target_modules", ()))
    assert (logits_of(merged) - logits_of(model)).abs().max() <= 1e-6
    assert (logits_of(merged) - logits_of(CLASSES[kind].from_pretrained(base))).abs().max() > 1e-2
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"], "r": 2}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own(settings, tied, tmp_path, tokenizer):
    base = saved(tmp_path / "base", "diffusion", tokenizer, tie_word_embeddings=tied)
    model = adapted(tmp_path / "adapter", base, "diffusion", **settings)
    adapters.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = load_checkpoint(str(tmp_path / "merged"), device="cpu")[0]
    assert (logits_of(merged) - logits_of(model)).abs().max() <= 1e-6


def test_what_lies_beside_the_weights(tmp_path, tokenizer):
    """Settings, tokenizer and record are the adapter's; scores are not the merge's, and are left out."""
    base = saved(tmp_path / "base", "diffusion", tokenizer)
    model = adapted(tmp_path / "adapter", base, "diffusion", tokenizer)
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(tmp_path / "adapter")
    stage = {"init": str(base), "model_class": "NanoLLaDAForMaskedLM", "seed": 3, "adapter": adapters.describe(model)}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({**stage, "evaluation": {}, "sha256": {}}))
    main(["--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    run = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert {name: run[name] for name in stage} == stage and "evaluation" not in run and "sha256" not in run
    assert run["adapter"]["peft_type"] == "LORA" and run["adapter"]["r"] == 4
    merged, origin = load_checkpoint(str(tmp_path / "merged"), device="cpu")[0], run["merged"]
    assert merged.generation_config.max_new_tokens == 7 and run["parameters"] == merged.num_parameters()
    assert origin["adapter"] == str(tmp_path / "adapter") and origin["base_model"] == str(base)
    assert set(origin["sha256"]) == {"adapter_config.json", "adapter_model.safetensors"} and origin["command"]
    assert {"config.json", "modeling_nanollada.py"} <= {file.name for file in (tmp_path / "merged").iterdir()}
    assert not list(tmp_path.glob(".*partial*")) and not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_checkpoint_without_record_and_tokenizer(tmp_path, tokenizer):
    base = saved(tmp_path / "base", "causal", tokenizer)
    adapted(tmp_path / "adapter", base, "causal")
    adapters.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    run = json.loads((tmp_path / "merged" / "run.json").read_text())
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": sorted(PROJECTIONS)}
    assert run["init"] == str(base) and run["adapter"] == {**settings, "trained_parameters": 2 * 4 * (32 + 32 + 40)}
    assert load_checkpoint(str(tmp_path / "merged"), device="cpu")[1].get_vocab() == tokenizer.get_vocab()


def test_what_cannot_be_merged(tmp_path, tokenizer):
    base = saved(tmp_path / "base", "causal", tokenizer)
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM)
    adapted(tmp_path / "prompts", base, "causal", settings=prompts)
    with pytest.raises(ValueError, match="must be one that can be merged, got a PROMPT_TUNING adapter"):
        adapters.merge_adapter(tmp_path / "prompts", tmp_path / "merged")
    adapted(tmp_path / "adapter", base, "causal")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = next(iter(stored))
    broken = {
        r"missing: .*lora_A": {name: value for name, value in stored.items() if name != first},
        "unexpected: extra.weight": {**stored, "extra.weight": torch.ones(1)},
        "hold an adapter of .*base, got .*size mismatch": {**stored, first: torch.ones(1, 1)},
        "NaN": {**stored, first: torch.full_like(stored[first], torch.nan)},
    }
    for message, tensors in broken.items():
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"`adapter` must.*{message}"):
            adapters.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="`adapter` must be a folder with adapter_model.safetensors, got"):
        adapters.merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "prompts"]


def test_a_merge_that_computes_something_else_is_refused(tmp_path, tokenizer, monkeypatch):
    """As one of tied weights, which would give the embedding's change to the head, too."""
    base = saved(tmp_path / "base", "causal", tokenizer, tie_word_embeddings=True)
    adapted(tmp_path / "adapter", base, "causal", **EMBEDDING)
    monkeypatch.setattr(adapters, "_untie", lambda model: None)
    with pytest.raises(ValueError, match="must be one that can be merged, got logits that differ by"):
        adapters.merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_the_program_names_what_is_wrong(tmp_path, tokenizer):
    base = saved(tmp_path / "base", "causal", tokenizer)
    adapted(tmp_path / "adapter", base, "causal")
    paths, target = [str(tmp_path / "adapter"), str(base)], ["--output_dir", str(tmp_path / "merged")]
    wrong = {
        "`adapter` must be one folder, got 2: .* don't add up": ["--adapter", *paths],
        "`checkpoints` or `adapter` must be given, got both": ["--adapter", paths[0], "--checkpoints", *paths],
        "`checkpoints` or `adapter` must be given, got neither": [],
        "`trust_remote_code` is for `adapter`, got True": ["--checkpoints", *paths, "--trust_remote_code"],
        "`adapter` must be a folder with adapter_config.json, got .*base": ["--adapter", paths[1]],
        "got .*adapter, which holds an adapter .merge each": ["--checkpoints", *paths],
    }
    for message, words in wrong.items():
        with pytest.raises(ValueError, match=message):
            main([*words, *target])
    with pytest.raises(ValueError, match="`output` must be new or empty, got"):
        adapters.merge_adapter(paths[0], base)
    with pytest.raises(ValueError, match="must be as in|at least two checkpoints"):
        merge_checkpoints([base])
