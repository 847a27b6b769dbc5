"""Where rows end: nothing is decided behind an EOS, blocks that the length cuts, canvases longer than in training."""

import itertools
import json
import logging
from dataclasses import replace

import pytest
import torch
from generation_models import (
    EOS,
    MASK,
    PAD,
    PROMPT,
    SHAPE,
    VOCABULARY,
    Oracle,
    build,
    drafts,
    left_padded,
    reference_greedy,
    seeded,
)
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAGenerationConfig,
)
from nanollada.modeling_nanollada.canvas_nanollada import Canvas
from nanollada.modeling_nanollada.sampling_nanollada import Sampler

# ---- the law of `eos_policy="cut"`

LENGTH, KINDS = 5, torch.tensor([4, 5, EOS])
FIRST = torch.tensor([0.45, 0.45, 0.1], dtype=torch.double)
NEXT = torch.tensor([[0.35, 0.25, 0.4], [0.25, 0.35, 0.4], [0.05, 0.1, 0.85]], dtype=torch.double)
ABSORBING = torch.cat((NEXT[:2], torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.double)))
ROWS = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))


def chain(after):
    """The probability of each of `ROWS`; what cannot be is next to impossible, so that the oracle knows an answer."""
    law = FIRST[ROWS[:, 0]]
    for column in range(1, LENGTH):
        law = law * after[ROWS[:, column - 1], ROWS[:, column]]
    return law + 1e-300


def kept(rows):
    """Texts up to their EOS, as tuples."""
    texts = []
    for row in rows.tolist():
        texts.append(tuple(row[: row.index(EOS) + 1] if EOS in row else row))
    return texts


def exact_law(monkeypatch, after, **settings):
    """
    `generate` on every text at once: each row's draws are told, and their probabilities multiplied. Rows whose draws
    are the same are one way of decoding.

    Returns:
        Total variation of the kept texts from the chain's, and the mean number of forward passes.
    """
    scripts, law = KINDS[ROWS], chain(after)
    chances, passes = torch.ones(len(scripts), dtype=torch.double), torch.zeros(len(scripts))
    drawn, steps = torch.full(scripts.shape, -1), []
    decide, apply = Sampler.decide, Canvas.apply

    def told(canvas, rows, columns, decision):
        selected, wanted, step = decision.selected, scripts[rows, columns.start - 1 : columns.stop - 1], steps[-1]
        own = step.logits.softmax(-1, dtype=torch.double).gather(1, wanted[step.active][:, None])[:, 0]
        chances[rows] *= step.spread(own, 1.0).where(selected, 1.0).prod(1)
        passes[rows] += 1
        ways = drawn[rows, columns.start - 1 : columns.stop - 1]
        drawn[rows, columns.start - 1 : columns.stop - 1] = torch.where(selected, wanted, ways)
        apply(canvas, rows, columns, replace(decision, tokens=wanted))

    monkeypatch.setattr(Sampler, "decide", lambda self, step, ids: steps.append(step) or decide(self, step, ids))
    monkeypatch.setattr(Canvas, "apply", told)
    model = Oracle(scripts, law)
    run = {"max_new_tokens": LENGTH, "temperature": 1.0, "pad_token_id": PAD, "eos_token_id": EOS, **settings}
    out = model.generate(torch.full((len(scripts), 1), 1), **run)[:, 1:]
    assert kept(out) == kept(scripts)
    ways = {tuple(way): place for place, way in enumerate(drawn.tolist())}
    assert float(chances[list(ways.values())].sum()) == pytest.approx(1, abs=1e-6)
    found, truth = {}, {}
    for place, text in enumerate(kept(scripts)):
        truth[text] = truth.get(text, 0) + float(law[place])
        found[text] = found.get(text, 0) + float(chances[place]) * (ways[tuple(drawn[place].tolist())] == place)
    distance = sum(abs(found[text] - truth[text]) for text in truth) / 2
    return distance, float((chances * passes)[list(ways.values())].sum())


@pytest.mark.parametrize("after", [ABSORBING, NEXT], ids=["padded with EOS", "text behind an EOS"])
@pytest.mark.parametrize("settings", [{}, {"position_score": "entropy"}, {"block_length": 4}], ids=str)
def test_nothing_behind_an_end_is_decided_at_no_cost_to_the_law(after, settings):
    length = float(sum(len(text) * chance for text, chance in zip(kept(KINDS[ROWS]), chain(after), strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        distance, passes = exact_law(patch, after, **settings)
    assert distance < 1e-6 and passes > length + 0.2
    with pytest.MonkeyPatch.context() as patch:
        distance, fewer = exact_law(patch, after, eos_policy="cut", **settings)
    assert distance < 1e-6 and fewer < passes - 0.2, "one token a step is exact, and this with fewer steps"


def test_the_enumeration_sees_a_law_that_is_wrong(monkeypatch):
    assert exact_law(monkeypatch, NEXT, steps=2)[0] > 0.05


class Trained(NanoLLaDAForMaskedLM):
    """Knows that an answer of `length` tokens ends with EOS to the row's end, and is the surer the farther right."""

    def __init__(self, length, prompt_length, **config):
        super().__init__(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE, **config))
        self.first_end = prompt_length + length
        self.widths = []

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        self.widths.append(input_ids.shape[1])
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        token = torch.where(place >= self.first_end, EOS, 10 + place)
        logits = torch.zeros(*token.shape, VOCABULARY).scatter_(-1, token[..., None], 8.0 + place[..., None] / 8)
        return MaskedLMOutput(logits=logits[logits_to_keep])


@pytest.mark.parametrize("settings", [{}, {"block_length": 8}, {"block_length": 8, "grow_length": True}], ids=str)
def test_an_answer_takes_a_pass_a_token(settings):
    answers = []
    for policy, passes in (("none", None), ("cut", 12)):
        model = Trained(11, PROMPT.shape[1])
        answers.append(model.generate(PROMPT, max_new_tokens=32, eos_policy=policy, **settings))
        assert policy == "none" or len(model.widths) == passes
        assert policy == "cut" or len(model.widths) == (16 if settings else 32)
    assert torch.equal(*answers) and answers[0][0, 16:].tolist() == [EOS] + [PAD] * 20


def test_a_cut_row_of_a_batch_leaves_the_others_alone():
    model = build(5, eos_token_id=EOS)
    rows = [[4, 5, 6], [7, 8], [9, 10, 11, 12], [13]]
    ids, attention_mask = left_padded(rows)
    run = {"max_new_tokens": 13, "block_length": 4, "eos_token_id": list(range(4, 14)), "eos_policy": "cut"}
    result = model.generate(ids, attention_mask=attention_mask, return_dict_in_generate=True, **run)
    ends = (result.sequences[:, ids.shape[1] :] != PAD).sum(1)
    assert ends.unique().numel() > 1, "the case needs rows of different lengths"
    for place, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), return_dict_in_generate=True, **run)
        assert torch.equal(result.sequences[place, 4 - len(row) :], alone.sequences[0])
        assert float(result.tokens_per_forward[place]) == float(alone.tokens_per_forward[0])


def test_an_end_in_a_hole_of_the_prompt_cuts_nothing():
    model = Trained(0, 1)  # EOS everywhere behind the first token
    out = model.generate(torch.tensor([[4, MASK, 6, 7]]), max_new_tokens=4, eos_policy="cut")
    assert out.tolist() == [[4, EOS, 6, 7, EOS, PAD, PAD, PAD]]


def test_what_is_cut_is_open_in_drafts_and_never_put():
    streamer = drafts(Trained(2, 5), PROMPT, max_new_tokens=8, eos_policy="cut")
    assert [draft[0].count(MASK) for draft in streamer.drafts] == [7, 6, 5]
    assert streamer.puts == [PROMPT.tolist(), [[15, 16, EOS]]]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"remdm": "cap"}, "`remdm` decides itself what a step commits: `eos_policy` must not be 'cut', got 'cut'"),
        (
            {"early_stop": False},
            "`early_stop` needs another `eos_policy` than 'cut', got False with `eos_policy` 'cut'",
        ),
    ],
)
def test_what_cannot_go_with_cut(settings, match):
    for call in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match=match):
            build().generate(PROMPT, max_new_tokens=4, eos_policy="cut", **settings, **call)
    with pytest.raises(ValueError, match="`eos_policy` must be 'none' without an `eos_token_id`, got 'cut'"):
        build(eos_token_id=None).generate(PROMPT, max_new_tokens=4, eos_policy="cut")


# ---- a last, shorter block


@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 3}, {"steps": 7, "position_score": "margin"}, {"eos_policy": "cut"}, {"cfg_scale": 0.5}],
    ids=str,
)
def test_37_tokens_in_blocks_of_16_equal_the_plain_loop(settings):
    model = build(2)
    prompts = [[4, 5, 6, 7, 8], [9, 10]]
    ids, attention_mask = left_padded(prompts)
    out = model.generate(ids, attention_mask=attention_mask, max_new_tokens=37, block_length=16, **settings)
    assert out.shape[1] == ids.shape[1] + 37
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        assert row[ids.shape[1] - len(prompt) :] == reference_greedy(model, prompt, 37, 16, **settings)


def test_the_shorter_block_has_its_own_shares():
    run = {"max_new_tokens": 10, "block_length": 4, "eos_policy": "forbid"}
    for settings, masks in (
        ({"steps": 3}, [8, 7, 6, 4, 3, 2, 1, 0]),  # 4 masks in 3 steps: 2, 1, 1; of 2 masks one a step
        ({"commit_schedule": "ratio", "steps": 2}, [8, 6, 4, 2, 1, 0]),
        ({"commit_schedule": "ramp", "ramp_start": 0.5, "ramp_end": 0.5}, [8, 7, 6, 4, 3, 2, 1, 0]),
    ):
        streamer = drafts(build(), PROMPT, **run, **settings)
        assert [draft[0].count(MASK) for draft in streamer.drafts] == masks, settings


def test_a_block_longer_than_the_text_is_one_block():
    model = build()
    for settings in ({}, {"grow_length": True}, {"approximate_cache": "dual"}, {"temperature": 1.0}):
        long = model.generate(PROMPT, max_new_tokens=6, block_length=100, generator=seeded(), **settings)
        settings.pop("approximate_cache", None)  # of one block, its first step reads all: what follows sees less
        whole = model.generate(PROMPT, max_new_tokens=6, generator=seeded(), **settings)
        assert torch.equal(long, whole) and long.shape == (1, 11)
    assert model.generate(torch.tensor([[4, MASK]]), max_new_tokens=0, block_length=8).shape == (1, 2)


@pytest.mark.parametrize("name", ["prefix", "dual"])
def test_frozen_contexts_of_a_shorter_block(name):
    """With one step a block nothing is frozen; with more, the last block is that of a text that ends there."""
    model = build(num_hidden_layers=2)
    run = {"max_new_tokens": 10, "block_length": 4, "eos_policy": "forbid"}
    for settings in ({}, {"cache_implementation": "static"}):
        frozen = model.generate(PROMPT, **run, steps=1, approximate_cache=name, **settings)
        assert torch.equal(frozen, model.generate(PROMPT, **run, steps=1))
        frozen = model.generate(PROMPT, **run, approximate_cache=name, **settings)
        first = frozen[:, :13]
        assert torch.equal(
            frozen, model.generate(first, max_new_tokens=2, eos_policy="forbid", approximate_cache=name, **settings)
        )


def test_rows_grow_by_a_shorter_block():
    model = Trained(99, 5)
    model.generate(PROMPT, max_new_tokens=10, block_length=4, grow_length=True, steps=1)
    assert model.widths == [9, 13, 15]


def test_the_limit_costs_no_pass_and_no_column():
    """What the model reads is what the answer needs, whatever may be written."""
    seen = {}
    for limit in (32, 64, 4096):
        model = Trained(20, 5)
        model.generate(PROMPT, max_new_tokens=limit, block_length=16, grow_length=True, threshold=0.9)
        seen[limit] = model.widths
    assert seen[32] == seen[64] == seen[4096] == [21, 37]


# ---- a canvas longer than in training


def warnings_of(caplog, model, **settings):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model.generate(PROMPT, eos_policy="forbid", steps=1, **settings)
    return [record.getMessage() for record in caplog.records if "trained_length" in record.getMessage()]


def test_a_canvas_longer_than_in_training_is_warned_of_once(caplog):
    model = build()
    model.generation_config.trained_length = 15
    assert warnings_of(caplog, model, max_new_tokens=10) == []
    (message,) = warnings_of(caplog, model, max_new_tokens=11)
    assert "is shown 16 tokens at once" in message and "had more than 15 (`trained_length`)" in message
    assert "Set `max_new_tokens` to at most 10 for this prompt, or `block_length` (16, say) with `grow_le" in message
    assert warnings_of(caplog, model, max_new_tokens=12) == []
    (message,) = warnings_of(caplog, build(), max_new_tokens=8, trained_length=4)  # the prompt alone is longer
    assert "at most" not in message and "Set `block_length`" in message


@pytest.mark.parametrize(
    ("shape", "settings", "warns"),
    [
        ({}, {}, False),
        ({}, {"trained_length": 8, "block_length": 4}, True),  # the blocks behind are seen
        ({}, {"trained_length": 8, "block_length": 4, "grow_length": True}, False),
        ({}, {"trained_length": 8, "block_length": 11, "grow_length": True}, True),  # one block: all of it is seen
        ({}, {"trained_length": 8, "grow_length": True}, True),
        ({"block_length": 4}, {"trained_length": 8}, False),
    ],
    ids=str,
)
def test_only_what_the_model_sees_is_warned_of(caplog, shape, settings, warns):
    assert bool(warnings_of(caplog, build(**shape), max_new_tokens=11, **settings)) is warns


def test_padding_is_no_part_of_a_canvas(caplog):
    ids, attention_mask = left_padded([[4, 5, 6], [7]])
    run = {"attention_mask": attention_mask, "max_new_tokens": 4}
    with caplog.at_level(logging.WARNING):
        build().generate(ids, trained_length=7, **run)
        build().generate(ids[1:], trained_length=5, **run | {"attention_mask": attention_mask[1:]})
        assert not caplog.records
        build().generate(ids, trained_length=6, **run)
    assert "shown 7 tokens" in caplog.text and "at most 3" in caplog.text


def test_the_trained_length_is_saved_and_left_alone_by_ar(tmp_path, caplog):
    model = build()
    model.generation_config.trained_length = 6
    model.save_pretrained(tmp_path)
    assert NanoLLaDAForMaskedLM.from_pretrained(tmp_path).generation_config.trained_length == 6
    assert NanoLLaDAGenerationConfig.from_pretrained(tmp_path).trained_length == 6
    with pytest.raises(ValueError, match="`trained_length` must be an integer >= 1, got 0"):
        NanoLLaDAGenerationConfig(trained_length=0)
    causal = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE))
    plain = causal.generate(PROMPT, max_new_tokens=4, do_sample=False)
    causal.save_pretrained(tmp_path / "ar")
    path = tmp_path / "ar" / "generation_config.json"
    saved = {**json.loads(path.read_text()), "trained_length": 6}
    path.write_text(json.dumps({name: saved[name] for name in saved if name != "_from_model_config"}))
    causal = NanoLLaDAForCausalLM.from_pretrained(tmp_path / "ar")
    assert causal.generation_config.trained_length == 6
    with caplog.at_level(logging.WARNING):
        assert torch.equal(plain, causal.generate(PROMPT, max_new_tokens=4, do_sample=False))
    assert "trained_length" not in caplog.text
