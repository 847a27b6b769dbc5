"""`generate` of the diffusion model as transformers users know it: settings, output, streamers, pipelines, files."""

import pytest
import torch
from generation_models import (
    EOS,
    MASK,
    PAD,
    PROMPT,
    SHAPE,
    VOCABULARY,
    Recorder,
    StopAt,
    build,
    drafts,
    eos_model,
    left_padded,
    seeded,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    GenerationConfig,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
    dynamic_module_utils,
    pipeline,
)

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAGenerationConfig,
    NanoLLaDAGenerationOutput,
)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def block_model():
    return build(block_length=4)


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


def test_greedy_is_the_default_and_has_three_names(model):
    default = model.generate(PROMPT, max_new_tokens=6)
    for options in ({"do_sample": False}, {"temperature": 0}, {"temperature": 0.0, "do_sample": False}):
        assert torch.equal(default, model.generate(PROMPT, max_new_tokens=6, **options))


def test_sampling_has_three_names(model):
    sample = model.generate(PROMPT, max_new_tokens=6, temperature=1.0, generator=seeded())
    for options in ({"do_sample": True}, {"do_sample": True, "temperature": 1}):
        assert torch.equal(sample, model.generate(PROMPT, max_new_tokens=6, generator=seeded(), **options))
    torch.manual_seed(7)
    first = model.generate(PROMPT, max_new_tokens=6, temperature=1.0)
    torch.manual_seed(7)
    assert torch.equal(first, model.generate(PROMPT, max_new_tokens=6, temperature=1.0))  # the global generator
    assert not torch.equal(first, model.generate(PROMPT, max_new_tokens=6, temperature=1.0))


@pytest.mark.parametrize(
    ("saved", "call", "temperature"),
    [
        ({}, {}, 0.0),
        ({"temperature": 0.7}, {}, 0.7),
        ({"do_sample": True}, {}, 1.0),
        ({"temperature": 0.7}, {"do_sample": False}, 0.0),
        ({"temperature": 0.7, "do_sample": True}, {"do_sample": False}, 0.0),
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 0}, 0.0),
        ({"temperature": 0.7, "do_sample": True}, {"generation_config": GenerationConfig(do_sample=False)}, 0.0),
        ({"temperature": 0.0, "do_sample": False}, {"do_sample": True}, 1.0),
        ({"temperature": 0.0}, {"generation_config": GenerationConfig(do_sample=True)}, 1.0),
        ({"do_sample": False}, {"temperature": 0.5}, 0.5),
        ({"do_sample": False}, {"temperature": 0.5, "do_sample": True}, 0.5),
        ({"do_sample": True}, {"temperature": 0.5}, 0.5),
    ],
)
def test_the_call_outranks_what_the_model_saved(saved, call, temperature):
    model = build()
    model.generation_config = NanoLLaDAGenerationConfig(**saved)
    settings, _ = model._prepare_generation_config(**{"generation_config": None, **call})
    assert (settings.temperature, settings.do_sample) == (temperature, temperature > 0)
    assert settings.top_k is None and settings.top_p is None


def test_low_temperatures_are_nearly_greedy_and_high_ones_nearly_uniform(model):
    ids = PROMPT.repeat(64, 1)
    greedy = model.generate(PROMPT, max_new_tokens=6)
    cold = model.generate(ids, max_new_tokens=6, temperature=1e-4, generator=seeded())
    assert torch.equal(cold, greedy.expand_as(cold))
    hot = model.generate(ids, max_new_tokens=6, temperature=1e4, eos_policy="forbid", generator=seeded())
    assert len(hot[:, 5:].unique()) == VOCABULARY - 2


def test_num_return_sequences_are_independent(model):
    out = model.generate(PROMPT, max_new_tokens=6, num_return_sequences=5, temperature=1.0, generator=seeded())
    assert out.shape == (5, 11) and len(out.unique(dim=0)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Output, lengths, streamers, pipelines


def test_output_of_a_dictionary(model):
    result = model.generate(PROMPT, max_new_tokens=8, steps=2, eos_policy="forbid", return_dict_in_generate=True)
    assert isinstance(result, NanoLLaDAGenerationOutput)
    assert result.past_key_values is None and result.scores is None
    assert result.tokens_per_forward.tolist() == [4.0]
    assert set(result) == {"sequences", "tokens_per_forward", "canvas", "commit_steps"}


def test_lengths_as_in_transformers(model):
    assert model.generate(PROMPT, max_length=9).shape == (1, 9)
    with pytest.warns(UserWarning, match="max_length"):
        assert model.generate(PROMPT).shape == (1, 25)  # transformers' default: 20 new tokens
    assert model.generate(max_new_tokens=3).shape == (1, 4)  # from the bos token
    assert model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=3).shape == (1, 3)


def test_the_attention_mask_is_guessed_as_in_transformers(model):
    ids, attention_mask = left_padded([[4, 5, 6, 7], [8, 9]])
    given = model.generate(ids, attention_mask=attention_mask, max_new_tokens=4)
    assert torch.equal(given, model.generate(ids, max_new_tokens=4))


def test_only_the_logits_of_the_block_are_computed(model):
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    model.generate(PROMPT, max_new_tokens=6, block_length=3, eos_policy="forbid")
    handle.remove()
    assert sizes == [3, 2, 1, 3, 2, 1]


def test_put_and_drafts_make_the_row(model):
    streamer = drafts(model, PROMPT, max_new_tokens=6, block_length=3, eos_policy="forbid")
    out = model.generate(PROMPT, max_new_tokens=6, block_length=3, eos_policy="forbid")[0].tolist()
    assert streamer.ended and sum((put[0] for put in streamer.puts), []) == out
    for draft, length in zip(streamer.drafts, [6, 6, 6, 3, 3, 3], strict=True):
        row = out[: 11 - length] + draft[0]
        assert len(draft[0]) == length and all(token in (MASK, out[index]) for index, token in enumerate(row))


def test_nothing_is_streamed_after_the_end():
    streamer = drafts(eos_model(), PROMPT, max_new_tokens=8, block_length=4)
    assert streamer.puts == [PROMPT.tolist(), [[15, 16, EOS]]]


def test_transformers_streamers(tokenizer, capsys):
    model = build(vocab_size=len(tokenizer))
    prompt = tokenizer("The cat", return_tensors="pt").input_ids
    kwargs = {"max_new_tokens": 8, "block_length": 4, "suppress_tokens": [0, 1, 2]}
    out = tokenizer.decode(model.generate(prompt, **kwargs)[0])
    for streamer_class in (TextStreamer, TextDiffusionStreamer):
        model.generate(prompt, streamer=streamer_class(tokenizer), **kwargs)
        printed = capsys.readouterr().out
        assert printed.endswith("\n")
        if streamer_class is TextStreamer:
            assert printed == out + "\n"
        else:
            assert printed.count("\033[33m") == 8 and tokenizer.mask_token in printed
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt, streamer=streamer, **kwargs)
    assert "The cat" + "".join(streamer) == out


@pytest.fixture
def text_pipeline(tokenizer):
    return pipeline("text-generation", model=build(vocab_size=len(tokenizer)), tokenizer=tokenizer, device="cpu")


def test_pipeline(text_pipeline):
    [record] = text_pipeline("The cat", max_new_tokens=6)  # samples: the pipeline's own default
    assert record["generated_text"].startswith("The cat")
    greedy = [text_pipeline(text, max_new_tokens=6, do_sample=False) for text in ("The cat sat on", "The dog")]
    assert greedy == [text_pipeline(text, max_new_tokens=6, do_sample=False) for text in ("The cat sat on", "The dog")]
    text_pipeline.tokenizer.padding_side = "left"
    batch = text_pipeline(["The cat sat on", "The dog"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert batch == greedy
    chat = [{"role": "user", "content": "What is it?"}]
    [record] = text_pipeline(chat, max_new_tokens=6, block_length=3, return_dict_in_generate=True)
    assert record["generated_text"][-1]["role"] == "assistant"


def test_pipeline_samples_with_its_own_temperature(text_pipeline):
    seen = []
    sample = text_pipeline.model._sample.__func__

    class Spy(type(text_pipeline.model)):
        def _sample(self, *args, **kwargs):
            seen.append((kwargs["generation_config"].temperature, kwargs["generation_config"].top_k))
            return sample(self, *args, **kwargs)

    text_pipeline.model.__class__ = Spy
    text_pipeline("The cat", max_new_tokens=2)
    text_pipeline("The cat", max_new_tokens=2, do_sample=False)
    assert seen == [(0.7, None), (0.0, None)]


def test_pipeline_leaves_a_greedy_model_greedy(tokenizer):
    model = build(vocab_size=len(tokenizer))
    model.generation_config.temperature = 0.0
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert pipe("The cat", max_new_tokens=6) == pipe("The cat", max_new_tokens=6, do_sample=False)


# ---------------------------------------------------------------------------------------------------------------------
# The configuration on disk

SETTINGS = {"block_length": 2, "steps": 1, "position_score": "margin", "cfg_scale": 0.5, "temperature": 0.9}


def same_settings(config):
    assert type(config).__name__ == "NanoLLaDAGenerationConfig"
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert (config.eos_token_id, config.pad_token_id) == (EOS, PAD)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_generation_config_survives_save_and_load(tmp_path, auto_class):
    model = build()
    model.generation_config.update(**SETTINGS)
    for folder in ("first", "second"):  # and from a loaded model once more
        model.save_pretrained(tmp_path / folder)
        model = auto_class.from_pretrained(tmp_path / folder)
        same_settings(model.generation_config)
    kwargs = {"max_new_tokens": 4}
    explicit = build().generate(PROMPT, generator=seeded(), **kwargs, **SETTINGS)
    assert torch.equal(model.generate(PROMPT, generator=seeded(), **kwargs), explicit)


def test_generation_config_survives_as_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = build()
    model.generation_config.update(**SETTINGS)
    model.save_pretrained(tmp_path / "model")
    remote_class = dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_nanollada.NanoLLaDAForMaskedLM", str(tmp_path / "model")
    )
    assert remote_class.__module__.startswith("transformers_modules")
    remote = remote_class.from_pretrained(tmp_path / "model")
    same_settings(remote.generation_config)
    assert torch.equal(
        remote.generate(PROMPT, max_new_tokens=4, generator=seeded()),
        model.generate(PROMPT, max_new_tokens=4, generator=seeded()),
    )


def test_an_ar_checkpoint_without_and_with_a_generation_config(tmp_path):
    torch.manual_seed(0)
    NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE)).save_pretrained(tmp_path)
    for _ in range(2):
        model = NanoLLaDAForMaskedLM.from_pretrained(tmp_path)
        assert type(model.generation_config) is NanoLLaDAGenerationConfig
        assert model.generation_config.eos_token_id == EOS and not model.generation_config._from_model_config
        assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 9)
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
    model.generation_config.steps = 2
    model.save_pretrained(tmp_path)
    assert NanoLLaDAForMaskedLM.from_pretrained(tmp_path).generation_config.steps == 2


def test_a_config_object_and_keywords_mean_the_same(model):
    settings = {"max_new_tokens": 6, "block_length": 3, "steps": 2, "temperature": 0.8}
    by_keyword = model.generate(PROMPT, generator=seeded(), **settings)
    by_object = model.generate(PROMPT, generation_config=NanoLLaDAGenerationConfig(**settings), generator=seeded())
    assert torch.equal(by_keyword, by_object)
    plain = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=0.8)
    by_plain = model.generate(PROMPT, generation_config=plain, block_length=3, steps=2, generator=seeded())
    assert torch.equal(by_keyword, by_plain)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

CACHE = DynamicCache()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"block_length": 0}, "`block_length` must be an integer >= 1, got 0"),
        ({"steps": 0}, "`steps` must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "`steps` must be an integer >= 1, got 2.5"),
        ({"steps": True}, "`steps` must be an integer >= 1, got True"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be an integer >= 0, got -1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be > 0 for a prompt without mask tokens, got 0"),
        ({"temperature": -0.5}, "`temperature` must be a number >= 0, got -0.5"),
        ({"temperature": float("nan")}, "`temperature` must be a number >= 0, got nan"),
        ({"temperature": float("inf")}, "`temperature` must be a number >= 0, got inf"),
        ({"temperature": "hot"}, "`temperature` must be a number >= 0, got 'hot'"),
        ({"do_sample": True, "temperature": 0}, "`do_sample` must be False where `temperature` is 0 .*got True and 0"),
        ({"do_sample": False, "temperature": 0.5}, "and True where it is not, got False and 0.5"),
        ({"do_sample": "yes"}, r"`do_sample` must be one of \(True, False\), got 'yes'"),
        ({"top_k": -1, "temperature": 1.0}, "`top_k` must be an integer >= 0, got -1"),
        ({"top_p": 0.0, "temperature": 1.0}, r"`top_p` must be a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.5, "temperature": 1.0}, r"`top_p` must be a number in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be a number > 0, got 0"),
        ({"cfg_scale": -1}, "`cfg_scale` must be a number >= 0, got -1"),
        ({"remasking": "sorted"}, r"`remasking` must be one of \('low_confidence', 'random'\), got 'sorted'"),
        ({"position_score": "random"}, r"`position_score` must be one of \('max_prob', .*\), got 'random'"),
        ({"eos_policy": "first"}, r"`eos_policy` must be one of \('none', 'last', 'cut', 'forbid'\), got 'first'"),
        ({"early_stop": "never"}, r"`early_stop` must be one of \(True, False\), got 'never'"),
        ({"generator": 0}, "`generator` must be a torch.Generator, got 0"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 4}, "`num_beams` is not supported by the diffusion `generate`: it must be unset, got 4"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "`penalty_alpha` is not supported"),
        ({"dola_layers": "high"}, "`dola_layers` is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` is not supported"),
        ({"guidance_scale": 1.5}, "`guidance_scale` is not supported"),
        ({"min_new_tokens": 2}, "`min_new_tokens` is not supported"),
        ({"no_repeat_ngram_size": 2}, "`no_repeat_ngram_size` is not supported"),
        ({"bad_words_ids": [[5]]}, "`bad_words_ids` is not supported"),
        ({"forced_eos_token_id": 2}, "`forced_eos_token_id` is not supported"),
        ({"cache_implementation": "offloaded"}, "`cache_implementation` must be one of .* got 'offloaded'"),
        ({"output_scores": True, "return_dict_in_generate": True}, "`output_scores` is not supported"),
        ({"output_logits": True, "return_dict_in_generate": True}, "`output_logits` is not supported"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "`output_attentions` is not supported"),
        ({"past_key_values": CACHE}, "`(cache|past_key_values)` is not supported .* got DynamicCache"),
        ({"cache": CACHE}, "`cache` is not supported .* got DynamicCache"),
        ({"position_ids": torch.arange(5)[None]}, "`position_ids` is not supported .* got Tensor"),
        ({"document_ids": torch.zeros(1, 5)}, "`document_ids` is not supported"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [4]}, "`prefix_allowed_tokens_fn` is not supported"),
        ({"negative_prompt_ids": PROMPT}, "`negative_prompt_ids` is not supported .* got Tensor"),
        ({"synced_gpus": True}, "`synced_gpus` is not supported"),
        (
            {"logits_processor": [NoBadWordsLogitsProcessor([[5, 6]])]},
            "`logits_processor` must not read the row left to right, got NoBadWordsLogitsProcessor",
        ),
        (
            {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5)]},
            "`logits_processor` must not read the row left to right, got RepetitionPenaltyLogitsProcessor",
        ),
        ({"stepz": 3}, r"`model_kwargs` are not used by the model: \['stepz'\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # refused under its old name too
def test_refusals(model, kwargs, match):
    with pytest.raises(ValueError, match=match):
        model.generate(PROMPT, **{"max_new_tokens": 4, **kwargs})


def test_refusals_of_other_inputs(model, block_model):
    with pytest.raises(ValueError, match="`inputs_embeds` is not supported .* got Tensor"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 16), max_new_tokens=4)
    with pytest.raises(ValueError, match="`assistant_model` is not supported .* got NanoLLaDAForMaskedLM"):
        model.generate(PROMPT, assistant_model=block_model, max_new_tokens=4)
    with pytest.raises(ValueError, match="Input length of input_ids is 5, but `max_length` is set to 4"):
        model.generate(PROMPT, max_length=4)
    for block_length in (3, 8):
        message = f"`block_length` must divide the model's `config.block_length`, got {block_length} and 4"
        with pytest.raises(ValueError, match=message):
            block_model.generate(PROMPT, max_new_tokens=24, block_length=block_length)


def test_refusals_without_special_tokens():
    model = build(eos_token_id=None, pad_token_id=None)
    assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 9)
    for policy in ("last", "forbid"):
        with pytest.raises(ValueError, match=f"`eos_policy` must be 'none' without an `eos_token_id`, got '{policy}'"):
            model.generate(PROMPT, max_new_tokens=4, eos_policy=policy)
    with pytest.raises(ValueError, match="`pad_token_id` must be set for `stopping_criteria`, got None"):
        model.generate(PROMPT, max_new_tokens=4, stopping_criteria=[StopAt(9)])


def test_bad_settings_are_refused_when_written_down():
    with pytest.raises(ValueError, match="`steps` must be an integer >= 1, got 0"):
        NanoLLaDAGenerationConfig(steps=0)
    with pytest.raises(ValueError, match="got True and 0"):
        NanoLLaDAGenerationConfig(do_sample=True, temperature=0)


def test_a_streamer_may_ask_for_confidence():
    """Before each draft: the largest probability at every position that was open, in the draft's columns."""

    class Watcher(Recorder):
        def __init__(self):
            super().__init__()
            self.confidence = []

        def put_confidence(self, value):
            self.confidence.append(value)

    model = build(block_length=4, eos_token_id=None)
    watcher = Watcher()
    model.generate(PROMPT, max_new_tokens=7, streamer=watcher)
    assert len(watcher.confidence) == len(watcher.drafts) == 7
    before = [[3] * 7] + [draft[0] for draft in watcher.drafts]
    for confidence, draft, last in zip(watcher.confidence, watcher.drafts, before, strict=False):
        assert confidence.shape == (1, len(draft[0]))
        last = last[len(last) - len(draft[0]) :]
        decided = [index for index, (old, new) in enumerate(zip(last, draft[0], strict=True)) if old != new]
        known = confidence[0].isfinite().nonzero()[:, 0].tolist()
        assert decided == [max(known, key=lambda index: float(confidence[0, index]))]
        assert all(last[index] == 3 for index in known) and 0 < float(confidence[0, known].max()) <= 1
    first = model(torch.nn.functional.pad(PROMPT, (0, 3), value=3)).logits[0, 5:].softmax(-1).amax(-1)
    torch.testing.assert_close(watcher.confidence[0][0, :3], first)
