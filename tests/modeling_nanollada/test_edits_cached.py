"""Edits, whatever the batch and the cache: 200 random cases, the greedy ones against a plain loop of each row."""

import random

import pytest
import torch
from edit_loops import CONTROLS, PlainEdits
from generation_models import EOS, MASK, PAD, build, left_padded, seeded

from nanollada.modeling_nanollada import prediction_nanollada

ENDS = ([EOS], [EOS, *range(40, 46)])
CASES, GROUPS = 200, 10


def random_case(number):
    """A model, prompts and settings: blocks and none, masks inside prompts, guidance, both rules, ends of text."""
    draw = random.Random(number)
    grid = draw.choice((None, 2, 4, 4, 6, 8))
    shape = {"block_length": grid, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
    controls = {"delete_token_id": CONTROLS[0], "insert_token_id": CONTROLS[1]}
    heads = {"num_key_value_heads": draw.choice((1, 2, 4))}
    model = build(number, initializer_range=draw.choice((0.3, 0.6)), **shape, **controls, **heads)
    rows = [[draw.randrange(4, 62) for _ in range(draw.randrange(1, 9))] for _ in range(draw.choice((2, 3)))]
    if draw.random() < 0.3:
        for row in rows:
            row[draw.randrange(len(row))] = MASK
    new_tokens = draw.randrange(2, 9)
    sizes = [size for size in range(2, (grid or 8) + 1) if grid is None or grid % size == 0]
    settings = {
        "block_length": draw.choice(sizes),
        "steps": draw.choice((1, 1, 2)),
        "cfg_scale": draw.choice((0.0, 0.7)),
    }
    settings |= {"eos_policy": draw.choice(("none", "last", "cut", "cut", "forbid"))}
    if settings["eos_policy"] != "cut":
        settings["early_stop"] = draw.choice((True, False))
    settings |= {"edit_rule": draw.choice(("replace", "remask")), "max_post_steps": draw.choice((1, 3, 6))}
    if draws := draw.random() < 0.25:
        settings |= {"temperature": 1.0, "edit_threshold": 0.0}
    else:
        settings |= {"edit_threshold": draw.choice((0.0, 0.0, 0.3)), "edit_margin": draw.choice((0.0, 0.7))}
        if settings["edit_rule"] == "replace":
            settings["max_edits"] = draw.choice((1, 1, 2, 8))
    return model, rows, new_tokens, draw.choice(ENDS), settings, draws


@pytest.fixture
def logits(monkeypatch):
    """The logits of every step, by predictor."""
    found = {"CachedBlocks": [], "WholeRows": []}
    for name in found:
        kind = getattr(prediction_nanollada, name)

        def predict(self, active, own=kind.predict, name=name):
            found[name].append(own(self, active))
            return found[name][-1]

        monkeypatch.setattr(kind, "predict", predict)
    return found


def check_output(out, ids, mask, ends, settings):
    """What was given is as it was; what was written is text up to an end, then pads."""
    given = (ids != MASK) | ~mask.bool()
    assert torch.equal(out.sequences[:, : ids.shape[1]][given], ids[given])
    new = out.sequences[:, ids.shape[1] :]
    assert not torch.isin(new, torch.tensor([MASK, *CONTROLS])).any()
    is_end = torch.isin(new, torch.tensor(ends))
    behind = is_end.cumsum(1) - is_end.long() > 0
    assert (new[behind] == PAD).all()
    assert settings["eos_policy"] != "forbid" or not is_end.any()


def check_against_plain(model, rows, new_tokens, ends, settings, out):
    """Each row of the batch: its tokens, its canvas, when each was written, and its passes. Gives its edits."""
    edits = 0
    for place, row in enumerate(rows):
        plain = PlainEdits(model, row, new_tokens, ends, **settings)
        start, width = out.sequences.shape[1] - len(row) - new_tokens, len(plain.row)
        context = (place, row, settings, ends)
        assert out.sequences[place, start:].tolist() == plain.output(), context
        assert out.canvas[place, start : start + width].tolist() == plain.row, context
        assert out.commit_steps[place, start : start + width].tolist() == plain.steps, context
        assert float(out.tokens_per_forward[place]) == pytest.approx(plain.kept() / plain.passes), context
        edits += plain.edits
    return edits


@pytest.mark.parametrize(
    "group", [*range(3), *(pytest.param(group, marks=pytest.mark.slow) for group in range(3, GROUPS))]
)
def test_cached_equals_uncached_equals_each_row_alone(logits, group):
    edits = 0
    for number in range(group, CASES, GROUPS):
        model, rows, new_tokens, ends, settings, draws = random_case(number)
        ids, mask = left_padded(rows)
        run = {"attention_mask": mask, "max_new_tokens": new_tokens, "pad_token_id": PAD, "eos_token_id": ends}
        run |= {"return_dict_in_generate": True, **settings}
        if model.config.block_length and number % 3 == 0:
            run["cache_implementation"] = "static"
        cached = model.generate(ids, generator=seeded(number), **run)
        if model.config.block_length:
            run.pop("cache_implementation", None)
            plain = model.generate(ids, generator=seeded(number), use_cache=False, **run)
            for name in ("sequences", "canvas", "commit_steps", "tokens_per_forward"):
                assert torch.equal(cached[name], plain[name]), (number, name, settings)
            assert len(logits["WholeRows"]) == len(logits["CachedBlocks"]) > 0
            for expected, found in zip(logits["WholeRows"], logits["CachedBlocks"], strict=True):
                torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        check_output(cached, ids, mask, ends, settings)
        if not draws:
            edits += check_against_plain(model, rows, new_tokens, ends, settings, cached)
        for kept in logits.values():
            kept.clear()
    assert edits > 5, "the cases need edits"
