"""Edits of real models: exact caches, rows of a batch, ends of text, prompts, and settings that have no use."""

import random

import pytest
import torch
from edit_cases import Drafts
from generation_models import EOS, MASK, PAD, PROMPT, VOCABULARY, build, left_padded, seeded

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM, NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.sampling_nanollada import Sampler

EDITS = {"edit_threshold": 0.0, "edit_margin": 0.0}


def random_case(draw):
    """A model in blocks, rows of different lengths, and settings of edits that work with it."""
    size = draw.choice((3, 4, 8))
    model = build(draw.randrange(6), block_length=size, num_key_value_heads=draw.choice((1, 2)))
    rows = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, 9))] for _ in range(draw.randrange(1, 4))]
    settings = {"max_new_tokens": draw.randrange(2, 14), "steps": draw.choice((1, 2, None)), **EDITS}
    settings |= {"eos_policy": draw.choice(("none", "cut", "last")), "early_stop": True, "eos_token_id": [EOS, 40, 41]}
    settings |= {"cfg_scale": draw.choice((0.0, 0.0, 1.5)), "max_post_steps": draw.choice((1, 3, 16))}
    settings |= draw.choice(({"max_edits": draw.choice((1, 2, 8))}, {"edit_rule": "remask"}))
    if draw.random() < 0.3:
        settings |= {"temperature": 1.0, "max_edits": None, "edit_margin": None}
    settings |= {"cache_implementation": draw.choice(("dynamic", "static")), "block_length": draw.choice((None, size))}
    return model, rows, {name: value for name, value in settings.items() if value is not None}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_cached_is_uncached_in_fifty_random_cases(seed):
    draw, edited = random.Random(seed), 0
    for _ in range(50):
        model, rows, settings = random_case(draw)
        ids, visible = left_padded(rows)
        given = {"attention_mask": visible, "return_dict_in_generate": True, **settings}
        cached = model.generate(ids, generator=seeded(1), **given)
        given |= {"use_cache": False}
        given.pop("cache_implementation")
        plain = model.generate(ids, generator=seeded(1), **given)
        assert torch.equal(cached.canvas, plain.canvas) and torch.equal(cached.commit_steps, plain.commit_steps)
        assert torch.equal(cached.sequences, plain.sequences)
        assert torch.equal(cached.tokens_per_forward, plain.tokens_per_forward)
        without = {name: value for name, value in given.items() if "edit" not in name and name != "max_post_steps"}
        edited += not torch.equal(plain.canvas, model.generate(ids, generator=seeded(1), **without).canvas)
        new = plain.sequences[:, ids.shape[1] :]
        assert torch.equal(plain.sequences[:, : ids.shape[1]], ids)  # prompts are as they were
        assert not (new == MASK).any()
        for row in new.tolist():
            end = next((i for i, token in enumerate(row) if token in (EOS, 40, 41)), len(row))
            assert set(row[end + 1 :]) <= {PAD}
    assert edited > 25


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("own", [{}, {"max_edits": 3}, {"edit_rule": "remask"}], ids=["one", "three", "remask"])
def test_a_rows_edits_change_no_other_row(own, block_length):
    model = build(2, block_length=block_length)
    draw = random.Random(5)
    rows = [[draw.randrange(4, VOCABULARY) for _ in range(length)] for length in (1, 3, 5, 8)]
    ids, visible = left_padded(rows)
    given = {"max_new_tokens": 9, "steps": 2, "return_dict_in_generate": True, **EDITS, **own}
    together = model.generate(ids, attention_mask=visible, **given)
    plain = model.generate(ids, attention_mask=visible, max_new_tokens=9, steps=2)
    assert (plain != together.sequences).any(1).all()  # all rows were edited
    for row, tokens in enumerate(rows):
        alone = model.generate(torch.tensor([tokens]), **given)
        assert torch.equal(together.sequences[row, -9:], alone.sequences[0, -9:])
        assert together.tokens_per_forward[row] == alone.tokens_per_forward[0]


def test_off_is_what_it_was_and_nothing_is_asked(monkeypatch):
    model = build(1)
    before = model.generate(PROMPT, max_new_tokens=8, threshold=0.5)
    monkeypatch.setattr("nanollada.modeling_nanollada.editing_nanollada.Editor", None)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, threshold=0.5, edit_threshold=None), before)
    with pytest.raises(TypeError):
        model.generate(PROMPT, max_new_tokens=8, threshold=0.5, edit_threshold=0.5)


def test_where_nothing_fires_edits_cost_one_forward_pass():
    model = build(1)
    given = {"max_new_tokens": 8, "steps": 4, "return_dict_in_generate": True}
    plain, looked = (
        model.generate(PROMPT, **given),
        model.generate(PROMPT, edit_threshold=0.0, edit_margin=99.0, **given),
    )
    assert torch.equal(plain.sequences, looked.sequences) and torch.equal(plain.commit_steps, looked.commit_steps)
    assert 8 / plain.tokens_per_forward == 4 and 8 / looked.tokens_per_forward == 5


def test_streamers_get_each_edit_and_the_step_of_a_token_is_its_last():
    model, drafts = build(3), Drafts()
    given = {"max_new_tokens": 12, "steps": 1, "return_dict_in_generate": True, **EDITS}
    out = model.generate(PROMPT, streamer=drafts, **given)
    rows = torch.cat(drafts.rows)[:, -12:]  # [S, 12]
    assert len(rows) == 12 / out.tokens_per_forward > 2
    for place in range(12):
        changed = (rows[1:, place] != rows[:-1, place]).nonzero()
        assert out.commit_steps[0, 5 + place] == (int(changed.max()) + 1 if len(changed) else 0)
    assert (out.commit_steps[0, 5:] > 0).any()


@pytest.mark.parametrize("policy", ["none", "cut", "last"])
def test_an_end_is_neither_made_nor_taken_and_nothing_changes_behind_it(policy, monkeypatch):
    model, write = build(4), torch.tensor([9, 10, 11, EOS, 12, 13])
    decide = Sampler.decide

    def draft(self, step, ids):
        decision = decide(self, step, ids)
        decision.tokens = write.expand_as(step.ids).where(decision.selected, decision.tokens)
        return decision

    monkeypatch.setattr(Sampler, "decide", draft)
    read, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **kw: read.append(kw["input_ids"]) or forward(self, **kw))
    for own in ({"max_edits": 6}, {"edit_rule": "remask"}, {"temperature": 1.0, "edit_margin": None}):
        given = {**EDITS, "max_new_tokens": 6, "eos_policy": policy, "steps": 1, "early_stop": None} | own
        given = {name: value for name, value in given.items() if value is not None}
        out = model.generate(PROMPT, return_dict_in_generate=True, generator=seeded(), **given)
        new = out.canvas[0, 5:]
        assert not torch.equal(new[:3], write[:3]) and EOS not in new[:3] and PAD not in new[:3]
        assert new[3] == EOS
        assert len(read) > 2 and all(
            (ids[:, 9:] == MASK).all() for ids in read
        )  # nor does it say what stands before it
        left = new[4:] if policy != "cut" else torch.where(new[4:] == MASK, write[4:], new[4:])
        assert torch.equal(left, write[4:])


def test_masks_of_a_prompt_are_edited_and_its_words_are_not():
    model = build(5)
    ids = torch.tensor([[4, MASK, MASK, 5, MASK, 6]])
    drafts = Drafts()
    out = model.generate(ids, max_new_tokens=0, steps=1, streamer=drafts, **EDITS)
    assert torch.equal(out[ids != MASK], ids[ids != MASK]) and not (out == MASK).any()
    assert len(drafts.rows) > 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"edit_threshold": 1.0}, r"`edit_threshold` must be a number in \[0, 1\), got 1.0"),
        ({"edit_margin": 0.5}, "`edit_margin` needs `edit_threshold`, got 0.5"),
        ({"max_edits": 2}, "`max_edits` needs `edit_threshold`, got 2"),
        ({"edit_rule": "remask"}, "`edit_rule` needs `edit_threshold`, got 'remask'"),
        ({"max_post_steps": 4}, "`max_post_steps` needs `edit_threshold` or `joint_threshold`, got 4"),
        ({"edit_threshold": 0, "max_edits": 0}, "`max_edits` must be an integer >= 1, got 0"),
        ({"edit_threshold": 0, "max_post_steps": 0}, "`max_post_steps` must be an integer >= 1, got 0"),
        (
            {"edit_threshold": 0, "edit_rule": "swap"},
            "`edit_rule` must be one of .*'remask'.*, got 'swap'",
        ),
        (
            {"edit_threshold": 0, "edit_rule": "remask", "max_edits": 2},
            "`max_edits` is for greedy edits by `edit_rule`",
        ),
        ({"edit_threshold": 0, "temperature": 1.0, "edit_margin": 1.0}, "`edit_margin` is for greedy edits: it needs"),
        ({"edit_threshold": 0, "temperature": 1.0, "max_edits": 2}, "`max_edits` is for greedy edits"),
        ({"edit_threshold": 0.5, "temperature": 1.0}, "`edit_threshold` must be 0 where tokens are drawn, .*got 0.5"),
        ({"edit_threshold": 0, "repetition_penalty": 1.2}, "`repetition_penalty` counts the token that .*got 1.2"),
        ({"edit_threshold": 0, "joint_threshold": 0.5}, "`joint_threshold` edits by itself: `edit_threshold` must be"),
    ],
)
def test_what_has_no_use_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        build().generate(PROMPT, max_new_tokens=4, **settings)


def test_settings_are_saved_and_a_call_outranks_them(tmp_path):
    model = build(6, block_length=4)
    model.generation_config = NanoLLaDAGenerationConfig(
        edit_threshold=0.1, max_edits=2, max_post_steps=3, eos_token_id=EOS, pad_token_id=PAD
    )
    model.save_pretrained(tmp_path)
    again = NanoLLaDAForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    saved = again.generation_config
    assert (saved.edit_threshold, saved.max_edits, saved.max_post_steps, saved.edit_rule) == (0.1, 2, 3, None)
    given = {"max_new_tokens": 8, "steps": 1}
    assert torch.equal(again.generate(PROMPT, **given), model.generate(PROMPT, **given))
    model.generation_config = NanoLLaDAGenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    # A call that draws can't have a saved threshold: it draws as if there were no edits.
    sampled = {**given, "temperature": 1.0}
    assert torch.equal(
        again.generate(PROMPT, generator=seeded(), **sampled), model.generate(PROMPT, generator=seeded(), **sampled)
    )
