"""Edits on a chain of known law: sweeps of draws bring a draft to it, greedy edits climb, several at once don't."""

import pytest
import torch
from edit_cases import LAW, ROWS, TABLE, Drafts, ExactChain, drafted, log_law
from toy_law import KINDS, LENGTH, MASK, WEIGHTS

from nanollada.modeling_nanollada.sampling_nanollada import Sampler

CODES = KINDS ** torch.arange(LENGTH - 1, -1, -1)
MASKS = torch.full((1, LENGTH), MASK)
EDITS = {"steps": 1, "max_new_tokens": 0, "edit_threshold": 0.0}


def distance(law):
    return float((law - LAW).abs().sum() / 2)


def kernels(edit_rule, monkeypatch, sweeps):
    """
    The draft's law, and of each step of a sweep its Markov kernel `[729, 729]`: the distributions that `generate`
    drew from, for all finished rows at once; what it drew is thrown away.
    """
    model = ExactChain(edits=edit_rule == "replace")
    seen = drafted(monkeypatch, ROWS)
    steps, draw = iter([None, *range(sweeps * LENGTH)]), Sampler.draw

    def keep(self, logits, ids, row_of):
        tokens, step = draw(self, logits, ids, row_of), next(steps)
        return tokens if step is None else ROWS[:, step % LENGTH].clone()

    monkeypatch.setattr(Sampler, "draw", keep)
    given = {**EDITS, "edit_rule": edit_rule, "temperature": 1.0, "max_post_steps": sweeps * LENGTH}
    out = model.generate(MASKS.repeat(len(ROWS), 1), generator=torch.Generator().manual_seed(0), **given)
    assert torch.equal(out, ROWS) and len(seen) == 1 + sweeps * LENGTH == model.calls
    marginals = seen[0].view(len(ROWS), LENGTH, KINDS + 1)[0]
    draft = marginals[torch.arange(LENGTH), ROWS].prod(1)
    made = []
    for step, probabilities in enumerate(seen[1:]):  # [729, 4]
        kernel = torch.zeros(len(ROWS), len(ROWS), dtype=torch.double)
        for kind in range(KINDS):
            new = ROWS.clone()
            new[:, step % LENGTH] = kind
            kernel[torch.arange(len(ROWS)), (new * CODES).sum(1)] += probabilities[:, kind]
        made.append(kernel)
    return draft, made


@pytest.mark.parametrize("edit_rule", ["replace", "remask"])
def test_a_sweep_of_gibbs_edits_brings_a_draft_to_the_law(edit_rule, monkeypatch):
    """Total variation 0.356, < 0.006 and < 0.002 behind one sweep and two; a perfect sample stays one."""
    law, steps = kernels(edit_rule, monkeypatch, sweeps=2)
    assert distance(law) == pytest.approx(0.356, abs=2e-3)
    after, perfect = [], LAW.clone()
    for kernel in steps:
        assert torch.allclose(kernel.sum(1), torch.ones(len(ROWS), dtype=torch.double))
        law, perfect = law @ kernel, perfect @ kernel
        after.append(distance(law))
        assert distance(perfect) < 1e-12
    assert 1e-3 < after[LENGTH - 1] < 0.006 and after[-1] < 0.002


@pytest.mark.parametrize("edit_rule", ["replace", "remask"])
def test_what_generate_draws_has_the_law_of_a_sweep(edit_rule, monkeypatch):
    """χ² of 40,000 rows against the exact law behind one sweep; the draft's own law is far from it."""
    with monkeypatch.context() as patch:
        draft, steps = kernels(edit_rule, patch, sweeps=1)
    law = draft
    for kernel in steps:
        law = law @ kernel
    count = 40_000
    given = {**EDITS, "edit_rule": edit_rule, "temperature": 1.0, "max_post_steps": LENGTH}
    generator = torch.Generator().manual_seed(3)
    out = ExactChain(edit_rule == "replace").generate(MASKS.repeat(count, 1), generator=generator, **given)
    seen = torch.bincount((out * CODES).sum(1), minlength=len(ROWS)).double()

    def score(law):
        often = law * count >= 5
        expected = torch.cat((law[often], law[~often].sum()[None])) * count
        found = torch.cat((seen[often], seen[~often].sum()[None]))
        return float(((found - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()), int(often.sum())

    value, freedom = score(law)
    assert value < freedom + 5 * (2 * freedom) ** 0.5
    assert score(draft)[0] > 10 * freedom


def greedy(monkeypatch, **settings):
    """All 729 rows as drafts, edited by an exact editor: the rows after each step `[S, 729, 6]`, and the output."""
    drafted(monkeypatch, ROWS)
    drafts, model = Drafts(), ExactChain(edits=settings.get("edit_rule") != "remask")
    given = {**EDITS, "edit_margin": 0.0, "return_dict_in_generate": True, **settings}
    out = model.generate(MASKS.repeat(len(ROWS), 1), streamer=drafts, **given)
    return torch.stack(drafts.rows), out


def test_greedy_edits_climb_one_by_one_and_end(monkeypatch):
    rows, out = greedy(monkeypatch)
    assert torch.equal(rows[0], ROWS) and torch.equal(rows[-1], out.sequences)
    changes = (rows[1:] != rows[:-1]).sum(-1)  # [S, 729]
    rise = log_law(rows[1:]) - log_law(rows[:-1])
    assert changes.max() == 1 and (rise[changes == 1] > 0).all()
    # The best gain first: no other single edit would have gained more.
    single = ROWS[:, None, None].repeat(1, LENGTH, KINDS, 1)
    for column in range(LENGTH):
        single[:, column, :, column] = torch.arange(KINDS)
    most = (log_law(single) - log_law(ROWS)[:, None, None]).amax((1, 2))
    assert torch.allclose(rise[0], most) and (most[changes[0] == 0] == 0).all()
    edits, outcome = changes.sum(0), (out.sequences * CODES).sum(1)
    assert edits.max() <= 8 and (changes.diff(dim=0) <= 0).all()  # a row that is done stays done
    assert (most[outcome] == 0).all()  # and no single edit would better it
    # The draft, each edit, and the look that finds nothing: the row's forward passes.
    assert torch.equal(6 / out.tokens_per_forward, (2 + edits).float())
    assert torch.equal(out.commit_steps.amax(1), edits)


def in_a_circle(row):
    """Whether a row never comes to rest where each of its tokens gives way to the likeliest at once."""
    seen = []
    while row.tolist() not in seen:
        seen.append(row.tolist())
        alone = row.repeat(LENGTH, 1).masked_fill(torch.eye(LENGTH, dtype=torch.bool), MASK)
        exact = TABLE[(alone * WEIGHTS).sum(1), torch.arange(LENGTH)]  # [6, 4]
        better = exact.amax(1) > exact[torch.arange(LENGTH), row]
        row = torch.where(better, exact.argmax(1), row)
    return row.tolist() != seen[-1]


def test_several_edits_at_once_go_in_circles_which_generate_leaves(monkeypatch):
    rows, out = greedy(monkeypatch, max_edits=LENGTH, max_post_steps=64)
    passes = (LENGTH / out.tokens_per_forward).long()  # [729]
    circles = 0
    for row in range(len(ROWS)):
        path = [tuple(state.tolist()) for state in rows[: passes[row], row]]
        assert len(set(path)) == len(path) - 1  # it stops at the first state that it has seen
        circles += path[-1] != path[-2]
    assert circles == sum(map(in_a_circle, ROWS)) > len(ROWS) // 2
    assert torch.equal(rows[-1], out.sequences)


def test_a_budget_and_a_margin_hold(monkeypatch):
    _, full = greedy(monkeypatch)
    rows, out = greedy(monkeypatch, max_post_steps=2)
    assert len(rows) == 3 and (rows[-1] != ROWS).sum(1).max() == 2
    rows, _ = greedy(monkeypatch, edit_margin=1.5)
    rise = log_law(rows[1:]) - log_law(rows[:-1])
    assert rise[rise > 0].min() > 1.5 and not torch.equal(rows[-1], full.sequences)
    rows, _ = greedy(monkeypatch, edit_threshold=0.6)
    assert (rows[-1] != ROWS).any() and not torch.equal(rows[-1], full.sequences)


def test_one_masked_token_a_step_climbs_with_any_model(monkeypatch):
    """T2M: the model copies what it sees, and yet no single token of the outcome can be bettered."""
    drafts, model = Drafts(), ExactChain(edits=False)
    drafted(monkeypatch, ROWS)
    given = {**EDITS, "edit_margin": 0.0, "edit_rule": "remask", "max_post_steps": 64}
    out = model.generate(MASKS.repeat(len(ROWS), 1), streamer=drafts, return_dict_in_generate=True, **given)
    rows = torch.stack(drafts.rows)
    changes, rise = (rows[1:] != rows[:-1]).sum(-1), log_law(rows[1:]) - log_law(rows[:-1])
    assert changes.max() == 1 and (rise[changes == 1] > 0).all()
    single = out.sequences[:, None, None].repeat(1, LENGTH, KINDS, 1)
    for column in range(LENGTH):
        single[:, column, :, column] = torch.arange(KINDS)
    assert torch.allclose(log_law(single).amax((1, 2)), log_law(out.sequences))
    # The least sure token of the draft is looked at first.
    marginals = TABLE[(MASKS[0] * WEIGHTS).sum()]  # [6, 4]
    first = marginals[torch.arange(LENGTH), ROWS].argmin(1)
    where = (rows[1] != rows[0]).int().argmax(1)
    assert (where == first)[changes[0] == 1].all() and (changes[0] == 1).any()
