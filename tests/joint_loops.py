"""LLaDA 2.1's and 2.2's loops written from the reports, a row at a time in plain lists; and models to run them on."""

import functools
import math
import random

import pytest
import torch
from generation_models import EOS, MASK, PAD, SHAPE, left_padded
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM

DELETE, INSERT, VOCABULARY = 14, 15, 16
RUN = {"pad_token_id": PAD, "eos_token_id": EOS, "return_dict_in_generate": True}
CONTROLS = {"delete_token_id": DELETE, "insert_token_id": INSERT}
RUN = {"pad_token_id": PAD, "eos_token_id": EOS, "return_dict_in_generate": True}


@functools.cache
def noise(key, width):
    draw = random.Random(repr(key))
    return [[draw.gauss(0, 1) for _ in range(VOCABULARY)] for _ in range(width)]


class Table(NanoLLaDAForMaskedLM):
    """
    Fixed opinions: the logits of a block's positions are noise that is keyed by all that stands up to the block's end
    (modulo `states`: few states go in circles), with `stay` more for the token that stands there and `controls` more
    for what is structural. Without a `block_length` the row is one block.
    """

    def __init__(self, block_length, seed=0, states=1000, scale=2.0, stay=1.0, controls=0.0):
        shape = {"vocab_size": VOCABULARY, "block_length": block_length, **SHAPE, **CONTROLS}
        super().__init__(NanoLLaDAConfig(**shape))
        self.seed, self.states, self.scale, self.stay, self.controls = seed, states, scale, stay, controls
        self.known = {}

    def opinions(self, row):
        """The logits of a row's positions, a list for each; its length is whole blocks."""
        key = tuple(row)
        if key not in self.known:  # the model and the plain loop ask for the same states
            self.known[key] = self.scores(row)
        return [list(scores) for scores in self.known[key]]

    def scores(self, row):
        rows, size = [], self.config.block_length or len(row)
        for end in range(size, len(row) + 1, size):
            state = random.Random(repr((self.seed, row[:end]))).randrange(self.states)
            for token, scores in zip(row[end - size : end], noise((self.seed, end, state), size), strict=True):
                scores = [self.scale * value for value in scores]
                scores[token] += self.stay if token != MASK else 0
                scores[DELETE] += self.controls
                scores[INSERT] += self.controls
                scores[MASK] = -math.inf
                rows.append(scores)
        return rows

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, VOCABULARY, dtype=torch.double)
        for index, seen in enumerate(visible.bool()):
            row = input_ids[index, seen].tolist()
            row += [MASK] * (-len(row) % (self.config.block_length or 1))
            logits[index, seen] = torch.tensor(self.opinions(row), dtype=torch.double)[: int(seen.sum())]
        return MaskedLMOutput(logits=logits[logits_to_keep])


def proposal(scores, never=()):
    """The likeliest token that is not `never` one, and its probability among all."""
    token = max((token for token in range(len(scores)) if token not in never), key=scores.__getitem__)
    highest = max(scores)
    return token, math.exp(scores[token] - highest) / math.fsum(math.exp(value - highest) for value in scores)


def joint_block(read, row, block, threshold, edit_threshold=0.0, penalty=0.0, budget=16, first=0):
    """Decodes the columns `block` of `row` in place; its forward passes. `first`: where the model's block begins."""
    passes = forwards = 0
    while True:
        scores = read(row)
        forwards += 1
        for column in range(len(row) - 1, first, -1):
            if column in block:
                scores[column][row[column - 1]] -= penalty
        found = {column: proposal(scores[column]) for column in block}
        masks = [column for column in block if row[column] == MASK]
        new = {column: found[column][0] for column in masks if found[column][1] > threshold}
        if masks and not new:
            surest = max(masks, key=lambda column: found[column][1])
            new = {surest: found[surest][0]}
        if not masks:
            passes += 1
            if passes > budget:
                return forwards
        for column in block:
            token, probability = found[column]
            if row[column] not in (MASK, token) and probability > edit_threshold:
                new[column] = token
        if not new:
            return forwards
        for column, token in new.items():
            row[column] = token


def structural_block(read, row, block, threshold, edit_threshold=0.0, budget=16, log=None):
    """As `joint_block`, with deletions and insertions; `log` gets what happened."""
    log = {} if log is None else log
    is_original = {column: row[column] == MASK for column in block}
    passes = updates = forwards = 0
    seen, history = set(), {}
    while True:
        scores = read(row)
        forwards += 1
        masks = [column for column in block if row[column] == MASK]
        originals = [column for column in masks if is_original[column]]
        updates += 1
        passes += not originals
        last = passes > budget or updates > len(block) + budget
        found = {}
        for column in block:
            found[column] = proposal(scores[column])
            if not last and column in originals and found[column][0] == MASK:
                found[column] = proposal(scores[column], never=[MASK])
        writes = list(masks)
        if originals and not last:
            needed = len(masks) - len(originals) + 1
            writes = [column for column in masks if found[column][1] > threshold]
            if len(writes) < needed:
                writes = sorted(masks, key=lambda column: (-found[column][1], column))[:needed]
        for column in block:
            if row[column] not in (MASK, found[column][0]) and found[column][1] > edit_threshold:
                writes.append(column)
        if not writes:
            return forwards
        tokens = {column: found[column][0] for column in writes}
        if last:
            log["cleaned"] = True
            never = [MASK, DELETE, INSERT]
            tokens = {column: proposal(scores[column], never)[0] for column in writes}
        changing = [column for column in sorted(writes) if tokens[column] != row[column]]
        if tuple(row) in seen and changing and not last:
            log["loops"] = log.get("loops", 0) + 1
            column = min(changing, key=lambda column: found[column][1])
            never = {*history.get(column, ()), MASK}
            if len(never) < VOCABULARY:  # of a real vocabulary something is always left
                tokens[column] = proposal(scores[column], never)[0]
        seen.add(tuple(row))
        for column in writes:
            history.setdefault(column, set()).add(tokens[column])
        pairs = []
        for column in block:
            token, mark = tokens.get(column, row[column]), is_original[column]
            log[token] = log.get(token, 0) + (column in tokens)
            if token == INSERT:
                pairs += [(MASK, False), (row[column], mark)]
            elif token != DELETE:
                pairs.append((token, mark))
        pairs += [(MASK, False)] * (len(block) - len(pairs))
        for column, (token, mark) in zip(block, pairs, strict=False):
            row[column], is_original[column] = token, mark
        if last:
            return forwards


def decode_row(model, prompt, new_tokens, decode_block, **settings):
    """A whole row, block by block: the output, padded behind an EOS, and its forward passes."""
    total = len(prompt) + new_tokens
    size = model.config.block_length or total
    row = prompt + [MASK] * (-(-total // size) * size - len(prompt))
    forwards = 0
    for first in range(0, total, size):
        block = [column for column in range(first, min(first + size, total)) if row[column] == MASK]
        if not block:
            continue
        more = {"first": first} if "penalty" in settings else {}  # whose reach the block ends
        forwards += decode_block(model.opinions, row, block, **settings, **more)
        if EOS in row[len(prompt) : min(first + size, total)]:
            break
    row = row[:total]
    if EOS in row[len(prompt) :]:
        end = row.index(EOS, len(prompt)) + 1
        row[end:] = [PAD] * (total - end)
    return row, forwards


def random_run(number, controls):
    """A table, prompts of several lengths, settings by the names of the plain loop, new tokens."""
    draw = random.Random(number)
    size = draw.choice((None, 2, 3, 4, 6, 8))
    opinions = {"states": draw.choice((1, 2, 3, 1000)), "scale": draw.choice((1.0, 2.0, 4.0))}
    model = Table(size, number, stay=draw.choice((0.0, 1.0, 4.0)), controls=controls(draw), **opinions)
    rows = draw.choice((1, 3))
    prompts = [[draw.randrange(4, 14) for _ in range(draw.randrange(1, 12))] for _ in range(rows)]
    settings = {"threshold": draw.choice((0.0, 0.2, 0.5, 0.9, 1.0)), "edit_threshold": draw.choice((0.0, 0.3, 0.6))}
    settings |= {"penalty": draw.choice((0.0, 3.0)), "budget": draw.choice((1, 3, 16))}
    return model, prompts, settings, draw.randrange(1, 10)


def compare(model, prompts, new_tokens, decode_block, settings, **arguments):
    """`generate` on the batch against the plain loop on each row: tokens, and forward passes."""
    ids, mask = left_padded(prompts)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, use_cache=False, **RUN, **arguments)
    assert (out.sequences.shape[1], mask.shape[1]) == (ids.shape[1] + new_tokens, ids.shape[1])
    passes = []
    for row, prompt in enumerate(prompts):
        expected, forwards = decode_row(model, prompt, new_tokens, decode_block, **settings)
        assert out.sequences[row, ids.shape[1] - len(prompt) :].tolist() == expected
        kept = expected[len(prompt) :]
        kept = kept.index(EOS) + 1 if EOS in kept else new_tokens
        assert float(out.tokens_per_forward[row]) == pytest.approx(kept / forwards)
        passes.append(forwards)
    return out.sequences, passes
