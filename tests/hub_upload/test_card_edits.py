"""A published model that edits: its card, its tokenizer, and that what is generated holds no edit token."""

import copy
import json

import pytest
import torch

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload import recompute
from nanollada.hub_upload.export import export
from nanollada.hub_upload.verify import VerificationError, verify
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.data.tokenizers import ensure_edit_tokens
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def save(tokenizer, tmp_path):
    """A function: a checkpoint of a run, with edit tokens or without."""

    def make(model_class=NanoLLaDAForMaskedLM, corruption="structural", edits=True, settings=None, **shape):
        own, folder = copy.deepcopy(tokenizer), tmp_path / "run"
        if edits:
            ensure_edit_tokens(own)
        torch.manual_seed(0)
        model = model_class(config_for(own, initializer_range=0.2, **SHAPE, **shape))
        model.generation_config.update(max_new_tokens=12, **(settings or {}))
        model.save_pretrained(folder)
        own.save_pretrained(folder)
        run = {"data": {"format": "sft"}, "objective": {"name": "a bound", "corruption": corruption}}
        (folder / "run.json").write_text(json.dumps(run))
        return folder

    return make


def card_of(folder, tmp_path) -> str:
    return (export(folder, tmp_path / "out") / "README.md").read_text()


def test_a_card_shows_how_to_edit(save, tmp_path):
    text = card_of(save(block_length=8), tmp_path)
    assert "- Edit tokens: `<|delete|>` and `<|insert|>`, which no text holds" in text
    assert 'edited = model.generate(**inputs, preset="llada2.2")' in text
    assert "Structural edits are `generate`'s own (`structural_edits`)" in text


@pytest.mark.slow
def test_a_structural_model_is_verified(save, tmp_path):
    export(save(block_length=8), tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report["snippets"] == 4 and report["generate_calls"] == 3 and not report["not_checked"]
    assert report["golden_tokens"][0] > 0
    settings = tmp_path / "out" / "config.json"
    saved = json.loads(settings.read_text())
    settings.write_text(json.dumps({**saved, "delete_token_id": 301, "insert_token_id": 300}))
    with pytest.raises(VerificationError, match="tokenizer: .*`delete_token_id` must be the tokenizer's 300, got 301"):
        verify(tmp_path / "out")


def test_what_the_checkpoint_sets_is_what_the_card_recommends(save, tmp_path):
    settings = {"joint_threshold": 0.6, "joint_edit_threshold": 0.4, "structural_edits": True, "temperature": 0.0}
    text = card_of(save(block_length=8, settings=settings), tmp_path)
    assert "| `joint_threshold` | 0.6 |" in text and "| `structural_edits` | True |" in text
    assert "max_new_tokens=0, structural_edits=False)" in text  # infilling: nothing moves
    assert "It edits what it wrote until a block is finished" in text and "llada2.2" not in text


def test_a_card_says_how_gaps_are_filled(save, tmp_path):
    text = card_of(save(corruption="expansion"), tmp_path)
    assert "`generate(ids_with_masks, max_new_tokens=0, max_expansions=…)`" in text and "no record says" not in text


def test_a_card_promises_no_edits_that_no_run_taught(save, tmp_path):
    text = card_of(save(corruption="masking"), tmp_path)
    assert "no record says that it was trained to use them" in text and "llada2.2" not in text


def test_an_ar_twin_says_that_it_never_writes_them(save, tmp_path):
    assert "this model never writes them" in card_of(save(NanoLLaDAForCausalLM), tmp_path)


def test_a_model_without_them_says_nothing_of_edits(save, tmp_path):
    text = card_of(save(edits=False, corruption="masking"), tmp_path)
    assert "dit tokens" not in text and "tructural" not in text and "It edits" not in text


def test_a_tokenizer_whose_edit_tokens_are_others_is_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    delete, insert = ensure_edit_tokens(own)
    config = config_for(own)
    recompute.check_tokenizer(config, own)
    config.delete_token_id, config.insert_token_id = insert, delete
    with pytest.raises(ValueError, match=f"`delete_token_id` must be the tokenizer's {delete}, got {insert}"):
        recompute.check_tokenizer(config, own)


def test_golden_prompts_are_text(tokenizer):
    config = NanoLLaDAConfig(vocab_size=40, delete_token_id=20, insert_token_id=7)
    config.architectures = ["NanoLLaDAForMaskedLM"]
    asked = {token for run in recompute.runs_to_check(config) for token in run["prompt"]}
    assert not asked & {0, 2, 3, 7, 20} and recompute.never_left(config) == [3, 20, 7]
