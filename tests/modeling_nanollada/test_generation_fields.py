"""Every setting of the diffusion `generate` works, is refused by name or is known to be harmless; no nonsense runs."""

import copy
import inspect

import pytest
import torch
import transformers
from generation_models import EOS, MASK, PAD, PROMPT, SHAPE, VOCABULARY, build, left_padded, seeded
from transformers import CompileConfig, GenerationConfig, GenerationMixin, TypicalLogitsWarper, pipeline

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAGenerationConfig,
)
from nanollada.modeling_nanollada import generation_nanollada as generation
from nanollada.modeling_nanollada.generation_config_nanollada import HARMLESS, OWN_FIELDS, UNSUPPORTED, WORKING
from nanollada.modeling_nanollada.layers_nanollada import NanoLLaDARMSNorm


@pytest.fixture(scope="module")
def model():
    return build()


def inherited_fields():
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def check_fields(names):
    new = sorted(names - {*WORKING, *UNSUPPORTED, *HARMLESS})
    where = "WORKING, UNSUPPORTED or HARMLESS of generation_config_nanollada.py"
    assert not new, f"transformers {transformers.__version__} has new fields {new}: decide each, in {where}"


# ---------------------------------------------------------------------------------------------------------------------
# transformers' fields


def test_each_inherited_field_is_decided():
    check_fields(inherited_fields())
    lists = [*WORKING, *UNSUPPORTED, *HARMLESS, *OWN_FIELDS]
    assert len(lists) == len(set(lists))
    assert set(WORKING) == {*EFFECTS, "use_cache", "cache_implementation", "bos_token_id", "stop_strings"}
    assert {*WORKING, *HARMLESS} <= inherited_fields(), "what works must be there"
    with pytest.raises(AssertionError, match=r"new fields \['brand_new'\]: decide each"):
        check_fields({*inherited_fields(), "brand_new"})


VALUES = {
    "watermarking_config": {"bias": 2.0},
    "compile_config": CompileConfig(),
    "dola_layers": "high",
    "early_stopping": True,
    "assistant_ensemble_weight": 0.5,
    "assistant_confidence_threshold": 0.3,
    "sequence_bias": [[[5], -1.0]],
    "forced_eos_token_id": 5,
    "num_assistant_tokens_schedule": "heuristic",
    **dict.fromkeys([name for name in UNSUPPORTED if name.startswith("output_")], True),
}


@pytest.mark.parametrize("name", sorted(inherited_fields() & set(UNSUPPORTED)))
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, of fields on their way out
def test_what_is_unsupported_is_refused(model, name):
    value = VALUES.get(name, 7)
    message = f"`{name}` is not supported by the diffusion `generate`: it must be unset, got "
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, max_new_tokens=2, **{name: value})
    saved = build()
    saved.generation_config.update(**{name: value})  # as a checkpoint may have it
    with pytest.raises(ValueError, match=message):
        saved.generate(PROMPT, max_new_tokens=2)
    default = {**vars(GenerationConfig()), **GenerationConfig._get_default_generation_params()}.get(name)
    assert model.generate(PROMPT, max_new_tokens=2, **{name: default}).shape == (1, 7)


@pytest.mark.parametrize("name", ["num_beams", "prompt_lookup_num_tokens", "dola_layers", "constraints"])
@pytest.mark.parametrize("value", [0, "", [], False], ids=repr)
def test_a_falsy_value_is_not_unset(model, name, value):
    """transformers asks some of them for `is not None`: a beam search, an assistant, code from the Hub would start."""
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        model.generate(PROMPT, max_new_tokens=2, **{name: value})


EFFECTS = {  # what both calls have, what the second has
    "max_length": ({}, {"max_length": 9}),
    "max_new_tokens": ({"max_length": 9}, {"max_new_tokens": 6}),
    "max_time": ({"block_length": 4, "eos_policy": "forbid"}, {"max_time": 0}),
    "do_sample": ({}, {"do_sample": True}),
    "temperature": ({"do_sample": True}, {"temperature": 9.0}),
    "top_k": ({"do_sample": True}, {"top_k": 2}),
    "top_p": ({"do_sample": True}, {"top_p": 0.2}),
    "min_p": ({"do_sample": True}, {"min_p": 0.9}),
    "top_h": ({"do_sample": True}, {"top_h": 0.1}),
    "typical_p": ({"do_sample": True}, {"typical_p": 0.2}),
    "epsilon_cutoff": ({"do_sample": True}, {"epsilon_cutoff": 0.2}),
    "eta_cutoff": ({"do_sample": True}, {"eta_cutoff": 0.9}),
    "repetition_penalty": ({}, {"repetition_penalty": 9.0}),
    "suppress_tokens": ({}, {"suppress_tokens": list(range(20, 60))}),
    "num_return_sequences": ({"do_sample": True}, {"num_return_sequences": 3}),
    "return_dict_in_generate": ({}, {"return_dict_in_generate": True}),
    "eos_token_id": ({}, {"eos_token_id": 5, "suppress_tokens": [token for token in range(64) if token != 5]}),
    "pad_token_id": ({"eos_token_id": list(range(4, 64))}, {"pad_token_id": 1}),
}


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic")
def test_what_works_has_an_effect(model, name):
    base, more = EFFECTS[name]
    base = {**({} if name == "max_length" else {"max_new_tokens": 8}), **base}
    without = model.generate(PROMPT, generator=seeded(), **base)
    result = model.generate(PROMPT, generator=seeded(), **{**base, **more})
    if name == "return_dict_in_generate":
        assert torch.equal(result.sequences, without)
    else:
        assert result.shape != without.shape or not torch.equal(result, without)


def test_the_cache_settings_choose_the_decoder(monkeypatch):
    model, chosen = build(block_length=4), []
    original = generation.predictor
    monkeypatch.setattr(generation, "predictor", lambda *args: chosen.append(original(*args)) or chosen[-1])
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        model.generate(PROMPT, max_new_tokens=4, **settings)
    assert [(type(item).__name__, item.static) for item in chosen] == [
        ("CachedBlocks", False), ("WholeRows", False), ("CachedBlocks", True)
    ]  # fmt: skip


def test_bos_and_stop_strings(model, tokenizer):
    assert model.generate(max_new_tokens=2, bos_token_id=9)[0, 0] == 9
    large = build(vocab_size=len(tokenizer), eos_token_id=None)
    whole = large.generate(PROMPT, max_new_tokens=8, block_length=1)
    end = next(text for text in map(tokenizer.decode, whole[0, 5:-1, None]) if text.strip().isalnum())
    cut = large.generate(PROMPT, max_new_tokens=8, block_length=1, stop_strings=end, tokenizer=tokenizer)
    assert cut[0, -1] == PAD and not torch.equal(whole, cut)
    with pytest.raises(ValueError, match="`stop_strings` need the `tokenizer`, which must be given, got 'x' alone"):
        large.generate(PROMPT, max_new_tokens=8, stop_strings="x")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing(model, name):
    value = "5.0.0" if name == "transformers_version" else True
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "temperature": 1.0}):
        without = model.generate(PROMPT, generator=seeded(), **settings)
        assert torch.equal(without, model.generate(PROMPT, generator=seeded(), **settings, **{name: value}))


def test_an_unknown_field_is_refused_at_run_time(model, monkeypatch):
    saved = build()
    saved.generation_config.stepz = 3
    message = "`stepz` is not known to the diffusion `generate`: it must be unset, got 3"
    with pytest.raises(ValueError, match=message):
        saved.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=2, stepz=3))
    original = GenerationConfig.__init__

    def newer(self, **kwargs):
        self.brand_new = kwargs.pop("brand_new", False)
        original(self, **kwargs)

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    newest = build()
    assert newest.generate(PROMPT, max_new_tokens=2).shape == (1, 7)  # its default asks for nothing
    with pytest.raises(ValueError, match="`brand_new` is not known to the diffusion `generate`.* got True"):
        newest.generate(PROMPT, max_new_tokens=2, brand_new=True)
    with pytest.raises(AssertionError, match=r"has new fields \['brand_new'\]"):
        test_each_inherited_field_is_decided()


def test_an_unknown_name_is_refused_when_written_down(tmp_path):
    with pytest.raises(ValueError, match=r"`stepz` is no setting .* \(did you mean `steps`\?\), got 3"):
        NanoLLaDAGenerationConfig(stepz=3)
    (tmp_path / "generation_config.json").write_text('{"treshold": 0.9, "_from_model_config": false}')
    with pytest.raises(ValueError, match=r"`treshold` is no setting .* \(did you mean `threshold`\?\), got 0.9"):
        NanoLLaDAGenerationConfig.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"treshold": 0.9}')
    model = NanoLLaDAForMaskedLM.from_pretrained(tmp_path)  # may be trained, or put right; but not decode
    with pytest.raises(ValueError, match="`treshold` is not known to the diffusion `generate`.* got 0.9"):
        model.generate(PROMPT, max_new_tokens=2)


def test_generate_documents_every_setting(model):
    """`help(model.generate)` says what it takes; the arguments stand where transformers has them."""
    text = " ".join(model.generate.__doc__.split())
    for name, setting in OWN_FIELDS.items():
        assert f"- `{name}` ({setting.type.__name__}" in text and setting.help in text
    assert all(f"`{name}`" in text for name in WORKING)
    own, theirs = (list(inspect.signature(call).parameters) for call in (model.generate, GenerationMixin.generate))
    assert own[:4] == theirs[1:5] and {*own[4:-1]} == {"streamer", "generator"}
    config = NanoLLaDAGenerationConfig(max_new_tokens=3)
    assert torch.equal(model.generate(PROMPT, config), model.generate(input_ids=PROMPT, max_new_tokens=3))


# ---------------------------------------------------------------------------------------------------------------------
# Settings without a use

SAMPLERS = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1}
SAMPLERS["eta_cutoff"] = 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_samplers_setting_needs_draws(model, name):
    setting, message = {name: SAMPLERS[name]}, f"`{name}` needs a `temperature` above 0, got {SAMPLERS[name]} with "
    for greedy in ({}, {"do_sample": False}, {"temperature": 0}):
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, max_new_tokens=2, **greedy, **setting)
        if greedy:
            with pytest.raises(ValueError, match=message):
                NanoLLaDAGenerationConfig(**greedy, **setting)
    with pytest.raises(ValueError, match=message):  # greedy by nobody's word
        model.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=2, **setting))
    assert getattr(NanoLLaDAGenerationConfig(**setting), name) == SAMPLERS[name]  # the draws may follow
    off = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    assert model.generate(PROMPT, max_new_tokens=2, do_sample=False, **{name: off.get(name)}).shape == (1, 7)


def test_a_warper_needs_draws(model):
    """Typical sampling may leave out the likeliest token, so that greedy decoding would not be the same."""
    settings = {"max_new_tokens": 2, "logits_processor": [TypicalLogitsWarper(0.5)]}
    with pytest.raises(
        ValueError, match="`logits_processor` TypicalLogitsWarper shapes draws: it needs a `temperature`"
    ):
        model.generate(PROMPT, **settings)
    by_object = model.generate(PROMPT, temperature=1.0, generator=seeded(), **settings)
    by_setting = model.generate(PROMPT, temperature=1.0, typical_p=0.5, max_new_tokens=2, generator=seeded())
    assert torch.equal(by_object, by_setting)


def test_what_a_checkpoint_saved_for_its_draws_is_passed_over(tmp_path, tokenizer):
    model = build(vocab_size=len(tokenizer))
    greedy = model.generate(PROMPT, max_new_tokens=4)
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
    model.save_pretrained(tmp_path)
    model = NanoLLaDAForMaskedLM.from_pretrained(tmp_path, dtype=torch.double)
    config = copy.deepcopy(model.generation_config)
    for options in ({}, {"generation_config": config}):
        assert torch.equal(greedy, model.generate(PROMPT, max_new_tokens=4, do_sample=False, **options))
    with pytest.raises(ValueError, match="`top_k` needs a `temperature` above 0, got 5"):
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, top_k=5)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = [pipe("The cat", max_new_tokens=4, do_sample=False) for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("settings", "decider", "message"),
    [
        (
            {"ramp_start": 0.3},
            {"commit_schedule": "equal"},
            "`ramp_start` needs the `commit_schedule` 'ramp', got 0.3",
        ),
        ({"ramp_end": 0.3}, {"commit_schedule": "ratio"}, "`ramp_end` needs the `commit_schedule` 'ramp', got 0.3"),
        ({"remdm_eta": 0.4}, {}, "`remdm_eta` needs `remdm`, got 0.4"),
        ({"position_score": "margin"}, {"remasking": "random"}, "`position_score` needs the `remasking` 'low_conf"),
        (
            {"position_score": "margin"},
            {"remdm": "cap"},
            "`position_score` needs .* and no `remdm` or `joint_threshold`, got 'margin'",
        ),
        (
            {"remasking": "random"},
            {"remdm": "cap"},
            "`remasking` needs decoding without `remdm` or `joint_threshold`, got 'random'",
        ),
    ],
)
def test_a_setting_needs_the_rule_that_reads_it(model, settings, decider, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, max_new_tokens=2, **decider, **settings)
    if decider:
        with pytest.raises(ValueError, match=message):
            NanoLLaDAGenerationConfig(**decider, **settings)
    saved = build()
    saved.generation_config.update(**settings)
    assert saved.generate(PROMPT, max_new_tokens=2, **decider).shape == (1, 7)  # of the file, not of the call


# ---------------------------------------------------------------------------------------------------------------------
# Nonsense

NONSENSE = ["", "x", b"x", -1, 2**63, -(2**70), 0.5, float("nan"), float("inf"), [], [[]], [None], {}, {"a": 1}, (1,)]
NONSENSE += [True, object(), torch.tensor([1.0, 2.0]), 3 + 1j]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(inherited_fields() | set(OWN_FIELDS)))
def test_nonsense_is_refused_by_name(model, name):
    ran = []
    for value in NONSENSE:
        settings = {"max_new_tokens": 2, **({"temperature": 1.0} if name in SAMPLERS else {}), name: value}
        try:
            out = model.generate(PROMPT, generator=seeded(), **settings)
            ran.append(value)
        except (ValueError, TypeError) as error:
            assert name in str(error), (value, error)
            continue
        out = getattr(out, "sequences", out)
        assert out.shape[1] <= 7 and not (out == MASK).any(), value
    if name in UNSUPPORTED:
        assert not ran, f"{name} ran with {ran}"


IDS = torch.tensor([[4, 5, 6]])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS[0], None, r"`input_ids` must have the shape \(batch, length\), got \(3,\)"),
        (IDS[None], None, r"`input_ids` must have the shape \(batch, length\), got \(1, 1, 3\)"),
        (IDS.float(), None, r"`input_ids` must be integers, got torch.float32 of shape \(1, 3\)"),
        (IDS.bool(), None, "`input_ids` must be integers, got torch.bool"),
        (torch.tensor([[]]), None, r"must be integers, got torch.float32 of shape \(1, 0\): an empty prompt"),
        (IDS[:0], None, r"`input_ids` must hold at least one row, got shape \(0, 3\)"),
        (IDS.tolist(), None, "`input_ids` must be a tensor of token ids, got list"),
        ("The cat", None, "`input_ids` must be a tensor of token ids, got str"),
        (IDS * 16, None, r"`input_ids` must lie in \[0, `vocab_size`\), got 64 to 96 and 64"),
        (-IDS, None, r"`input_ids` must lie in \[0, `vocab_size`\), got -6 to -4 and 64"),
        (IDS, torch.ones(1, 4), r"`attention_mask` must have the shape of `input_ids`, got \(1, 4\) and \(1, 3\)"),
        (IDS, torch.ones(3), r"`attention_mask` must have the shape of `input_ids`, got \(3,\) and \(1, 3\)"),
        (IDS, torch.ones(2, 3), r"`attention_mask` must have the shape of `input_ids`, got \(2, 3\) and \(1, 3\)"),
        (IDS, torch.ones(1, 1, 3, 3), r"got \(1, 1, 3, 3\) and \(1, 3\)"),
        (IDS, [[1, 1, 1]], "`attention_mask` must be a tensor, got list"),
        (IDS, torch.tensor([[0, 7, 1]]), "`attention_mask` must hold zeros and ones, got other values"),
        (IDS, torch.zeros(1, 3) - torch.inf, "`attention_mask` must hold zeros and ones"),
    ],
)
def test_prompts_and_masks_are_checked(model, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("block_length", [None, 4])
def test_any_integers_are_ids(dtype, block_length):
    model = build(block_length=block_length)
    ids, mask = left_padded([[4, 5, 6], [7, MASK]])
    for options in ({}, {"attention_mask": mask}, {"attention_mask": mask.bool()}):
        narrow = model.generate(ids.to(dtype), max_new_tokens=4, **options)
        assert narrow.dtype == torch.long
        assert torch.equal(narrow, model.generate(ids, max_new_tokens=4, **options))


def test_an_empty_prompt():
    """Of integers it is one for the diffusion model, alone and in a batch; an AR model has nothing to continue."""
    model, nothing = build(), torch.empty(1, 0, dtype=torch.int32)
    whole = model.generate(nothing, max_new_tokens=4)
    ids, mask = left_padded([[], [4, 5]])
    assert torch.equal(whole[0], model.generate(ids, attention_mask=mask, max_new_tokens=4)[0, 2:])
    assert model.generate(nothing, max_new_tokens=4, temperature=1.0, num_return_sequences=3).shape == (3, 4)
    with pytest.raises(ValueError, match=r"must be one row \(`num_return_sequences` makes more\), got shape \(2, 0\)"):
        model.generate(nothing.repeat(2, 1), max_new_tokens=4)
    torch.manual_seed(0)
    causal = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE)).eval()
    assert causal.generate(IDS.int(), max_new_tokens=2).tolist() == causal.generate(IDS, max_new_tokens=2).tolist()
    with pytest.raises(ValueError, match=r"must hold at least one token, got shape \(1, 0\): an empty prompt"):
        causal.generate(nothing, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 0\): an empty prompt"):
        causal.generate(torch.tensor([[]]), max_new_tokens=2)
    assert causal.generate(inputs_embeds=torch.zeros(1, 2, 16), max_new_tokens=2).shape == (1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_token_id": MASK}, "`pad_token_id` must differ from the model's `mask_token_id`, got 3 for both"),
        ({"bos_token_id": MASK}, "`bos_token_id` must differ from the model's `mask_token_id`, got 3 for both"),
        ({"eos_token_id": [EOS, MASK]}, "`eos_token_id` must differ from the model's `mask_token_id`, got 3 for both"),
        ({"eos_token_id": [EOS, 64]}, r"`eos_token_id` must lie in \[0, `vocab_size`\), got \[2, 64\] and 64"),
        ({"pad_token_id": 64}, r"`pad_token_id` must lie in \[0, `vocab_size`\), got 64 and 64"),
        ({"pad_token_id": [0]}, r"`pad_token_id` must be an integer, got \[0\]"),
        ({"eos_token_id": []}, r"`eos_token_id` must be an integer or a list of integers, not empty, got \[\]"),
        ({"suppress_tokens": [64]}, r"`suppress_tokens` must lie in \[0, `vocab_size`\), got \[64\] and 64"),
        ({"suppress_tokens": list(range(64))}, "must leave a token of 64 to predict, got 64 that may not be"),
        ({"suppress_tokens": [t for t in range(64) if t != EOS], "eos_policy": "forbid"}, "must leave a token of 64"),
        (
            {"stop_strings": ["a", ""]},
            r"`stop_strings` must be a string or a list of them, none empty, got \['a', ''\]",
        ),
        ({"steps": 2**63}, "`steps` must be below 2147483648, got 9223372036854775808"),
        ({"max_commits": 2**63}, "`max_commits` must be below 2147483648, got 9223372036854775808"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be an integer >= 1, got 0"),
        ({"do_sample": [True]}, r"`do_sample` must be one of \(True, False\), got \[True\]"),
        ({"do_sample": 1}, r"`do_sample` must be one of \(True, False\), got 1"),
        ({"streamer": 5}, "`streamer` must have the methods `put` and `end`, got int"),
        ({"assistant_tokenizer": 5}, "`assistant_tokenizer` is not supported by the diffusion `generate`"),
        ({"position_ids": []}, r"`position_ids` is not supported by the diffusion `generate`.* got \[\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_values_that_fit_no_model(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, max_new_tokens=2, **settings)


def test_left_to_right_batching_is_refused(model):
    """transformers' continuous batching would take a diffusion model's logits for the next token's."""
    with pytest.raises(ValueError, match="`generate_batch` decodes left to right"):
        model.generate_batch([[4, 5]])
    with pytest.raises(ValueError, match="`generate_batch` decodes left to right"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="`cache_implementation` must be one of"):
        model.generate(PROMPT, cache_implementation="paged")


# ---------------------------------------------------------------------------------------------------------------------
# Choices that the docstrings state


def test_greedy_rows_are_independent_and_drawn_ones_share_a_generator(model):
    other = PROMPT.flip(1)
    for settings, equal in (({}, True), ({"temperature": 1.0}, False)):
        settings = {"max_new_tokens": 8, "eos_policy": "forbid", **settings}
        alone = model.generate(PROMPT, generator=seeded(), **settings)[0]
        for rows in ((PROMPT, other), (other, PROMPT)):
            batch = model.generate(torch.cat(rows), generator=seeded(), **settings)
            assert torch.equal(alone, batch[0 if rows[0] is PROMPT else 1]) is equal
    text = " ".join(model.generate.__doc__.split())
    assert "a sampled row depends on its batch mates and on their order" in text


def test_guidance_hides_the_prompt_and_not_its_filled_masks(model):
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    out = model.generate(torch.tensor([[4, MASK, 6]]), max_new_tokens=1, cfg_scale=1.0, eos_policy="forbid")[0]
    hook.remove()
    assert len(seen) == 2
    filled = seen[1][0] != MASK
    filled[[0, 2]] = False
    assert seen[1][1].tolist() == torch.where(filled, out, MASK).tolist() and filled.any()


def test_norms_are_float32_in_a_float64_model():
    states = torch.randn(4, 16, dtype=torch.double, generator=seeded())
    norm = NanoLLaDARMSNorm(16, 1e-5).double()
    exact = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-5)
    error = (norm(states) - exact).abs().max()
    assert norm(states).dtype == torch.double and 1e-9 < error < 1e-6
    assert "RMSNorm and RoPE are computed in float32 whatever the `dtype`" in " ".join(NanoLLaDAConfig.__doc__.split())


def test_the_table_is_not_cut_below_a_special_token():
    model = build()
    with pytest.raises(ValueError, match=r"`mask_token_id` must lie in \[0, `vocab_size`\), got 3 and 3"):
        model.resize_token_embeddings(3)
    assert model.config.vocab_size == len(model.model.embed_tokens.weight) == VOCABULARY
    assert model.resize_token_embeddings(3, pad_to_multiple_of=8).weight.shape[0] == 8
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 5)
    wide = build(eos_token_id=[2, 50])
    with pytest.raises(ValueError, match=r"`eos_token_id` must lie in \[0, `vocab_size`\), got \[2, 50\] and 40"):
        wide.resize_token_embeddings(40)
