"""The noise of token editing: its law, its weights, and that a row's noise belongs to the row."""

import math
from types import SimpleNamespace

import pytest
import torch

from nanollada.trainers.noise import editing, masking
from nanollada.trainers.noise.corruption import Lexicon
from nanollada.trainers.noise.editing import EditingSettings
from nanollada.trainers.noise.keys import STREAM_DRAFT, STREAM_EDIT_ROW, keyed_uniform
from nanollada.trainers.noise.masking import MaskingSettings

MASK, EOS = 3, 2
MODEL = SimpleNamespace(vocab_size=12, mask_token_id=MASK, pad_token_id=0, bos_token_id=1, eos_token_id=EOS)
COUNTS = {5: 30, 7: 60, 8: 10}
ROWS = [{"input_ids": [1] + [token] * count, "labels": [-100] + [token] * count} for token, count in COUNTS.items()]
LEXICON = Lexicon.of(ROWS, MODEL)


def batch(rows, length=10, prompt=2, ends=3, epoch=0):
    """Rows of a prompt, `length` tokens of text and `ends` EOS that are targets, too."""
    ids = torch.arange(rows * length).view(rows, length) % 6 + 5
    parts = (torch.full((rows, prompt), 6), ids, torch.full((rows, ends), EOS))
    ids, index = torch.cat(parts, dim=1), torch.arange(rows)
    keys = {"index": index, "rank": index, "epoch": torch.full_like(index, epoch), "seed": 1}
    return ids, (torch.arange(ids.shape[1]) >= prompt).expand_as(ids), keys


def most():
    """A model whose favourite is EOS, and of text the token 9."""

    def draft(noisy, where, rows):
        logits = torch.zeros(int(where.sum()), 12)
        logits[:, EOS], logits[:, 9] = 9.0, 1.0
        return logits

    return draft


def draw(rows, source, draft=None, given=None, blocks=None, **settings):
    ids, targets, keys = given or batch(rows)
    settings = {**vars(MaskingSettings()), **vars(EditingSettings(edit_source=source)), **settings}
    tools = {"lexicon": LEXICON, "draft": draft or most(), "block_ids": blocks}
    return editing.corrupt(ids, targets, MODEL, **keys, **tools, **settings), ids, targets


def chi2(found, shares):
    expected = shares * found.sum()
    used = expected > 0
    assert not found[~used].any()
    statistic = ((found[used] - expected[used]).square() / expected[used]).sum().item()
    return (statistic - (used.sum().item() - 1)) / math.sqrt(2 * (used.sum().item() - 1))


def test_lexicon_counts_text_targets_and_draws_their_law():
    class Tokenizer(list):
        all_special_ids = [8]

    tokenizer = Tokenizer(range(11))
    lexicon = Lexicon.of([{"input_ids": [9, 5, 5, 8, EOS], "labels": [-100, 5, 5, 8, EOS]}], MODEL, tokenizer)
    assert lexicon.text.nonzero()[:, 0].tolist() == [4, 5, 6, 7, 9, 10]
    assert lexicon.counts.tolist() == [0] * 5 + [2] + [0] * 6
    uniform = torch.tensor([[0.0, 0.2999999], [0.3, 0.8999999]], dtype=torch.double)
    assert LEXICON.draw(uniform, "unigram").tolist() == [[5, 5], [7, 7]]
    assert LEXICON.draw(torch.tensor([0.9, 1 - 2.0**-53], dtype=torch.double), "unigram").tolist() == [8, 8]
    grid = (torch.arange(8) + 0.5) / 8
    assert LEXICON.draw(grid.double(), "uniform").tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="`train_dataset` must have targets that are text, got special tokens alone"):
        Lexicon.of([{"input_ids": [5, EOS], "labels": [-100, EOS]}], MODEL)


@pytest.mark.parametrize("source", ["unigram", "uniform"])
def test_law_of_the_replacements(source):
    """Rows, rates, places and tokens follow the formula; a replacement may be the token itself."""
    rows, noise = 20000, None
    noise, ids, targets = draw(rows, source, edit_rows=0.7, edit_rate=0.6)
    plain = masking.corrupt(*batch(rows)[:2], MODEL, **batch(rows)[2])
    text = targets & (ids != EOS)
    visible = text & ~plain.supervised
    assert torch.equal(noise.supervised & ~noise.edited, plain.supervised)  # masks as ever
    assert torch.equal(noise.weights[plain.supervised], plain.weights[plain.supervised])
    assert not noise.edited[~visible].any()
    assert torch.equal(noise.noisy_input_ids[~noise.edited], plain.noisy_input_ids[~noise.edited])
    assert torch.equal(noise.labels[noise.edited], ids[noise.edited])
    # |R| of n visible tokens: a mixture over ρ ~ U[0, 0.6] of binomials, in 70 % of the rows
    for size in (2, 5, 9):
        chosen = noise.edited.sum(-1)[visible.sum(-1) == size]
        rate = (torch.arange(4000).double() + 0.5)[:, None] / 4000 * 0.6
        law = torch.distributions.Binomial(size, rate).log_prob(torch.arange(size + 1).double()).exp().mean(0) * 0.7
        law[0] += 0.3
        assert abs(chi2(torch.bincount(chosen, minlength=size + 1).double(), law)) < 4
    share = LEXICON.counts / 100 if source == "unigram" else LEXICON.text / 8
    assert abs(chi2(torch.bincount(noise.noisy_input_ids[noise.edited], minlength=12).double(), share.double())) < 4
    same = (noise.noisy_input_ids == ids)[noise.edited].double()
    expected = share[ids[noise.edited]].double().mean().item()
    assert abs(same.mean().item() - expected) < 4 * math.sqrt(expected / len(same)) and expected > 0.1


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_law_of_the_drafts(rate):
    """k of n text targets, k uniform up to the rate; all of them written by the model, and no mask stays."""
    noise, ids, targets = draw(6000, "self", edit_rows=1.0, draft_rate=rate)
    text = targets & (ids != EOS)
    assert torch.equal(noise.edited, noise.supervised) and not (noise.edited & ~text).any()
    assert (noise.noisy_input_ids[noise.edited] == 9).all()  # EOS is the model's favourite, and no text
    assert torch.equal(noise.noisy_input_ids[~noise.edited], ids[~noise.edited])
    counts, most_tokens = torch.bincount(noise.edited.sum(-1), minlength=11), int(10 * rate)
    assert counts[0] == 0 and not counts[most_tokens + 1 :].any()
    assert (counts[1 : most_tokens + 1] - 6000 / most_tokens).abs().max() <= 3  # stratified
    assert abs(chi2(noise.edited.double().sum(0), text[0].double() / 10)) < 4


def test_share_of_each_kind_of_row():
    noise, ids, _ = draw(20000, "mixed", edit_rows=0.6, edit_rate=1.0)
    drafted = ~(noise.noisy_input_ids == MASK).any(-1)
    assert abs(drafted.double().mean().item() - 0.3) < 4 * math.sqrt(0.21 / 20000)
    place = noise.edited.any(-1) & ~drafted
    assert 0.2 < place.double().mean().item() < 0.3  # some rows have nothing to replace
    draws = keyed_uniform(1, torch.arange(20000), torch.zeros(20000, dtype=torch.long), STREAM_EDIT_ROW, 4)
    assert torch.equal(drafted, (draws[:, 0] < 0.6) & (draws[:, 1] < 0.5))


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("source", ["self", "unigram", "mixed"])
def test_edits_of_a_row_count_as_their_mean(source, complementary):
    """Σ over R = edit_weight · targets, and over what is left alone keep_weight · targets; halved in a pair."""
    settings = {"edit_rows": 0.8, "edit_rate": 0.7, "edit_weight": 1.5, "complementary": complementary}
    noise, ids, targets = draw(400, source, keep_weight=0.25, **settings)
    copies = 2 if complementary else 1
    assert noise.copies == copies and len(noise.labels) == 400 * copies
    masks = noise.noisy_input_ids == MASK
    kept = noise.supervised & ~masks & ~noise.edited
    for places, weight in ((noise.edited, 1.5), (kept, 0.25)):
        found = torch.where(places, noise.weights, 0.0).sum(-1)[places.any(-1)]
        assert len(found) > 100
        torch.testing.assert_close(found, torch.full_like(found, weight * 13 / copies))
        spread = torch.where(places, noise.weights, 0).amax(-1) - torch.where(places, noise.weights, 99).amin(-1)
        assert spread[places.any(-1)].abs().max() < 1e-12  # a mean: all alike
    edited = noise.edited.any(-1)
    chosen = keyed_uniform(1, torch.arange(400), torch.zeros(400).long(), STREAM_EDIT_ROW, 4)[:, 0] < 0.8
    assert not kept[~chosen.repeat(copies)].any()
    assert (noise.noisy_input_ids[kept] == ids.repeat(copies, 1)[kept]).all()
    text = (targets & (ids != EOS)).repeat(copies, 1)
    assert torch.equal((kept | noise.edited)[edited], (text & ~masks)[edited])
    if complementary and source == "self":
        first, second = noise.edited.chunk(2)
        drafted = first.any(-1) | second.any(-1)
        assert not (first & second).any() and torch.equal((first | second)[drafted], text[:400][drafted])


@pytest.mark.parametrize(
    "settings",
    [{"edit_rows": 0.0}, {"edit_rate": 0.0, "edit_source": "unigram"}, {"edit_rate": 0.0, "draft_rate": 0.0}],
)
def test_off_is_masking(settings):
    ids, targets, keys = batch(60)
    noise, _, _ = draw(
        60, settings.pop("edit_source", "mixed"), keep_weight=1.0, given=(ids, targets, keys), **settings
    )
    plain = masking.corrupt(ids, targets, MODEL, **keys)
    assert noise.edited is None
    assert all(
        torch.equal(getattr(noise, name), getattr(plain, name)) for name in ("noisy_input_ids", "labels", "weights")
    )


@pytest.mark.parametrize("source", ["mixed", "uniform"])
def test_noise_belongs_to_the_row(source):
    """Whatever its batch mates, its place in the batch, and the padding."""

    def draft(noisy, where, rows):  # a row-wise function
        scores = (noisy.sum(-1, keepdim=True) % 7 + torch.arange(12)).cos()[:, None].expand(*noisy.shape, 12)
        return scores[where]

    settings = {"edit_rows": 0.9, "edit_rate": 0.9, "draft_temperature": 1.0, "draft_turns": 3, "draft": draft}
    ids, targets, keys = batch(60)
    whole, _, _ = draw(60, source, given=(ids, targets, keys), **settings)
    pick = torch.tensor([41, 7, 8])
    padded = torch.nn.functional.pad(ids, (0, 9))[pick], torch.nn.functional.pad(targets, (0, 9))[pick]
    some = {name: value[pick] for name, value in keys.items() if name != "seed"} | {"seed": 1}
    # the draft reads the ids alone, and 0 is padding: it sums to nothing
    part, _, _ = draw(3, source, given=(*padded, some), **settings)
    for name in ("noisy_input_ids", "labels", "weights", "edited"):
        assert torch.equal(getattr(part, name)[:, : ids.shape[1]], getattr(whole, name)[pick])
    later, _, _ = draw(60, source, given=batch(60, epoch=1), **settings)
    assert not torch.equal(later.edited, whole.edited)


def test_drafts_are_drawn_from_the_models_law():
    """Of its text alone, at the temperature, with numbers that belong to the row and the turn."""
    noise, _, _ = draw(4000, "self", edit_rows=1.0, draft_temperature=0.5)
    law = torch.where(LEXICON.text, torch.exp(torch.where(torch.arange(12) == 9, 2.0, 0.0)), 0).double()
    found = torch.bincount(noise.noisy_input_ids[noise.edited], minlength=12).double()
    assert abs(chi2(found, law / law.sum())) < 4
    uniform = keyed_uniform(1, torch.arange(4000), torch.zeros(4000).long(), STREAM_DRAFT + (1 << 32), 15)
    nine = (law / law.sum())[:9].sum(), (law / law.sum())[:10].sum()
    expected = (uniform >= nine[0]) & (uniform < nine[1])
    assert torch.equal((noise.noisy_input_ids == 9)[noise.edited], expected[noise.edited])


def test_later_turns_read_the_draft_before():
    """Turn u writes one more than it read; a row stops after its own number of turns."""

    def draft(noisy, where, rows):
        seen.append((noisy.clone(), where.clone(), rows.clone()))
        follows = torch.where(noisy[where] == MASK, 4, noisy[where] + 1)
        return torch.nn.functional.one_hot(follows, 12).double()

    seen = []
    noise, ids, _ = draw(3000, "self", draft, edit_rows=0.5, draft_turns=3)
    rows = noise.edited.any(-1)
    turns = torch.where(noise.edited, noise.noisy_input_ids, 0).amax(-1)[rows] - 3
    assert abs(chi2(torch.bincount(turns, minlength=4)[1:].double(), torch.full((3,), 1 / 3).double())) < 4
    assert len(seen) == 3 and [len(found[0]) for found in seen] == [int((turns >= turn).sum()) for turn in (1, 2, 3)]
    for turn, (noisy, where, of) in enumerate(seen):
        assert torch.equal(of, rows.nonzero()[:, 0][turns > turn]) and torch.equal(where, noise.edited[of])
        assert (noisy[where] == (MASK + turn)).all() and torch.equal(noisy[~where], ids[of][~where])


def test_blocks_draw_for_themselves():
    """A draft has a stratified count in every block; replaced are visible tokens of any block."""
    ids, targets, keys = batch(300)
    blocks = (torch.arange(15) // 4).expand_as(ids)
    noise, _, _ = draw(300, "self", given=(ids, targets, keys), blocks=blocks, edit_rows=1.0)
    text = targets & (ids != EOS)
    for block in range(4):
        inside = (blocks == block) & text
        if inside.any():
            counts = noise.edited[:, (blocks == block)[0]].sum(-1)
            assert counts.min() >= 1 and counts.max() == inside[0].sum()
    noise, _, _ = draw(300, "unigram", given=(ids, targets, keys), blocks=blocks, edit_rate=1.0)
    plain = masking.corrupt(ids, targets, MODEL, block_ids=blocks, **keys)
    assert torch.equal(noise.noisy_input_ids == MASK, plain.supervised) and noise.edited.any(0)[2:12].all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"edit_source": "random"}, "`edit_source` must be one of mixed, self, unigram, uniform, got 'random'"),
        ({"edit_rows": 1.5}, "`edit_rows` must lie in .0, 1., got 1.5"),
        ({"edit_rate": -0.1}, "`edit_rate` must lie in .0, 1., got -0.1"),
        ({"draft_rate": 2}, "`draft_rate` must lie in .0, 1., got 2"),
        ({"draft_temperature": -1}, "`draft_temperature` must be >= 0, got -1"),
        ({"keep_weight": -1}, "`keep_weight` must be >= 0, got -1"),
        ({"edit_weight": 0}, r"`edit_weight` must be above 0 \(`edit_rows` 0 edits nothing\), got 0"),
        ({"draft_turns": 0}, "`draft_turns` must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        draw(2, setting.pop("edit_source", "mixed"), **setting)
