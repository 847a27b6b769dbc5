"""`canvas` and `commit_steps` of `generate`: what each step decided, against the drafts that a streamer saw."""

import pytest
import torch
from generation_models import EOS, MASK, SHAPE, VOCABULARY, Eager, Recorder, build, eos_model, left_padded, seeded

from nanollada.modeling_nanollada import NanoLLaDAConfig

ROWS = [[4, 5, 6, 7], [8, 9], [10, MASK, 11, MASK, 12], [13]]  # one with masks inside its prompt
CASES = {
    "one a step": {},
    "two steps": {"steps": 2},
    "threshold": {"threshold": 0.3},
    "blocks": {"block_length": 2},
    "growing": {"block_length": 2, "grow_length": True},
    "guidance": {"cfg_scale": 0.8},
    "random": {"remasking": "random"},
    "cut": {"eos_policy": "cut", "eos_token_id": list(range(4, 24))},
    "stops": {"eos_policy": "none", "eos_token_id": list(range(4, 24))},
    "goes on": {"early_stop": False, "eos_token_id": list(range(4, 24))},
    "remdm": {"remdm": "rescale", "remdm_eta": 0.7, "steps": 9},
}


def by_drafts(model, row, **run):
    """The steps of one row, read off its drafts: when a position got the token that it kept."""
    streamer = Recorder()
    out = model.generate(torch.tensor([row]), streamer=streamer, **run)
    last = [MASK if i >= len(row) else row[i] for i in range(out.sequences.shape[1])]
    steps = [-1] * len(last)
    for number, draft in enumerate(streamer.drafts):
        now = last[: len(last) - len(draft[0])] + draft[0]
        for column, (before, after) in enumerate(zip(last, now, strict=True)):
            if before != after:
                steps[column] = -1 if after == MASK else number
        last = now
    return out, last, steps


@pytest.mark.parametrize("grid", [None, 4])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_drafts(name, grid):
    """Row by row, then in a batch with left padding, where rows take different numbers of steps."""
    model, settings = build(1, block_length=grid), {"eos_token_id": EOS, **CASES[name]}
    draws = name in ("random", "remdm")
    ids, attention_mask = left_padded(ROWS)
    run = {"max_new_tokens": 7, "return_dict_in_generate": True, **settings}
    batch = model.generate(ids, attention_mask=attention_mask, generator=seeded(2), **run)
    assert batch.canvas.shape == batch.commit_steps.shape and batch.canvas.shape[1] >= ids.shape[1] + 7
    for place, row in enumerate(ROWS):
        out, ids_seen, steps = by_drafts(model, row, generator=seeded(3), **run)
        length, width = len(steps), out.canvas.shape[1]
        assert out.canvas[0, :length].tolist() == ids_seen and out.commit_steps[0, :length].tolist() == steps
        assert (out.canvas[0, length:] == MASK).all() and (out.commit_steps[0, length:] == -1).all()
        assert width == (length if grid is None else -(-length // grid) * grid)
        if not draws:  # alone or beside others
            start = ids.shape[1] - len(row)
            assert batch.commit_steps[place, :start].tolist() == [-1] * start
            for field in ("canvas", "commit_steps"):
                assert torch.equal(batch[field][place, start : start + width], out[field][0])


@pytest.mark.parametrize("grid", [None, 4])
def test_a_decoder_with_a_cache_reports_the_same(grid):
    model, (ids, attention_mask) = build(4, block_length=grid), left_padded(ROWS)
    run = {"attention_mask": attention_mask, "max_new_tokens": 6, "return_dict_in_generate": True, "threshold": 0.2}
    plain, cached = (model.generate(ids, use_cache=cache, **run) for cache in (False, True))
    assert torch.equal(plain.canvas, cached.canvas) and torch.equal(plain.commit_steps, cached.commit_steps)


def test_what_lies_behind_an_end_stays_in_the_canvas():
    """Decided before the end of text came: in the canvas. Never decided: the mask token, and no step."""
    model = Eager(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE))  # ends of text at columns 5, 7, 9, then the others
    run = {"max_new_tokens": 6, "eos_token_id": EOS, "return_dict_in_generate": True}
    prompt = torch.tensor([[4, 5, 6, 7]])
    out = model.generate(prompt, **run)
    assert out.sequences[0, 4:].tolist() == [14, EOS, 0, 0, 0, 0]
    assert out.canvas[0, 4:].tolist() == [14, EOS, MASK, EOS, MASK, EOS]
    assert out.commit_steps[0].tolist() == [-1] * 4 + [3, 0, -1, 1, -1, 2]
    out = model.generate(prompt, eos_policy="cut", **run)
    assert out.canvas[0, 4:].tolist() == [14, EOS] + [MASK] * 4
    assert out.commit_steps[0].tolist() == [-1] * 4 + [1, 0] + [-1] * 4
    out = model.generate(prompt, early_stop=False, **run)
    assert out.commit_steps[0].tolist() == [-1] * 4 + [3, 0, 4, 1, 5, 2]
    assert out.canvas[0, 4:].tolist() == [14, EOS, 16, EOS, 18, EOS] and not (out.sequences == MASK).any()


def test_a_row_counts_its_own_steps():
    """A row that ended does not go on counting, nor does one that begins a block later."""
    model = eos_model(6)
    ids, attention_mask = left_padded([[4, 5, 6, 7], [4, 5]])
    run = {"max_new_tokens": 4, "block_length": 2, "eos_token_id": EOS, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=attention_mask, **run)
    assert out.commit_steps.tolist() == [[-1] * 4 + [0, 1, 2, -1]] * 2
    filled = model.generate(torch.tensor([[4, MASK, 6, MASK]]), max_new_tokens=0, return_dict_in_generate=True)
    assert filled.commit_steps.tolist() == [[-1, 0, -1, 1]]
