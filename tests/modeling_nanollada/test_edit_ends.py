"""What edits see and when: ends of text, stopping criteria, the blocks of a cache, the drafts' other settings."""

import itertools
import random
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
    Recorder,
    StopAt,
    build,
    drafts,
    seeded,
)
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.editing_nanollada import Editor
from nanollada.modeling_nanollada.sampling_nanollada import Sampler

EDITS = {"edit_threshold": 0.0, "edit_margin": 0.0}

# ---- the law, where rows end: Gibbs edits move no perfect sample

KINDS, LENGTH = torch.tensor([4, 5, EOS]), 5
SCRIPTS = KINDS[torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))]  # [243, 5]


def text(row):
    """A row up to its end, as a tuple."""
    row = row.tolist()
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


class Scripted:
    """Writes `SCRIPTS`, a row each, edits nothing, and keeps the probabilities of what was and would be drawn."""

    def __init__(self, patch):
        self.chances = torch.ones(len(SCRIPTS), dtype=torch.double)
        self.drawn, self.edits = torch.full(SCRIPTS.shape, -1), []
        decide, draw, edit = Sampler.decide, Sampler.draw, Editor.decide
        logits_of = []

        def scripted(sampler, step, ids):
            decision, wanted = decide(sampler, step, ids), SCRIPTS[step.rows]
            own = step.logits.softmax(-1, dtype=torch.double).gather(1, wanted[step.active][:, None])[:, 0]
            self.chances[step.rows] *= step.spread(own, 1.0).where(decision.selected, 1.0).prod(1)
            self.drawn[step.rows] = wanted.where(decision.selected, self.drawn[step.rows])
            return replace(decision, tokens=wanted)

        def watched(sampler, logits, ids, row_of):
            logits_of.append(logits)
            return draw(sampler, logits, ids, row_of)

        def unedited(editor, step, ids):
            decision = edit(editor, step, ids)
            probabilities = logits_of[-1].softmax(-1, dtype=torch.double)  # of the last draw: that of the edit
            self.edits.append((step.rows.tolist(), step.read.nonzero()[:, 1].tolist(), probabilities))
            return replace(decision, replaced=torch.zeros_like(decision.replaced))

        patch.setattr(Sampler, "decide", scripted)
        patch.setattr(Sampler, "draw", watched)
        patch.setattr(Editor, "decide", unedited)

    def distances(self, law):
        """Of each edit's step: total variation of the texts, one step behind exact ones, from the law."""
        ways = {tuple(way): place for place, way in enumerate(self.drawn.tolist())}.values()
        truth = dict.fromkeys(map(text, SCRIPTS), 0.0)
        for script, chance in zip(SCRIPTS, law.tolist(), strict=True):
            truth[text(script)] += chance
        for rows, columns, probabilities in self.edits:
            found, at = dict.fromkeys(truth, 0.0), {row: place for place, row in enumerate(rows)}
            for way in ways:
                old = text(SCRIPTS[way])
                if way not in at:  # nothing before its end
                    found[old] += float(self.chances[way])
                    continue
                column, own = columns[at[way]], probabilities[at[way]]
                assert old[column] != EOS and float(own[EOS] + own[PAD]) == 0
                for token in (4, 5):
                    new = (*old[:column], token, *old[column + 1 :])
                    found[new] += float(self.chances[way] * own[token])
            yield sum(abs(found[key] - truth[key]) for key in truth) / 2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"eos_policy": "cut"}, {"early_stop": False}], ids=str)
def test_a_perfect_sample_stays_one_where_rows_end(settings, seed, monkeypatch):
    """Any law of 243 rows, whose text behind an end says something about the text before it."""
    law = torch.rand(len(SCRIPTS), generator=seeded(seed)).double() ** 4 + 1e-4
    law = law / law.sum()
    scripted = Scripted(monkeypatch)
    run = {"max_new_tokens": LENGTH, "temperature": 1.0, "edit_threshold": 0.0, "edit_rule": "remask", **settings}
    out = Oracle(SCRIPTS, law).generate(
        torch.full((len(SCRIPTS), 1), 1), eos_token_id=EOS, pad_token_id=PAD, max_post_steps=LENGTH, **run
    )
    assert list(map(text, out[:, 1:])) == list(map(text, SCRIPTS))
    distances = list(scripted.distances(law))
    assert len(distances) == LENGTH and max(distances) < 1e-6  # float32 logits


# ---- what a block's edits see


def seen_by(model, prompt, **settings):
    """The ids of each forward pass, and the output."""
    windows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: windows.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    out = model.generate(prompt, return_dict_in_generate=True, **settings)
    handle.remove()
    return windows, out


@pytest.mark.parametrize("own", [{"max_edits": 2}, {"edit_rule": "remask"}, {"temperature": 1.0}], ids=str)
def test_a_block_is_edited_alone_and_enters_the_cache_behind_its_last_edit(own):
    model, prompt = build(2, block_length=4, eos_token_id=None), torch.arange(4, 12)[None]
    run = {"max_new_tokens": 12, "steps": 1, "edit_threshold": 0.0, "max_post_steps": 5, **own}
    run |= {} if "temperature" in own else {"edit_margin": 0.0}
    windows, out = seen_by(model, prompt, generator=seeded(1), **run)
    whole, _ = seen_by(model, prompt, generator=seeded(1), use_cache=False, **run)
    final, changed = out.canvas[0].tolist(), 0
    starts = [place for place, window in enumerate(windows) if len(window) > 4]  # a block's first pass
    assert len(starts) == 3 and starts[0] == 0 and len(windows[0]) == 12
    for block, (start, stop) in enumerate(itertools.pairwise([*starts, len(windows)])):
        begin = 8 + 4 * block
        assert windows[start][-4:] == [MASK] * 4
        assert windows[start][:-4] == final[begin - 4 * (1 + (block == 0)) : begin]  # what is cached from now on
        assert 2 < stop - start <= 6 and all(len(window) == 4 for window in windows[start + 1 : stop])
        # The reference reads the blocks before as they ended, this one as it stands, and nothing behind it.
        for short, long in zip(windows[start:stop], whole[start:stop], strict=True):
            assert long == final[:begin] + short[-4:]
        changed += windows[start + 1] != final[begin : begin + 4]
    assert changed, "the case needs edits"


class Corrects(NanoLLaDAForMaskedLM):
    """
    Writes 10 + place, and an end of text at `end`. What it sees, that too, it would rather have ended, or padded, or
    else as 30 + place; the left first.
    """

    def __init__(self, end=None):
        super().__init__(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE))
        self.end = end

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        token = torch.where(input_ids == MASK, 10, 30) + place
        token = token.masked_fill((input_ids == MASK) & (place == self.end), EOS)
        logits = torch.zeros(*token.shape, VOCABULARY).scatter_(-1, token[..., None], 20.0 - place[..., None])
        logits[..., PAD] += 30.0 * (input_ids != MASK)
        logits[..., EOS] += 40.0 * (input_ids != MASK)
        return MaskedLMOutput(logits=logits[logits_to_keep])


RUN = {"max_new_tokens": 6, "block_length": 3, "steps": 1, "pad_token_id": PAD, "eos_token_id": EOS, **EDITS}


def test_criteria_and_streamers_get_edited_tokens():
    streamer, drafted, corrected = Recorder(), StopAt(16), StopAt(36)
    out = Corrects().generate(PROMPT, streamer=streamer, stopping_criteria=[drafted], **RUN)
    assert out[0, 5:].tolist() == [35, 36, 37, 38, 39, 40]
    assert streamer.puts[1:] == [[[35, 36, 37]], [[38, 39, 40]]]
    # Each block: its draft, three edits, and the look that finds nothing.
    assert [draft[0][-6:-3] for draft in streamer.drafts[:5]] == [
        [15, 16, 17], [35, 16, 17], [35, 36, 17], [35, 36, 37], [35, 36, 37],
    ]  # fmt: skip
    assert len(streamer.drafts) == 10
    assert all(prefix[5:] <= out[0, 5:].tolist() for call in drafted.seen for prefix in call)
    out = Corrects().generate(PROMPT, stopping_criteria=[corrected], **RUN)
    assert out[0, 5:].tolist() == [35, 36] + [PAD] * 4


@pytest.mark.parametrize("policy", ["none", "last", "cut"])
def test_a_row_that_ends_in_a_block_is_edited_before_it_ends(policy):
    out = Corrects(end=7).generate(PROMPT, eos_policy=policy, return_dict_in_generate=True, **RUN)
    assert out.sequences[0, 5:].tolist() == [35, 36, EOS, PAD, PAD, PAD]
    assert out.commit_steps[0, 5:8].tolist() == [1, 2, 0] and float(out.tokens_per_forward) == pytest.approx(3 / 4)
    # A second block, if it comes to it, is behind the end, and nobody looks at it.
    go_on = {} if policy == "cut" else {"early_stop": False}
    windows, again = seen_by(Corrects(end=7), PROMPT, eos_policy=policy, **RUN, **go_on)
    assert torch.equal(again.sequences, out.sequences) and len(windows) == 4 + bool(go_on)
    if go_on:
        assert again.canvas[0, 8:].tolist() == [18, 19, 20]


def test_a_block_with_nothing_to_edit_costs_no_pass():
    model = Corrects(end=5)
    windows, out = seen_by(model, PROMPT, **{**RUN, "eos_policy": "cut"})
    assert len(windows) == 1 and out.sequences[0, 5:].tolist() == [EOS] + [PAD] * 5


# ---- beside the other settings

DRAFTS = (
    {"threshold": 0.3},
    {"threshold": 0.5, "low_threshold": 0.1},
    {"threshold": 0.2, "kl_threshold": 0.5},
    {"factor": 1.2},
    {"entropy_bound": 1.0},
    {"commit_schedule": "ratio", "steps": 3},
    {"commit_schedule": "ramp", "max_commits": 2},
    {"remasking": "random"},
    {"position_score": "sampled_prob"},
    {"remdm": "rescale", "remdm_eta": 0.5, "steps": 6},
    {"approximate_cache": "prefix", "block_length": 4},
    {"approximate_cache": "dual", "block_length": 4},
    {"grow_length": True, "block_length": 4},
)


@pytest.mark.parametrize("settings", DRAFTS, ids=str)
def test_edits_go_with_every_way_to_draft(settings):
    """Words of a prompt with holes stay, and what is forbidden is in no edit; the last draft is what comes out."""
    model, draw = build(7), random.Random(3)
    ids = torch.tensor([[draw.randrange(4, VOCABULARY), MASK, draw.randrange(4, VOCABULARY)] for _ in range(3)])
    never = list(range(4, 24))
    run = {"max_new_tokens": 8, "suppress_tokens": never, "eos_policy": "none", "early_stop": False, **settings}
    for own in (
        {**EDITS, "max_edits": 2},
        {**EDITS, "edit_rule": "remask"},
        {"edit_threshold": 0.0, "temperature": 1.0},
    ):
        streamer = drafts(model, ids, generator=seeded(1), **run, **own)
        last = torch.tensor(streamer.drafts[-1])
        out = model.generate(ids, generator=seeded(1), return_dict_in_generate=True, **run, **own)
        plain = model.generate(ids, generator=seeded(1), **run, temperature=own.get("temperature", 0.0))
        assert torch.equal(out.canvas[:, -last.shape[1] :], last)
        assert torch.equal(out.sequences[ids_at(ids, out)], ids[ids != MASK])
        assert not torch.isin(out.canvas[:, 3:], torch.tensor([MASK, *never])).any()
        assert not torch.equal(out.sequences, plain), "the case needs edits"


def ids_at(ids, out):
    """Where the words of the prompt stand in the output."""
    return torch.nn.functional.pad(ids != MASK, (0, out.sequences.shape[1] - ids.shape[1]))
