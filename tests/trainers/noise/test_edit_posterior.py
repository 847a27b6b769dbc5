"""What an editor learns, on chains small enough to enumerate: the loss's optimum is the Bayes posterior."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from toy_law import FIRST, NEXT, chain

from nanollada.trainers.noise import editing, masking
from nanollada.trainers.noise.corruption import Lexicon
from nanollada.trainers.noise.editing import EditingSettings
from nanollada.trainers.noise.keys import STREAM_EDIT_PLACE, STREAM_EDIT_ROW, STREAM_EDIT_TOKEN, STREAM_MASK
from nanollada.trainers.noise.masking import MaskingSettings
from nanollada.trainers.objectives import weighted_loss

KINDS, MASK = 3, 3
MODEL = SimpleNamespace(vocab_size=4, mask_token_id=MASK)
COUNTS = torch.tensor([5, 3, 2, 0])


def words(length):
    """All rows of the chain of `length` tokens, `[3^length, length]`, and their probabilities."""
    rows = torch.tensor(list(itertools.product(range(KINDS), repeat=length)))
    law = FIRST[rows[:, 0]]
    for column in range(1, length):
        law = law * NEXT[rows[:, column - 1], rows[:, column]]
    return rows, law


def left_out(rows, law):
    """`[S, L, 3]`: of each place its token's law given all others."""
    joint = torch.zeros([KINDS] * rows.shape[1], dtype=torch.double)
    joint[tuple(rows.T)] = law
    found = [joint.movedim(place, -1).unsqueeze(place).expand(*joint.shape, KINDS) for place in range(rows.shape[1])]
    found = torch.stack([table[tuple(rows.T)] for table in found], 1)
    return found / found.sum(-1, keepdim=True)


def posterior(rows, law, rate, share_of=lambda size: 1.0):
    """
    `[S, L, 3]`: P(x_i | the row z that is read, i is replaced), by Bayes, without a mask: tokens are replaced with
    probability `rate` by one of the three, and a row of |R| replaced tokens counts `share_of(|R|)`.
    """
    length = rows.shape[1]
    channel = torch.zeros(length, dtype=torch.double)  # by how many others differ: they must be in R, the rest may
    for must, more in itertools.product(range(length), range(length)):
        if must + more < length:
            size, ways = 1 + must + more, math.comb(length - 1 - must, more)
            channel[must] += ways * (rate / KINDS) ** size * (1 - rate) ** (length - size) * share_of(size)
    differs = rows[:, None] != rows[None]  # [x, z, L]
    others = differs.sum(-1, keepdim=True) - differs.long()  # [x, z, L]
    joint = law[:, None, None] * channel[others]
    found = torch.stack([joint[rows[:, i] == v, :, i].sum(0) for i in range(length) for v in range(KINDS)], -1)
    found = found.view(len(rows), length, KINDS)
    return found / found.sum(-1, keepdim=True)


def distance(one, other, law):
    """Mean total variation over the chain's rows and their places."""
    return float(((one - other).abs().sum(-1) / 2 * law[:, None]).sum() / one.shape[1])


def test_editor_nears_the_law_given_all_others_as_noise_falls():
    rows, law = chain()
    exact = left_out(rows, law)
    found = [distance(posterior(rows, law, rate), exact, law) for rate in (0.30, 0.15, 0.05, 0.01)]
    assert found == pytest.approx([0.0745, 0.0420, 0.0176, 0.0045], abs=5e-5)
    means = [distance(posterior(rows, law, rate, lambda size: 1 / size), exact, law) for rate in (0.30, 0.01)]
    assert means == pytest.approx([0.0534, 0.0024], abs=5e-5)  # as a mean over R: rows of few errors count more


# ---- the optimum of what `corrupt` gives, over all that it can draw


def enumerated(monkeypatch, cases, rows, **settings):
    """`corrupt` of every row in every case: masks, replaced places and tokens, each a list of four."""
    hidden, replaced, tokens = (torch.tensor(part) for part in zip(*cases, strict=True))  # [C, 4] each
    numbers = {
        STREAM_EDIT_ROW: torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(len(cases), -1),
        STREAM_EDIT_PLACE: 1.0 - replaced.double(),
        STREAM_EDIT_TOKEN: torch.tensor([0.1, 0.6, 0.9]).double()[tokens],
        STREAM_MASK: 1 - hidden.double() / 2,
    }
    monkeypatch.setattr(editing, "keyed_uniform", lambda seed, index, epoch, stream, n: numbers[stream][index])
    monkeypatch.setattr(masking, "keyed_uniform", lambda seed, index, epoch, stream, n: numbers[stream][index])
    share = (hidden.sum(-1).double() - 0.5) / settings.pop("most", 4)
    monkeypatch.setattr(masking, "block_positions", lambda seed, index, *args: share[index][:, None].expand(-1, 4))
    index = torch.arange(len(cases)).repeat_interleave(len(rows))
    clean = rows.repeat(len(cases), 1)
    settings = {**vars(MaskingSettings()), **vars(EditingSettings(edit_rows=1.0)), **settings}
    lexicon = Lexicon(torch.tensor([True, True, True, False]), COUNTS)
    keys = {"seed": 0, "index": index, "rank": index, "epoch": index, "lexicon": lexicon}
    return editing.corrupt(clean, torch.ones_like(clean).bool(), MODEL, **keys, **settings), clean, index


def optimum(noise, chance):
    """`[256, 4, 4]`: of what is read and the place, the law that a table learns at replaced tokens."""
    state = (noise.noisy_input_ids * 4 ** torch.arange(4)).sum(-1)
    place, mass = state[:, None] * 4 + torch.arange(4), torch.zeros(256 * 4, 4, dtype=torch.double)
    counted = noise.edited & (chance[:, None] > 0)
    weights = (noise.weights * chance[:, None])[counted]
    mass.index_put_((place[counted], noise.labels[counted]), weights, accumulate=True)
    logits = mass.clamp(min=1e-300).log().requires_grad_()
    weighted_loss(logits[place[counted]], noise.labels[counted], weights, 1).backward()
    assert logits.grad.abs().max() < 1e-14  # the loss is convex in the logits
    return (mass / mass.sum(-1, keepdim=True)).view(256, 4, 4)


def test_optimum_of_replaced_tokens_is_the_bayes_posterior(monkeypatch):
    """Over all masks, replaced places and tokens of a chain of four; the noise's own law is in it for the *others*."""
    rate, shares = 0.3, COUNTS[:3].double() / 10
    rows, law = words(4)
    cases, chances = [], []
    for kinds in itertools.product((None, MASK, 0, 1, 2), repeat=4):  # visible as it is, masked, replaced by …
        hidden, replaced = [kind == MASK for kind in kinds], [kind in (0, 1, 2) for kind in kinds]
        if not any(hidden):
            continue
        cases.append((hidden, replaced, [(kind or 0) % MASK for kind in kinds]))
        chance = 1 / 4 / math.comb(4, sum(hidden)) * (1 - rate) ** kinds.count(None)
        chances.append(chance * math.prod(rate * shares[kind].item() for kind in kinds if kind in (0, 1, 2)))
    noise, _, index = enumerated(monkeypatch, cases, rows, edit_source="unigram", edit_rate=rate)
    assert sum(chances) == pytest.approx(1)
    found = optimum(noise, torch.tensor(chances, dtype=torch.double)[index] * law.repeat(len(cases)))
    checked = 0
    for state in itertools.product(range(4), repeat=4):
        visible = [place for place in range(4) if state[place] != MASK]
        for place in visible if len(visible) < 4 else ():
            expected = torch.zeros(3, dtype=torch.double)
            for size, others in subsets([other for other in visible if other != place]):
                same = [other for other in visible if other not in (place, *others)]
                fits = (rows[:, same] == torch.tensor([state[other] for other in same])).all(-1)
                drawn = math.prod(shares[state[other]].item() for other in others)
                part = law * fits * drawn * rate ** (size + 1) * (1 - rate) ** len(same) / (size + 1)
                expected.index_add_(0, rows[:, place], part)
            code = sum(kind * 4**column for column, kind in enumerate(state))
            torch.testing.assert_close(found[code, place, :3], expected / expected.sum(), atol=1e-10, rtol=0)
            checked += 1
    assert checked == 4 * 3 + 6 * 9 * 2 + 4 * 27 * 3


def subsets(items):
    return ((size, chosen) for size in range(len(items) + 1) for chosen in itertools.combinations(items, size))


def test_drafts_of_one_mask_teach_the_law_given_all_others(monkeypatch):
    """Exactly, whatever the model drafts."""
    rows, law = words(4)
    cases = [
        ([place == mask for place in range(4)], [False] * 4, [kind] * 4) for mask in range(4) for kind in range(3)
    ]
    kinds = torch.tensor([kind[0] for _, _, kind in cases])

    def draft(noisy, where, of):
        return torch.nn.functional.one_hot(kinds[of // len(rows)], 4).double()

    settings = {"edit_source": "self", "draft_rate": 0.25, "draft": draft, "most": 1}
    noise, clean, index = enumerated(monkeypatch, cases, rows, **settings)
    assert (noise.edited.sum(-1) == 1).all() and not (noise.noisy_input_ids == MASK).any()
    context = (clean.masked_fill(noise.edited, MASK) * 4 ** torch.arange(4)).sum(-1)
    model = torch.rand(256, 3, generator=torch.Generator().manual_seed(0)).double()
    model = (model / model.sum(-1, keepdim=True))[context, kinds[index]]
    found = optimum(noise, law.repeat(len(cases)) * model / 4)
    codes = (rows * 4 ** torch.arange(4)).sum(-1)
    torch.testing.assert_close(found[codes][..., :3], left_out(rows, law), atol=1e-14, rtol=0)
