"""LLaDA 2.2's loop, which removes and inserts: the plain loop's tokens, an oracle's target, a constant length."""

import random
from collections import Counter

import pytest
import torch
from generation_models import EOS, MASK, PAD, PROMPT, SHAPE, build, left_padded
from joint_loops import CONTROLS, DELETE, INSERT, RUN, Table, compare, random_run, structural_block
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.structural_nanollada import restructure

ON = {"joint_threshold": 0.5, "structural_edits": True}
LENGTH, ROUNDS = 32, 4


@pytest.mark.parametrize("group", range(10))
def test_the_tokens_are_those_of_the_published_loop(group):
    """200 cases; circles and the way out of them, budgets and the last step that cleans up, ends of text, padding."""
    happened, ended = Counter(), 0
    for number in range(group, 200, 10):
        model, prompts, settings, new_tokens = random_run(number, lambda draw: draw.choice((-4.0, -1.0, 0.0, 1.0)))
        del settings["penalty"]
        names = {"threshold": "joint_threshold", "edit_threshold": "joint_edit_threshold", "budget": "max_post_steps"}
        arguments = {names[name]: value for name, value in settings.items()}
        log = {}
        sequences, _ = compare(
            model, prompts, new_tokens, structural_block, {**settings, "log": log}, structural_edits=True, **arguments
        )
        assert not torch.isin(sequences, torch.tensor([MASK, *CONTROLS.values()])).any()
        happened.update(log)
        ended += bool((sequences == EOS).any())
    assert min(happened[name] for name in ("cleaned", "loops", DELETE, INSERT)) > 0 and ended


def test_what_the_operations_do():
    """By hand: the first row has a prompt of two, the second a batch mate's columns on both sides of its block."""
    ids = torch.tensor([[4, 5, 6, 7, 8, MASK], [4, 5, 6, 7, 8, 9]])
    chosen = torch.tensor([[4, INSERT, DELETE, 10, INSERT, MASK], [INSERT, 5, INSERT, 7, DELETE, DELETE]])
    block = torch.tensor([[False, False, True, True, True, True], [False, True, True, True, True, False]])
    original = torch.tensor([[False, False, False, True, True, True], [False, True, False, True, False, False]])
    new, marks, origin = restructure(ids, chosen, block, original, MASK, (DELETE, INSERT))
    assert new.tolist() == [[4, 5, 10, MASK, 8, MASK], [4, 5, MASK, 6, 7, 9]]
    assert marks.int().tolist() == [[0, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]]
    assert origin.tolist() == [[0, 1, 3, -1, 4, 5], [0, 1, -1, 2, 3, 5]]
    # what is pushed over the end is lost, what is missing comes in as masks
    full = torch.tensor([[False, True, True, True, True, False]])
    row, nothing = torch.tensor([[4, 5, 6, 7, 8, 9]]), torch.zeros(1, 6, dtype=torch.bool)
    every = torch.tensor([[4, *[INSERT] * 4, 9]]), torch.tensor([[4, *[DELETE] * 4, 9]])
    results = [restructure(row, chosen, full, nothing, MASK, (DELETE, INSERT))[0].tolist()[0] for chosen in every]
    assert results == [[4, MASK, 5, MASK, 6, 9], [4, *[MASK] * 4, 9]]


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: it sees a draft, and its choices are the labels that 2.2 trains on.


def common_subsequence(draft, target):
    """The longest one, as pairs of indices; a mask may be any token."""
    length = [[0] * (len(target) + 1) for _ in range(len(draft) + 1)]
    for i in reversed(range(len(draft))):
        for j in reversed(range(len(target))):
            taken = length[i + 1][j + 1] + 1 if draft[i] in (MASK, target[j]) else 0
            length[i][j] = max(length[i + 1][j], length[i][j + 1], taken)
    pairs, i, j = [], 0, 0
    while i < len(draft) and j < len(target):
        if draft[i] in (MASK, target[j]) and length[i][j] == length[i + 1][j + 1] + 1:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def labels(draft, target):
    """What each position is to become: a gap's tokens one for one, the rest removed, or a mask before the anchor."""
    found, i, j = [DELETE] * len(draft), 0, 0
    for anchor, match in common_subsequence(draft, target):
        count = min(anchor - i, match - j)
        found[i : i + count] = target[j : j + count]
        found[anchor] = INSERT if match - j > anchor - i else target[match]
        i, j = anchor + 1, match + 1
    return found


def spoilt(target, draw):
    """A draft with one to seven substitutions, insertions, deletions and masks, as long as the target."""
    draft = list(target)
    for _ in range(draw.randrange(1, 8)):
        at, kind = draw.randrange(len(draft)), draw.choice("SIDM")
        if kind == "I":
            draft.insert(at, draw.randrange(4, 14))
        elif kind == "D":
            del draft[at]
        else:
            draft[at] = MASK if kind == "M" else draw.randrange(4, 14)
    return (draft + [MASK] * len(target))[: len(target)]


class Oracle(NanoLLaDAForMaskedLM):
    """Knows one target per prompt: drafts the spoilt one, unsure of its masks, and chooses the labels from then on."""

    def __init__(self, cases):
        shape = {"vocab_size": 600, "block_length": LENGTH, **SHAPE, **CONTROLS}
        super().__init__(NanoLLaDAConfig(**shape))
        self.cases, self.seen = cases, []  # by the block of the prompt's number: draft and target

    def choose(self, number, block):
        draft, target = self.cases[number]
        if set(block) == {MASK}:
            return [(5, 0.4) if token == MASK else (token, 0.99) for token in draft]
        return [(token, 0.99) for token in labels(block, target)]

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        logits = torch.zeros(*input_ids.shape, 600)
        self.seen.append(input_ids[:, LENGTH:].clone())
        for index, row in enumerate(input_ids.tolist()):
            for column, (token, probability) in enumerate(self.choose(row[0] - 100, row[LENGTH:]), LENGTH):
                logits[index, column, token] = torch.tensor(599 * probability / (1 - probability)).log()
        return MaskedLMOutput(logits=logits[logits_to_keep])


def test_an_oracle_reaches_the_target():
    """400 of 400 drafts in at most four rounds (methods: arXiv report of LLaDA 2.2), the block's length constant."""
    draw = random.Random(0)
    targets = [[draw.randrange(4, 14) for _ in range(LENGTH)] for _ in range(400)]
    cases = [(spoilt(target, draw), target) for target in targets]
    model = Oracle(cases)
    prompts = torch.tensor([[100 + number] + [20] * (LENGTH - 1) for number in range(400)])
    out = model.generate(prompts, max_new_tokens=LENGTH, use_cache=False, eos_token_id=None, **ON, **RUN_PLAIN)
    assert torch.equal(model.seen[1], torch.tensor([draft for draft, _ in cases]))
    assert out.sequences[:, LENGTH:].tolist() == targets
    assert torch.equal(out.sequences[:, :LENGTH], prompts) and torch.equal(out.canvas, out.sequences)
    forwards = LENGTH / out.tokens_per_forward
    assert int(forwards.max().round()) <= 1 + ROUNDS + 1  # the draft, the rounds, and one that finds nothing to do
    assert int(forwards.max().round()) > 3, "some need several rounds"


RUN_PLAIN = {"return_dict_in_generate": True, "pad_token_id": PAD}


# ---------------------------------------------------------------------------------------------------------------------
# In `generate`


@pytest.mark.parametrize("number", range(30))
def test_cached_equals_uncached(number):
    draw = random.Random(number)
    shape = {"block_length": draw.choice((2, 4, 8)), "num_hidden_layers": 2, "initializer_range": 0.3}
    model = build(number, **shape, delete_token_id=62, insert_token_id=63)
    ids, mask = left_padded([[draw.randrange(4, 62) for _ in range(draw.randrange(1, 10))] for _ in range(3)])
    bias = SuppressControls(draw.choice((0.0, 2.0)))
    run = {"attention_mask": mask, "max_new_tokens": draw.randrange(1, 17), "max_post_steps": 4, **RUN, **ON}
    run |= {"joint_edit_threshold": draw.choice((0.0, 0.2)), "cfg_scale": draw.choice((0.0, 0.5))}
    static = {"cache_implementation": "static"} if number % 3 == 0 else {}
    plain = model.generate(ids, **run, use_cache=False, logits_processor=[bias])
    cached = model.generate(ids, **run, **static, logits_processor=[bias])
    for name in ("sequences", "canvas", "commit_steps", "tokens_per_forward"):
        assert torch.equal(plain[name], cached[name]), name
    assert torch.equal(plain.sequences[:, : ids.shape[1]], ids)
    assert not torch.isin(plain.canvas[:, : ids.shape[1]], torch.tensor([62, 63])).any()


class SuppressControls:
    """Makes them likelier, so that something happens."""

    def __init__(self, more):
        self.more = more

    def __call__(self, input_ids, scores):
        return scores.index_add(1, torch.tensor([62, 63]), scores.new_full((len(scores), 2), self.more))


def test_without_structural_edits_it_is_the_loop_of_2_1():
    """And the control tokens are never proposed, however likely."""
    tokens = []
    for controls in (-9.0, 9.0):
        model = Table(4, 1, controls=controls)
        run = {"max_new_tokens": 12, "use_cache": False, "joint_threshold": 0.5}
        for off in ({}, {"structural_edits": False}):
            tokens.append(model.generate(PROMPT, **run, **off, **RUN).sequences.tolist())
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]
    assert tokens[0] != model.generate(PROMPT, **run, structural_edits=True, **RUN).sequences.tolist()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"structural_edits": True}, "`structural_edits` refines `joint_threshold`, which must be set, got None"),
        ({**ON, "joint_penalty": 1.0}, "`joint_penalty` must be 0 with `structural_edits`, got 1.0"),
        ({**ON, "structural_edits": "yes"}, r"`structural_edits` must be one of \(True, False\), got 'yes'"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        Table(4).generate(PROMPT, max_new_tokens=4, **settings)


def test_a_model_without_the_tokens_is_refused():
    with pytest.raises(ValueError, match="`structural_edits` needs .*`config.delete_token_id`.* got None and None"):
        build().generate(PROMPT, max_new_tokens=4, **ON)


def test_masks_inside_prompts_are_refused():
    prompt = torch.tensor([[5, MASK, 6, 7]])
    with pytest.raises(ValueError, match="`structural_edits` .*mask tokens inside .* got .*row 0"):
        Table(4).generate(prompt, max_new_tokens=4, **ON)
    assert Table(4).generate(prompt, max_new_tokens=4, joint_threshold=0.5, use_cache=False).shape == (1, 8)


def test_streamers_are_told_what_moved():
    """Each draft is the one before, moved as told and changed where a step was made; tokens that moved keep theirs."""
    moves, drafts = [], []

    class Streamer:
        put_moves = staticmethod(lambda value: moves.append(value.tolist()[0]))

        def put(self, value):
            pass

        def end(self):
            pass

        def put_draft(self, value):
            drafts.append((moves.pop() if moves else None, value.tolist()[0]))

    told = 0
    for seed in range(20):
        model, run = Table(None, seed, stay=2.0, controls=0.5), {**RUN, "eos_token_id": None, "max_post_steps": 3}
        drafts.clear()
        out = model.generate(PROMPT, max_new_tokens=6, use_cache=False, streamer=Streamer(), **run, **ON)
        before, steps = [MASK] * 6, [-1] * 6
        for number, (origin, draft) in enumerate(drafts):
            if origin is not None:
                told += 1
                before = [MASK if column < 0 else before[column - PROMPT.shape[1]] for column in origin]
                steps = [-1 if column < 0 else steps[column - PROMPT.shape[1]] for column in origin]
            pairs = zip(draft, before, steps, strict=True)
            steps = [-1 if new == MASK else number if new != old else step for new, old, step in pairs]
            before = draft
        assert out.commit_steps[0, PROMPT.shape[1] :].tolist() == steps
        assert len(drafts) == round(6 / float(out.tokens_per_forward))
    assert told > 20
