"""Every transformers: both names of the cache, nothing swallowed, and loud on a version that nobody has tested."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from generation_models import build as build_diffusion
from transformers import DynamicCache, GenerationMixin

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAModel,
    versions_nanollada,
)
from nanollada.modeling_nanollada.cache_nanollada import BlockCacheLayer
from nanollada.modeling_nanollada.versions_nanollada import CACHE

CLASSES = (NanoLLaDAModel, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM)
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(5, 17).view(2, 6)


def build(model_class=NanoLLaDAForCausalLM, **overrides):
    torch.manual_seed(0)
    config = NanoLLaDAConfig(**{**SHAPE, **overrides}, initializer_range=0.3)
    return model_class(config).eval()


@pytest.fixture
def untested(monkeypatch):
    """A transformers that nobody has tested, in a process that has verified nothing."""
    monkeypatch.setattr(versions_nanollada.transformers, "__version__", "5.99.0")
    monkeypatch.setattr(versions_nanollada, "_verified", set())


# ---------------------------------------------------------------------------------------------------------------------
# Both names, one argument


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_both_names_of_the_cache(name, caplog):
    model = build()
    expected = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caplog.set_level(logging.WARNING, logger="transformers")
        first = model(IDS[:, :4], use_cache=True)
        assert first.cache is first.past_key_values and first.cache.get_seq_length() == 4
        rest = model(IDS[:, 4:], **{name: first.cache})
        given = DynamicCache(config=model.config)
        model(IDS[:, :4], **{name: given})
        backbone = model.model(IDS[:, 4:], **{name: given}).last_hidden_state
        as_tuple = model(IDS[:, :4], use_cache=True, return_dict=False)
    assert not caplog.records
    torch.testing.assert_close(rest.logits, expected[:, 4:])
    torch.testing.assert_close(model.lm_head(backbone), expected[:, 4:])
    assert isinstance(as_tuple[1], DynamicCache) and first[CACHE] is first.cache


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
def test_a_cache_under_both_names_is_refused(model_class):
    one, other = DynamicCache(), DynamicCache()
    build()(IDS, cache=one), build()(IDS, cache=other)
    with pytest.raises(TypeError, match="`cache` and `past_key_values` are two names of one argument"):
        build(model_class)(IDS, cache=one, past_key_values=other)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("ar", call) for call in ({}, {"do_sample": True}, {"cache_implementation": "static"}, {"num_beams": 2})),
        *(("blocks", call) for call in ({}, {"use_cache": False}, {"threshold": 0.5})),
        *(("whole", call) for call in ({"approximate_cache": "dual"}, {"cfg_scale": 0.5})),
    ],
    ids=str,
)
@torch.no_grad()
def test_generate_makes_no_warning_of_its_own(name, call, caplog):
    model = build() if name == "ar" else build_diffusion(0, block_length=4 if name == "blocks" else None)
    caplog.set_level(logging.WARNING, logger="transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model.generate(IDS, max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True, **call)
    assert output.sequences.shape == (2, 12)
    if name == "ar":  # transformers' own output
        assert getattr(output, CACHE).get_seq_length() == 11
    else:
        assert output.cache is None and output.past_key_values is None
    assert not [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing swallowed


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
@pytest.mark.parametrize("argument", ["kv_memory", "atention_mask", "token_type_ids", "cache_position", "head_mask"])
def test_an_unknown_argument_is_refused(model_class, argument):
    with pytest.raises(TypeError, match=rf"forward\(\) got an unexpected keyword argument '{argument}'"):
        build(model_class)(IDS, **{argument: None})


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
def test_what_describes_documents_to_flash_attention_is_refused_without_it(model_class):
    for argument in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        with pytest.raises(TypeError, match=f"'{argument}' with `attn_implementation` 'sdpa'"):
            build(model_class)(IDS, **{argument: torch.tensor([0, 3, 6])})
        versions_nanollada.refuse_unknown("a", {argument: 1}, "flash_attention_2")


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
def test_what_transformers_passes_is_known(model_class):
    model = build(model_class)
    known = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": True}
    known |= {"attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(6)[None], "is_causal": None}
    known["is_causal"] = model_class is not NanoLLaDAForMaskedLM
    if model_class is not NanoLLaDAModel:
        known |= {"labels": IDS, "num_items_in_batch": torch.tensor(3), "logits_to_keep": 0, "shift_labels": None}
    assert len(model(IDS, **known).hidden_states) == 3


def test_a_block_length_is_a_diffusion_models():
    with pytest.raises(ValueError, match="`block_length` is a diffusion model's: .* got 4"):
        build()(IDS, block_length=4)


def test_a_cache_with_keys_does_not_go_with_gradient_checkpointing():
    model = build()
    past = model(IDS, use_cache=True).cache
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match="the cache must be empty in training, got 6 cached tokens"):
        model.train()(IDS, cache=past)


# ---------------------------------------------------------------------------------------------------------------------
# A transformers that nobody has tested


def rename_again(monkeypatch, hide):
    """A stand-in for a transformers whose `generate` calls the cache `kv_memory`, or (`hide`) keeps it to itself."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        cache = inputs.pop(CACHE, None)
        return inputs if hide else {**inputs, "kv_memory": cache}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)


def test_a_renamed_argument_is_refused(untested, monkeypatch):
    rename_again(monkeypatch, hide=False)
    with pytest.raises(TypeError, match="argument 'kv_memory'; running transformers 5.99.0 .tested: 5.17 to 5"):
        build()(IDS, kv_memory=DynamicCache())
    with pytest.raises(RuntimeError, match=r"`generate` with a cache is wrong on transformers 5.99.0 \(tested: 5.17"):
        build().generate(IDS, max_new_tokens=4)


@pytest.mark.parametrize("training", [False, True])
def test_a_lost_cache_is_noticed(untested, monkeypatch, training):
    model = build().train(training)
    assert model.generate(IDS, max_new_tokens=4).shape == (2, 10)  # verified now, so not again
    rename_again(monkeypatch, hide=True)
    model.generate(IDS, max_new_tokens=4)
    versions_nanollada._verified.clear()
    with pytest.raises(RuntimeError, match="its logits differ from those recomputed without a cache"):
        model.generate(IDS, max_new_tokens=4)
    assert model.training is training


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ({"block_length": 4}, {}),
        ({}, {"approximate_cache": "dual", "block_length": 4}),
        ({}, {"approximate_cache": "prefix", "block_length": 4}),
    ],
)
def test_a_broken_block_cache_is_noticed(untested, monkeypatch, shape, call):
    model = build_diffusion(0, **shape)
    call = {"max_new_tokens": 12, "eos_token_id": None, **call}
    expected = model.generate(IDS, **call)
    versions_nanollada._verified.clear()
    assert model.generate(IDS, **call).tolist() == expected.tolist()
    assert versions_nanollada._verified == {"blocks" if shape else "frozen"}
    versions_nanollada._verified.clear()
    update = BlockCacheLayer.update

    def forgets(self, keys, values, *args, **kwargs):
        keys, values = update(self, keys, values, *args, **kwargs)
        return keys, torch.cat((values[:, :, :1] * 0, values[:, :, 1:]), dim=2) if self.start else values

    monkeypatch.setattr(BlockCacheLayer, "update", forgets)
    with pytest.raises(RuntimeError, match="its logits differ from those recomputed without a cache"):
        model.generate(IDS, **call)


def test_tested_versions_are_not_verified_again(monkeypatch):
    monkeypatch.setattr(versions_nanollada, "_verified", set())
    for version, tested in (
        ("5.17.0", True),
        ("5.24.9", True),
        ("5.16.1", False),
        ("5.25.0.dev0", False),
        ("6.0.0", False),
    ):
        monkeypatch.setattr(versions_nanollada.transformers, "__version__", version)
        assert versions_nanollada.must_verify("autoregressive") is not tested


def test_importing_warns_once_on_an_untested_version():
    code = (
        "import warnings, transformers; transformers.__version__ = '5.99.0'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import nanollada.modeling_nanollada\n"
        "print(*[str(item.message) for item in seen if 'nanollada' in str(item.message)], sep='\\n')"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(seen) == 1 and "has not been tested with transformers 5.99.0 (tested: 5.17 to 5" in seen[0]


# ---------------------------------------------------------------------------------------------------------------------
# What transformers and other libraries legitimately do


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_from_a_cache_under_either_name(name):
    model = build()
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    past = DynamicCache(config=model.config)
    model(IDS[:, :3], cache=past)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, **{name: past}).tolist() == expected.tolist()


def test_stop_strings_bring_their_tokenizer(tokenizer):
    model = build(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    free = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 6:]
    stop = tokenizer.decode(free[2:3])
    stopped = model.generate(
        IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer
    )
    assert len(stopped[0]) - 6 == next(n for n in range(1, 9) if stop in tokenizer.decode(free[:n]))
    embeds = model.get_input_embeddings()(IDS[:1])
    assert model.generate(inputs_embeds=embeds, max_new_tokens=8, eos_token_id=None)[0].tolist() == free.tolist()


@torch.no_grad()
def test_an_empty_cache_beside_one_with_keys_is_none():
    """PEFT's prefix tuning brings one under the old name, `generate` an empty one under the new."""
    model = build()
    expected = model(IDS).logits[:, 4:]
    for names in (("cache", "past_key_values"), ("past_key_values", "cache")):
        past = model(IDS[:, :4], use_cache=True).cache
        found = model(IDS[:, 4:], **dict(zip(names, (past, DynamicCache(config=model.config)), strict=True))).logits
        torch.testing.assert_close(found, expected)


def test_an_early_exit_drafts_for_the_whole_model():
    model = build()
    expected = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, assistant_early_exit=1)
    assert found.tolist() == expected.tolist() and model.config.num_hidden_layers == 2


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="`cache_implementation` must not be 'paged'"):
        build().generate(IDS, max_new_tokens=4, cache_implementation="paged")
    with pytest.raises(ValueError, match="Continuous batching needs a paged cache, which is not built"):
        build().generate_batch([IDS[0].tolist()])
