"""Infilling of unknown length: an oracle from any number of masks, and the decoder against a loop in plain lists."""

import itertools
import math
import random

import pytest
import torch
from generation_models import EOS, MASK, PAD, VOCABULARY, build, left_padded, seeded
from joint_loops import DELETE, INSERT, Table
from transformers import LogitsProcessor
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM

SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
EDITS = {"delete_token_id": 62, "insert_token_id": 63}
FILL = {"max_new_tokens": 0, "return_dict_in_generate": True}


def parts(size, masks):
    """Of each mask of a gap the number of tokens that it stands for: as even as may be, the larger ones last."""
    even, more = divmod(size, masks) if size > masks else (1, 0)
    sizes = [even + (i >= masks - more) for i in range(masks)]
    return sizes if size > masks else [1] * size + [0] * (masks - size)


class Oracle(NanoLLaDAForMaskedLM):
    """Knows the row of each first token; its logits are the labels and, next to them, a token that is missing."""

    def __init__(self, rows):
        super().__init__(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE, **EDITS))
        self.rows = {row[0]: row for row in rows}

    def labels(self, row):
        whole, labels, behind = self.rows[row[0]], [], 0
        for masked, run in itertools.groupby(row, lambda token: token == MASK):
            run = list(run)
            if not masked:
                behind = whole.index(run[-1]) + 1
                labels += [(token, token) for token in run]
                continue
            rest = row[len(labels) + len(run) :]
            tokens = whole[behind : whole.index(rest[0]) if rest else None]
            for size in parts(len(tokens), len(run)):
                token = tokens[0] if size else 9
                labels.append((token if size == 1 else (63 if size else 62), token))
                tokens = tokens[size:]
            assert not tokens
        return labels

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, edit_tokens=False, **kwargs):
        assert edit_tokens
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        labels = torch.zeros(*input_ids.shape, 2, dtype=torch.long)
        for index, seen in enumerate(visible.bool()):
            labels[index, seen] = torch.tensor(self.labels(input_ids[index, seen].tolist()))
        first, second = torch.nn.functional.one_hot(labels[logits_to_keep], VOCABULARY).double().unbind(1)
        return MaskedLMOutput(logits=30 * first + 10 * second)


CASES = list(itertools.product(range(8), range(1, 10)))  # tokens that are missing, masks


@pytest.mark.parametrize(
    "settings", [{}, {"threshold": 0.5}, {"remasking": "random"}, {"max_commits": 2, "threshold": 0.5}]
)
def test_an_oracle_reaches_every_row_from_every_number_of_masks(settings):
    rows, prompts = [], []
    for number, (size, masks) in enumerate(CASES):
        before, hole, behind = [4 + number % 36], list(range(50, 50 + size)), list(range(40, 41 + number % 3))
        rows.append(before + hole + behind)
        prompts.append(before + [MASK] * masks + behind)
    for begin in range(0, len(rows), 36):
        these, given = rows[begin : begin + 36], prompts[begin : begin + 36]
        model, (ids, visible) = Oracle(these), left_padded(given)
        grown = [max(0, len(row) - len(prompt)) for row, prompt in zip(these, given, strict=True)]
        out = model.generate(
            ids, attention_mask=visible, max_expansions=max(grown), generator=seeded(), **FILL, **settings
        )
        for index, (row, prompt) in enumerate(zip(these, given, strict=True)):
            pads = ids.shape[1] - len(prompt)
            found = out.sequences[index].tolist()
            assert found == [PAD] * pads + row + [PAD] * (len(found) - pads - len(row))
            if settings == {"threshold": 0.5}:
                hidden, masks = sum(token >= 50 for token in row), prompt.count(MASK)
                forwards = 1 + (math.ceil(math.log2(hidden / masks)) if hidden > masks else 0)
                assert out.tokens_per_forward[index].item() == pytest.approx(hidden / forwards)


def test_no_row_takes_more_expansions_than_it_needs_and_none_more_than_it_may():
    row = [4, *range(50, 58), 40, 41]
    for budget, threshold in itertools.product(range(8), (None, 0.5)):
        model = Oracle([row])
        ids = torch.tensor([[4, MASK, MASK, 40, 41]])
        out = model.generate(ids, max_expansions=budget, threshold=threshold, **FILL).sequences[0].tolist()
        assert len(out) == min(11, 5 + budget) and out[0] == 4 and out[-2:] == [40, 41]
        assert not {MASK, 62, 63} & set(out)
        assert (out == row) == (budget >= 6)
    small = Oracle([row])
    small.config.max_position_embeddings = 7  # no row outgrows the model's positions
    assert small.generate(ids, max_expansions=32, **FILL).sequences.shape == (1, 7)


# ---------------------------------------------------------------------------------------------------------------------


def plain_loop(model, row, budget, threshold):
    """The row, the step of each token, and the forward passes; a row at a time, in plain lists."""
    row = list(row)
    steps, free, forwards = [-1] * len(row), [token == MASK for token in row], 0
    while MASK in row:
        chosen, scores = {}, {}
        for i, logits in enumerate(model.opinions(row)):
            if row[i] != MASK or not free[i]:
                continue
            logits = [(-math.inf if k == INSERT and not budget else x) for k, x in enumerate(logits)]
            total = sum(math.exp(x) for x in logits)
            chosen[i] = max(range(len(logits)), key=lambda k: logits[k])
            scores[i] = (math.exp(max(logits)) / total, math.exp(logits[INSERT]) / total)
        order = sorted(chosen, key=lambda i: (-scores[i][0], i))
        taken = {i for i in order if threshold is not None and scores[i][0] > threshold} | {order[0]}
        growing = sorted((i for i in taken if chosen[i] == INSERT), key=lambda i: (-scores[i][1], i))
        taken -= set(growing[budget:])
        budget -= len(growing[:budget])
        for i in sorted(taken, reverse=True):
            if chosen[i] == DELETE:
                del row[i], steps[i], free[i]
            elif chosen[i] == INSERT:
                row.insert(i + 1, MASK)
                steps.insert(i + 1, -1)
                free.insert(i + 1, True)
            else:
                row[i], steps[i] = chosen[i], forwards
        forwards += 1
    return row, steps, forwards


class Moves:
    """A streamer that follows the columns."""

    def __init__(self):
        self.rows, self.moves, self.origin = [], 0, None

    def put(self, value):
        self.last = value

    def end(self):
        """Nothing more comes."""

    def put_moves(self, value):
        self.origin = value[0].tolist()

    def put_draft(self, value):
        row = value[0].tolist()
        if self.origin is not None:
            self.moves += 1
            before, start = self.rows[-1], self.start
            for token, column in zip(row, self.origin, strict=True):
                old = MASK if column < 0 else before[column - start]
                assert old in (token, MASK)  # nothing that was decided changes by moving
        self.origin = None
        self.rows.append(row)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_the_decoder_is_the_plain_loop_row_by_row(seed):
    draw, moved = random.Random(seed), [0, 0]
    for _ in range(50):
        model = Table(None, seed=draw.randrange(100), controls=draw.choice((1.0, 2.0, 3.0)), scale=draw.choice((1, 2)))
        rows = []
        for _ in range(draw.randrange(1, 4)):
            row = [draw.choice((MASK, MASK, *range(4, 14))) for _ in range(draw.randrange(2, 8))]
            rows.append([5, *row, MASK, *row[:2]])
        budget, threshold = draw.randrange(6), draw.choice((None, 0.2, 0.4))
        ids, visible = left_padded(rows)
        out = model.generate(ids, attention_mask=visible, max_expansions=budget, threshold=threshold, **FILL)
        for index, row in enumerate(rows):
            pads = ids.shape[1] - len(row)
            found, steps, forwards = plain_loop(model, row, budget, threshold)
            end = pads + len(found)
            assert out.sequences[index, pads:end].tolist() == found
            assert set(out.sequences[index, end:].tolist()) <= {PAD}
            assert out.commit_steps[index, pads:end].tolist() == steps
            decided = sum(step >= 0 for step in steps)
            assert out.tokens_per_forward[index].item() == pytest.approx(decided / forwards)
            assert not {MASK, DELETE, INSERT} & set(found)
            moved[0] += len(found) > len(row)
            moved[1] += len(found) < len(row)
    assert min(moved) > 3


def test_streamers_follow_the_columns():
    seen = 0
    for seed in range(20):
        model, streamer = Table(None, seed=seed, controls=2.0), Moves()
        row = [5, 6, MASK, MASK, 7, MASK, 8]
        streamer.rows, streamer.start = [row[2:]], 2
        out = model.generate(torch.tensor([row]), max_expansions=4, streamer=streamer, **FILL)
        assert streamer.rows[-1] == out.sequences[0, 2:].tolist() == streamer.last[0].tolist()
        seen += streamer.moves
    assert seen > 20


class Restless(LogitsProcessor):
    """Makes a model restructure its rows."""

    def __call__(self, input_ids, scores):
        bias = scores.new_zeros(VOCABULARY)
        bias[[62, 63]] = torch.tensor([4.0, 40.0], dtype=scores.dtype)  # <|delete|>, <|insert|>
        return scores + bias


@pytest.mark.parametrize("own", [{}, {"threshold": 0.3}, {"cfg_scale": 1.0}, {"factor": 1.0}])
def test_rows_of_a_batch_are_the_rows_alone(own):
    model, draw = build(2, **EDITS), random.Random(3)
    rows = [[draw.choice((MASK, 9, 10, 11, 12)) for _ in range(size)] + [MASK, 8] for size in (2, 4, 7, 9)]
    ids, visible = left_padded(rows)
    given = {"max_expansions": 5, "logits_processor": [Restless()], **FILL, **own}
    together, lengths = model.generate(ids, attention_mask=visible, **given), []
    for index, row in enumerate(rows):
        alone, pads = model.generate(torch.tensor([row]), **given), ids.shape[1] - len(row)
        end = pads + alone.sequences.shape[1]
        assert torch.equal(together.sequences[index, pads:end], alone.sequences[0])
        assert torch.equal(together.commit_steps[index, pads:end], alone.commit_steps[0])
        assert together.tokens_per_forward[index] == alone.tokens_per_forward[0]
        kept = [token for token in row if token != MASK]
        rest = iter(alone.sequences[0].tolist())
        assert all(token in rest for token in kept)  # in order
        lengths.append(alone.sequences.shape[1] - len(row))
    assert max(lengths) > 0


REFUSED = (
    ({"max_new_tokens": 4}, "`max_new_tokens` must be 0 with it, got 4"),
    ({"block_length": 2}, "`max_expansions` changes the length of rows: `block_length` must be unset with it, got 2"),
    ({"steps": 2}, "`steps` must be unset with it, got 2"),
    ({"grow_length": True}, "`grow_length` must be unset with it, got True"),
    ({"approximate_cache": "prefix"}, "`approximate_cache` must be unset with it, got 'prefix'"),
    ({"edit_threshold": 0.5}, "`edit_threshold` must be unset with it, got 0.5"),
    ({"joint_threshold": 0.5}, "`joint_threshold` must be unset with it, got 0.5"),
    ({"remdm": "cap"}, "`remdm` must be unset with it, got 'cap'"),
    ({"threshold": 0.5, "kl_threshold": 0.1}, "`kl_threshold` must be unset with it, got 0.1"),
    ({"commit_schedule": "ratio"}, "`commit_schedule` must be 'equal', got 'ratio'"),
    ({"max_expansions": -1}, "`max_expansions` must be an integer >= 0, got -1"),
)


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_it_does_not_go_with_is_refused(settings, message):
    model = build(0, **EDITS)
    with pytest.raises(ValueError) as error:
        model.generate(torch.tensor([[4, MASK, 5]]), **{"max_new_tokens": 0, "max_expansions": 3, **settings})
    assert message in str(error.value)


def test_models_and_prompts_it_does_not_go_with_are_refused():
    ids = torch.tensor([[4, MASK, 5]])
    given = {"max_new_tokens": 0, "max_expansions": 3}
    with pytest.raises(ValueError, match="`max_expansions` needs a model with `config.delete_token_id`.* got None"):
        build(0).generate(ids, **given)
    with pytest.raises(ValueError, match="`config.block_length` must be None, got 4"):
        build(0, block_length=4, **EDITS).generate(ids, **given)
    with pytest.raises(ValueError, match="prompt without mask tokens"):
        build(0, **EDITS).generate(torch.tensor([[4, 5]]), **given)
    model = build(0, pad_token_id=None, **EDITS)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = None, None
    with pytest.raises(ValueError, match="`pad_token_id` must be set for `max_expansions` of several rows, got None"):
        model.generate(ids.repeat(2, 1), **given)
    assert EOS != PAD
