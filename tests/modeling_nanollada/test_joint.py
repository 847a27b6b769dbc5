"""LLaDA 2.1's loop: its tokens are those of the plain loop that was written from the report, whatever the batch."""

import math
import random

import pytest
import torch
from generation_models import EOS, MASK, PROMPT, build, left_padded
from joint_loops import CONTROLS, RUN, VOCABULARY, Table, compare, joint_block, random_run

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.joint_nanollada import joint_step, less_of_the_one_before, likeliest


@pytest.mark.parametrize("group", range(10))
def test_the_tokens_are_those_of_the_published_loop(group):
    """200 cases: circles that a budget ends, ends of text, prompts that fill a part of a block, padding."""
    spent = ended = 0
    for number in range(group, 200, 10):
        model, prompts, settings, new_tokens = random_run(number, lambda draw: 3.0)  # never proposed here
        names = {"threshold": "joint_threshold", "edit_threshold": "joint_edit_threshold", "penalty": "joint_penalty"}
        arguments = {{**names, "budget": "max_post_steps"}[name]: value for name, value in settings.items()}
        sequences, passes = compare(model, prompts, new_tokens, plain_joint, settings, **arguments)
        assert not torch.isin(sequences, torch.tensor([MASK, *CONTROLS.values()])).any()
        spent += max(passes) > settings["budget"]
        ended += bool((sequences == EOS).any())
    assert spent and ended


def plain_joint(read, row, block, **settings):
    """The plain loop on a vocabulary without control tokens."""

    def without(row):
        controls = CONTROLS.values()
        return [[-math.inf if t in controls else value for t, value in enumerate(scores)] for scores in read(row)]

    return joint_block(without, row, block, **settings)


def test_the_steps_of_an_example():
    """By hand: one above the threshold, or the surest; edits in the same step; a token that is likeliest stays."""
    ids = torch.tensor([[7, MASK, MASK, 8, 9], [7, MASK, MASK, 8, 9], [7, 5, 6, 8, 9]])
    tokens = torch.tensor([[4, 5, 6, 8, 10]] * 3)
    rows = [[0.9, 0.6, 0.4, 0.9, 0.3], [0.9, 0.3, 0.4, 0.9, 0.3], [0.9, 0.9, 0.9, 0.9, 0.3]]
    probability = torch.tensor(rows, dtype=torch.double)
    block = torch.tensor([[False, True, True, True, True]] * 3)  # the first is the prompt's
    new = joint_step(ids, ids == MASK, block, tokens, probability, 0.5, 0.0)
    assert new.tolist() == [[7, 5, MASK, 8, 10], [7, MASK, 6, 8, 10], [7, 5, 6, 8, 10]]
    assert joint_step(ids, ids == MASK, block, tokens, probability, 0.5, 0.3)[2].tolist() == ids[2].tolist()


def test_the_penalty_falls_on_the_token_before():
    logits, before = torch.zeros(3, VOCABULARY), torch.tensor([5, -1, 0])
    expected = logits.clone()
    expected[0, 5] = expected[2, 0] = -2
    assert torch.equal(less_of_the_one_before(logits, before, 2.0), expected)
    tokens, probability = likeliest(expected, torch.tensor([[True, False], [True, True]]))
    assert tokens.tolist() == [[0, 0], [0, 1]]
    least = 1 / (VOCABULARY - 1 + math.exp(-2))
    assert probability[:, 0].tolist() == pytest.approx([least, 1 / VOCABULARY])


@pytest.mark.parametrize("number", range(30))
def test_cached_equals_uncached(number):
    draw = random.Random(number)
    model = build(number, block_length=draw.choice((2, 4, 8)), num_hidden_layers=2, initializer_range=0.3)
    ids, mask = left_padded([[draw.randrange(4, 64) for _ in range(draw.randrange(1, 10))] for _ in range(3)])
    run = {"attention_mask": mask, "max_new_tokens": draw.randrange(1, 17), "joint_threshold": draw.choice((0.1, 0.4))}
    run |= {"joint_edit_threshold": draw.choice((0.0, 0.2)), "cfg_scale": draw.choice((0.0, 0.5)), "max_post_steps": 4}
    run |= RUN | {"early_stop": draw.random() < 0.5}
    static = {"cache_implementation": "static"} if number % 3 == 0 else {}
    plain, cached = model.generate(ids, **run, use_cache=False), model.generate(ids, **run, **static)
    for name in ("sequences", "canvas", "commit_steps", "tokens_per_forward"):
        assert torch.equal(plain[name], cached[name]), name
    assert torch.equal(plain.sequences[:, : ids.shape[1]], ids)


def test_all_edits_at_once_go_in_circles_and_the_budget_ends_them():
    """Two neighbours that each want what the other has: 2-cycles, which one edit at a time would not have."""
    model, forwards = Table(2, states=1, scale=0.0, stay=-9.0), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for budget in (1, 5, 16):
        forwards.clear()
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, joint_threshold=0.0, max_post_steps=budget, **RUN)
        assert len(forwards) == 1 + budget + 1  # the draft, the edits, and one that finds the budget spent


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"joint_threshold": 1.5}, r"`joint_threshold` must be a number in \[0, 1\], got 1.5"),
        ({"joint_edit_threshold": 0.5}, "`joint_edit_threshold` needs `joint_threshold`, got 0.5"),
        ({"joint_threshold": 0.5, "threshold": 0.5}, "Only one of .*`joint_threshold`.* may be set"),
        ({"joint_threshold": 0.5, "temperature": 1.0}, "`joint_threshold` .*`temperature` must be 0, got 1.0"),
        ({"joint_threshold": 0.5, "repetition_penalty": 1.2}, "`repetition_penalty` .* must be unset .*got 1.2"),
        ({"joint_threshold": 0.5, "edit_threshold": 0.1}, "`joint_threshold` edits by itself: .*got 0.1"),
        ({"joint_threshold": 0.5, "max_commits": 2}, "`joint_threshold` decides itself what a step commits"),
        ({"joint_threshold": 0.5, "eos_policy": "cut"}, "`eos_policy` must not be 'cut', got 'cut'"),
        ({"joint_threshold": 0.5, "steps": 4}, "`steps` .*got 4"),
        ({"joint_threshold": 0.5, "position_score": "margin"}, "`position_score` needs .*got 'margin'"),
        ({"max_post_steps": 4}, "`max_post_steps` needs .*got 4"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        build().generate(PROMPT, max_new_tokens=4, **settings)
    if "needs" not in match:
        with pytest.raises(ValueError, match=match):
            NanoLLaDAGenerationConfig(**settings)
