"""Noise and labels of structural editing: by plain lists, by enumeration, and as an oracle that follows the labels."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from nanollada.modeling_nanollada.structural_nanollada import restructure
from nanollada.trainers.noise import editing, structural
from nanollada.trainers.noise.corruption import Lexicon
from nanollada.trainers.noise.registry import CORRUPTIONS
from nanollada.trainers.noise.structural import edit_labels, matches

MASK, DELETE, INSERT, EOS, FIRST = 3, 4, 5, 2, 6
VOCABULARY = 20
CONFIG = SimpleNamespace(mask_token_id=MASK, delete_token_id=DELETE, insert_token_id=INSERT, eos_token_id=EOS)


def lexicon():
    text = torch.arange(VOCABULARY) >= FIRST
    return Lexicon(text, torch.arange(VOCABULARY).masked_fill(~text, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Labels.


def score(draft, target, pairs):
    """How good a common subsequence is: its length, and then its tokens that are no masks."""
    return len(pairs), sum(draft[i] != MASK for i, _ in pairs)


def best_score(draft, target):
    """By all common subsequences."""
    sizes = range(min(len(draft), len(target)) + 1)
    choices = (itertools.product(*(itertools.combinations(range(len(x)), n) for x in (draft, target))) for n in sizes)
    pairs = (list(zip(rows, columns, strict=True)) for rows, columns in itertools.chain(*choices))
    return max(score(draft, target, own) for own in pairs if all(draft[i] in (MASK, target[j]) for i, j in own))


def plain_labels(draft, target, matched):
    """The rules of LLaDA 2.2's report (5.2), gap by gap, on lists."""
    labels, i, j = [DELETE] * len(draft), 0, 0
    for anchor, match in ((place, found) for place, found in enumerate(matched) if found >= 0):
        here, there = draft[i:anchor], target[j:match]
        for offset, token in enumerate(there[: len(here)]):
            labels[i + offset] = token
        labels[anchor] = INSERT if len(there) > len(here) else target[match]
        i, j = anchor + 1, match + 1
    return labels


def random_pair(draw, width, kinds):
    target = [draw.randrange(FIRST, FIRST + kinds) for _ in range(width)]
    draft = list(target)
    for _ in range(draw.randrange(1, 8)):
        place, change = draw.randrange(len(draft)), draw.choice("SIDM")
        if change == "I":
            draft.insert(place, draw.randrange(FIRST, FIRST + kinds))
        elif change == "D" and len(draft) > 1:
            del draft[place]
        else:
            draft[place] = draw.randrange(FIRST, FIRST + kinds) if change == "S" else MASK
    return (draft + [MASK] * width)[:width], target


def batch(pairs, pad=0):
    """Pairs of several lengths in one batch, what is behind them being noise."""
    width = max(len(draft) for draft, _ in pairs) + pad
    fill = lambda tokens: tokens + [FIRST] * (width - len(tokens))  # noqa: E731
    draft, target = (torch.tensor([fill(pair[part]) for pair in pairs]) for part in (0, 1))
    return draft, target, torch.tensor([len(draft) for draft, _ in pairs])


def test_matches_are_a_longest_common_subsequence_with_the_fewest_masks():
    draw = random.Random(0)
    pairs = [random_pair(draw, draw.randrange(1, 7), 3) for _ in range(60)]
    draft, target, length = batch(pairs, pad=2)
    found = matches(draft, target, length, MASK).tolist()
    for (source, aim), row in zip(pairs, found, strict=True):
        assert row[len(source) :] == [-1] * (len(row) - len(source))
        chosen = [(i, j) for i, j in enumerate(row) if j >= 0]
        assert [j for _, j in chosen] == sorted({j for _, j in chosen})
        assert all(source[i] in (MASK, aim[j]) for i, j in chosen)
        assert score(source, aim, chosen) == best_score(source, aim)


def test_labels_are_the_reports():
    draw = random.Random(1)
    pairs = [random_pair(draw, draw.randrange(1, 33), draw.choice((2, 10))) for _ in range(300)]
    draft, target, length = batch(pairs)
    found = matches(draft, target, length, MASK)
    labels = edit_labels(draft, target, length, MASK, DELETE, INSERT)
    for number, (source, aim) in enumerate(pairs):
        size = len(source)
        assert labels[number, :size].tolist() == plain_labels(source, aim, found[number, :size].tolist())
        assert (labels[number, size:] == -100).all()


def test_the_reports_figure():
    """The draft of 2.2's Figure 2: two words are wrong by the rules, and the labels lead to the target."""
    words = {word: FIRST + place for place, word in enumerate("no man step in the river ever twice same".split())}
    draft = [words[word] for word in "no man step step in the the river twice".split()]
    target = [words[word] for word in "no man ever step in the same river twice".split()]
    labels = edit_labels(*batch([(draft, target)]), MASK, DELETE, INSERT)[0].tolist()
    assert len(labels) == 9 and labels[:2] == target[:2] and labels[-1] == target[-1]
    ids = restructured(torch.tensor([draft]), torch.tensor([labels]))
    again = edit_labels(ids, torch.tensor([target]), torch.tensor([9]), MASK, DELETE, INSERT)
    assert restructured(ids, again).tolist() == [target]


def restructured(ids, labels):
    every = torch.ones_like(ids, dtype=torch.bool)
    return restructure(ids, labels, every, torch.zeros_like(every), MASK, (DELETE, INSERT))[0]


def test_an_oracle_reaches_every_target_in_four_rounds():
    """400 of 400 drafts, of 1.9 rounds on average; the length never changes."""
    draw = random.Random(2)
    draft, target, length = batch([random_pair(draw, 32, 10) for _ in range(400)])
    rounds = torch.zeros(400)
    for _ in range(4):
        rounds += (draft != target).any(1)
        labels = edit_labels(draft, target, length, MASK, DELETE, INSERT)
        draft = restructured(draft, labels)
        assert draft.shape == target.shape and not torch.isin(draft, torch.tensor([DELETE, INSERT])).any()
    assert torch.equal(draft, target) and rounds.max() > 2
    assert float(rounds.mean()) == pytest.approx(1.9, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Noise.


def plain_spoilt(shown, missing, too_many, extra):
    out = []
    for token, gone, more, other in zip(shown, missing, too_many, extra, strict=True):
        out += [other] * more + [token] * (not gone)
    return (out + [MASK] * len(shown))[: len(shown)]


def test_spoiling_by_lists():
    draw = random.Random(3)
    widths = [draw.randrange(1, 9) for _ in range(200)]
    rows = [
        [[draw.randrange(FIRST, VOCABULARY), draw.random() < 0.3, draw.random() < 0.3, 9] for _ in range(width)]
        for width in widths
    ]
    full = [row + [[7, True, True, 9]] * (8 - len(row)) for row in rows]
    parts = torch.tensor(full).unbind(-1)  # [200, 8] each
    inside = torch.arange(8) < torch.tensor(widths)[:, None]
    found = structural.spoil(parts[0], parts[1].bool(), parts[2].bool(), parts[3], inside, MASK)
    for row, width, new in zip(rows, widths, found.tolist(), strict=True):
        assert new[:width] == plain_spoilt(*zip(*row, strict=True)) and new[width:] == [7] * (8 - width)


def spoilt(rows=400, length=24, prompt=4, blocks=None, documents=None, **settings):
    index = torch.arange(rows)
    ids = torch.randint(FIRST, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, :prompt] = False
    given = {"edit_source": "unigram", "structural_rows": 1.0, "mask_rate_band": [0.0, 0.5], **settings}
    given = {**all_defaults(), **given}
    keys = {"seed": 3, "index": index, "rank": index, "epoch": torch.zeros_like(index)}
    noise = structural.corrupt(
        ids, targets, CONFIG, **keys, block_ids=blocks, document_ids=documents, lexicon=lexicon(), **given
    )
    return ids, targets, noise


def all_defaults():
    return {name: value for kind in CORRUPTIONS["structural"].settings for name, value in vars(kind()).items()}


@pytest.mark.parametrize("size", [None, 8])
def test_a_stretch_keeps_its_length_and_nothing_leaves_it(size):
    """The prompt is as it was; following the labels, each block comes to its own target, so nothing crossed over."""
    blocks = None if size is None else (torch.arange(24) // size).expand(400, 24)
    ids, targets, noise = spoilt(blocks=blocks)
    assert torch.equal(noise.noisy_input_ids[~targets], ids[~targets]) and (noise.labels[~targets] == -100).all()
    assert torch.equal(noise.supervised, targets) and not noise.weights[~targets].any()
    assert not torch.isin(noise.noisy_input_ids, torch.tensor([DELETE, INSERT])).any()
    for token in (DELETE, INSERT):
        assert (noise.labels == token).any(1).double().mean() > 0.2
    for first in range(4 if size is None else 8, 24, 20 if size is None else size):
        part = slice(first, first + (20 if size is None else size))
        draft, target = noise.noisy_input_ids[:, part], ids[:, part]
        length = torch.full((400,), target.shape[1])
        labels = edit_labels(draft, target, length, MASK, DELETE, INSERT)
        assert torch.equal(labels, noise.labels[:, part])
        for _ in range(12):
            draft = restructured(draft, edit_labels(draft, target, length, MASK, DELETE, INSERT))
        assert torch.equal(draft, target)


def test_documents_of_a_packed_row_are_stretches():
    documents = (torch.arange(24) // 6).expand(400, 24)
    ids, _, one = spoilt(prompt=0, documents=documents)
    for first in range(0, 24, 6):
        draft, target = one.noisy_input_ids[:, first : first + 6], ids[:, first : first + 6]
        labels = edit_labels(draft, target, torch.full((400,), 6), MASK, DELETE, INSERT)
        assert torch.equal(labels, one.labels[:, first : first + 6])


def test_weights():
    """Masks: their mean times the targets; visible ones a constant each."""
    _, targets, noise = spoilt(site_weight=3.0, anchor_weight=0.5)
    masked = targets & (noise.noisy_input_ids == MASK)
    share = torch.where(masked, noise.weights, 0).sum(1)
    assert torch.allclose(share[masked.any(1)], torch.tensor(20.0).double())
    site = targets & ~masked & (noise.labels != noise.noisy_input_ids)
    assert torch.equal(site, noise.edited) and (noise.weights[site] == 3).all()
    assert (noise.weights[targets & ~masked & ~site] == 0.5).all()


def test_rates():
    """Of a row's targets ρ·rate are missing, and as many too many, ρ uniform: half the rates on average."""
    ids, _, noise = spoilt(rows=4000, edit_rate=0.0, drop_rate=0.2, insert_rate=0.0, mask_rate_band=[0.0, 1e-9])
    assert float((noise.labels == INSERT).double().mean(1).mean() * 24 / 20) < 0.1
    lost = (noise.noisy_input_ids[:, 4:] == MASK).double().sum(1)  # exact masks: one, unless it is missing, too
    assert float(lost.mean()) == pytest.approx(1 + 20 * 0.1 - 0.1, abs=0.15)


@pytest.mark.parametrize("off", [{"structural_rows": 0.0}, {"drop_rate": 0.0, "insert_rate": 0.0}])
def test_off_is_token_editing(off):
    ids, targets, noise = spoilt(**off)
    index = torch.arange(len(ids))
    keys = {"seed": 3, "index": index, "rank": index, "epoch": torch.zeros_like(index)}
    names = [name for kind in CORRUPTIONS["editing"].settings for name in vars(kind())]
    given = {**all_defaults(), "edit_source": "unigram", "mask_rate_band": [0.0, 0.5]}
    plain = editing.corrupt(ids, targets, CONFIG, lexicon=lexicon(), **keys, **{name: given[name] for name in names})
    for name in ("noisy_input_ids", "labels", "weights", "edited"):
        assert torch.equal(getattr(noise, name), getattr(plain, name))


def test_a_rows_noise_is_its_own():
    ids, targets, noise = spoilt(structural_rows=0.5)
    keys = {"seed": 3, "index": torch.tensor([7, 211]), "rank": torch.tensor([7, 211]), "epoch": torch.zeros(2).long()}
    given = {**all_defaults(), "edit_source": "unigram", "structural_rows": 0.5, "mask_rate_band": [0.0, 0.5]}
    alone = structural.corrupt(ids[[7, 211]], targets[[7, 211]], CONFIG, **keys, lexicon=lexicon(), **given)
    for name in ("noisy_input_ids", "labels", "weights"):
        assert torch.equal(getattr(alone, name), getattr(noise, name)[[7, 211]])
    share = (noise.labels == noise.noisy_input_ids).any(1)  # only spoilt rows have labels at tokens that stay
    assert float(share.double().mean()) == pytest.approx(0.5, abs=0.08)


def test_the_optimum_is_the_probability_of_each_operation():
    """
    Texts of three tokens of two kinds, of known law, and with probability 3ε one token too many, from a uniform law: a
    table's best prediction of the labels, by enumeration of the noise, is what Bayes says of `<|delete|>`:
    P(the first token is one too many | draft) = ε · p(texts that go on behind it) / 2 / P(draft).
    """
    kinds, width, rate = (6, 7), 3, 0.1
    weight = {
        text: 1 + 5 * (text == (6, 7, 6)) + 2 * (text == (7, 7, 6)) for text in itertools.product(kinds, repeat=3)
    }
    law = {text: value / sum(weight.values()) for text, value in weight.items()}
    every, labelled = {}, {}
    for text, place, extra in itertools.product(law, (None, 0, 1, 2), kinds):
        chance = law[text] / 2 * (1 - width * rate if place is None else rate)
        more = torch.arange(width)[None] == (-1 if place is None else place)
        shown, nothing = torch.tensor([text]), torch.zeros(1, width, dtype=torch.bool)
        draft = structural.spoil(shown, nothing, more, torch.full_like(shown, extra), ~nothing, MASK)
        label = edit_labels(draft, shown, torch.tensor([width]), MASK, DELETE, INSERT)[0, 0].item()
        key = tuple(draft[0].tolist())
        every[key] = every.get(key, 0) + chance
        labelled[key] = labelled.get(key, 0) + chance * (label == DELETE)
    for draft, total in every.items():
        if draft[0] == draft[1]:
            continue  # either of the two may be the one too many
        behind = sum(value for text, value in law.items() if text[:2] == draft[1:])
        bayes = rate * behind / 2
        assert labelled[draft] / total == pytest.approx(bayes / total, rel=1e-10) and 0.01 < bayes / total < 0.99
        by_hand = (1 - width * rate) * law[draft] + bayes
        for place in (1, 2):
            left = draft[:place] + draft[place + 1 :]
            by_hand += rate / 2 * sum(value for text, value in law.items() if text[:2] == left)
        assert total == pytest.approx(by_hand, rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"drop_rate": 1.5}, r"`drop_rate` must lie in \[0, 1\], got 1.5"),
        ({"structural_rows": -0.1}, r"`structural_rows` must lie in \[0, 1\], got -0.1"),
        ({"site_weight": 0.0}, "`site_weight` must be above 0 .*, got 0.0"),
        ({"anchor_weight": -1.0}, "`anchor_weight` must be >= 0, got -1.0"),
        ({"complementary": True}, "`complementary` masks what .*: `structural_rows` must be 0 with it, got 1.0"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        spoilt(rows=2, **settings)
