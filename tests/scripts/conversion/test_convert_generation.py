"""Generation settings there and back: what was set comes along, and what was changed in between."""

import pytest
from conversions import run, save_foreign
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM


@pytest.mark.parametrize("to", ["causal", "masked"])
@pytest.mark.parametrize("file", [True, False])
def test_all_ends_of_text_come_along(to, file, tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "llama-linear-bias", tokenizer, eos_token_id=[2, 7])
    if not file:
        (tmp_path / "theirs" / "generation_config.json").unlink()
    record = run(tmp_path / "theirs", to, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert ours.generation_config.eos_token_id == [2, 7] and record["notes"] == []


@pytest.mark.parametrize("to", ["causal", "masked"])
@pytest.mark.parametrize("file", [True, False])
def test_one_end_of_text_that_is_not_the_tokenizers_comes_along(to, file, tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "qwen3", tokenizer, eos_token_id=5)
    if not file:
        (tmp_path / "theirs" / "generation_config.json").unlink()
    record = run(tmp_path / "theirs", to, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert ours.generation_config.eos_token_id == 5 and ours.config.eos_token_id == 2
    assert ours.generation_config.bos_token_id == 1 and ours.generation_config.pad_token_id is not None
    assert record["notes"] == ["generation ends at the source's [5], but its tokenizer ends texts with 2"]
    if to == "causal":
        run(tmp_path / "ours", "qwen3", tmp_path / "back")
        assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == 5


def test_generation_settings_come_along(tokenizer, tmp_path):
    save_foreign(tmp_path / "theirs", "qwen3", tokenizer)
    GenerationConfig(eos_token_id=[2, 7], top_k=20, do_sample=True).save_pretrained(tmp_path / "theirs")
    record = run(tmp_path / "theirs", "causal", tmp_path / "ours")
    found = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ours")
    assert found.generation_config.eos_token_id == [2, 7] and found.generation_config.top_k == 20
    assert found.generation_config.suppress_tokens == [3] and found.config.eos_token_id == 2
    assert record["vocabulary"]["mask"] == "own"
    run(tmp_path / "ours", "qwen3", tmp_path / "back")
    settings = GenerationConfig.from_pretrained(tmp_path / "back")
    assert settings.suppress_tokens == [3] and settings.eos_token_id == [2, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "back").mask_token_id == 3


def there_and_back(tokenizer, folder, edit):
    """Generation settings of a model that went to ours, was edited there, and came back."""
    save_foreign(folder / "theirs", "qwen3", tokenizer)
    original = GenerationConfig(eos_token_id=[2, 7], do_sample=True, top_k=20, suppress_tokens=[5])
    original.save_pretrained(folder / "theirs")
    run(folder / "theirs", "causal", folder / "ours")
    ours = GenerationConfig.from_pretrained(folder / "ours")
    assert ours.suppress_tokens == [5, 300] and ours.pad_token_id == 2
    edit(ours)
    ours.save_pretrained(folder / "ours")
    run(folder / "ours", "qwen3", folder / "back")
    return original.to_dict(), GenerationConfig.from_pretrained(folder / "back").to_dict()


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 7}, {"eos_token_id": [2]}, {"temperature": 0.5, "top_k": None}, {"suppress_tokens": [6, 300]}],
    ids=str,
)
def test_the_way_back_keeps_what_was_set_in_between(changes, plain_tokenizer, tmp_path):
    original, back = there_and_back(plain_tokenizer, tmp_path, lambda ours: ours.update(**changes))
    if "suppress_tokens" in changes:
        changes = {"suppress_tokens": [6]}  # the mask's row is gone
    assert back == original | changes
