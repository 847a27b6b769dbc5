"""The noise of structural editing against lists, a row at a time from the same numbers; labels of all small pairs."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from nanollada.modeling_nanollada.structural_nanollada import restructure
from nanollada.trainers.noise import masking, structural
from nanollada.trainers.noise.corruption import Lexicon
from nanollada.trainers.noise.keys import keyed_uniform
from nanollada.trainers.noise.registry import CORRUPTIONS
from nanollada.trainers.noise.structural import edit_labels

EOS, MASK, DELETE, INSERT, FIRST, VOCABULARY = 2, 3, 4, 5, 6, 16
CONFIG = SimpleNamespace(mask_token_id=MASK, delete_token_id=DELETE, insert_token_id=INSERT, eos_token_id=EOS)
TEXT = torch.arange(VOCABULARY) >= FIRST
LEXICON = Lexicon(TEXT, (1 + torch.arange(VOCABULARY) % 3).masked_fill(~TEXT, 0))


def executed(ids, labels):
    every = torch.ones_like(ids, dtype=torch.bool)
    return restructure(ids, labels, every, torch.zeros_like(every), MASK, (DELETE, INSERT))[0]


def executed_on_lists(draft, labels):
    """The new block, and how many tokens went over its end."""
    out = []
    for token, label in zip(draft, labels, strict=True):
        out += [] if label == DELETE else [MASK, token] if label == INSERT else [label]
    return (out + [MASK] * len(draft))[: len(draft)], max(len(out) - len(draft), 0)


@pytest.mark.parametrize(("kinds", "width"), [(2, 1), (2, 2), (2, 3), (2, 4), (3, 3)])
def test_every_small_draft_comes_to_its_target(kinds, width):
    """Of all drafts with masks and all targets; an insertion never costs a token."""
    tokens = range(FIRST, FIRST + kinds)
    drafts = list(itertools.product([MASK, *tokens], repeat=width))
    pairs = list(itertools.product(drafts, itertools.product(tokens, repeat=width)))
    draft, target = (torch.tensor([pair[part] for pair in pairs]) for part in (0, 1))
    length = torch.full((len(pairs),), width)
    for _ in range(3):
        labels = edit_labels(draft, target, length, MASK, DELETE, INSERT)
        found = [executed_on_lists(*pair) for pair in zip(draft.tolist(), labels.tolist(), strict=True)]
        draft = executed(draft, labels)
        assert draft.tolist() == [row for row, _ in found] and not any(lost for _, lost in found)
    assert torch.equal(draft, target)


def test_the_reports_figure_executed():
    """2.2's Figure 2: its labels K K S K K K D I K lead to a row with one mask, whose label is the missing word."""
    words = {word: FIRST + place for place, word in enumerate("no man step in the river ever twice same".split())}
    words |= {"[MASK]": MASK, "D": DELETE, "I": INSERT}
    draft, published, between, target = (
        torch.tensor([[words[word] for word in text.split()]])
        for text in (
            "no man step step in the the river twice",
            "no man ever step in the D I twice",
            "no man ever step in the [MASK] river twice",
            "no man ever step in the same river twice",
        )
    )
    assert torch.equal(executed(draft, published), between)
    length = torch.tensor([9])
    assert torch.equal(edit_labels(between, target, length, MASK, DELETE, INSERT), target)
    # the report's rules themselves label the draft otherwise: of one token for one, the first is replaced
    assert torch.equal(edit_labels(draft, target, length, MASK, DELETE, INSERT), target)


# ---------------------------------------------------------------------------------------------------------------------
# A row's noise.


def plain_labels(draft, target):
    """Rules of the report (5.2) behind a subsequence by tables of lists."""
    worth = [[(0, 0)] * (len(target) + 1) for _ in range(len(draft) + 1)]
    for i, j in itertools.product(reversed(range(len(draft))), reversed(range(len(target)))):
        worth[i][j] = max(worth[i + 1][j], worth[i][j + 1])
        if draft[i] in (MASK, target[j]):
            size, tokens = worth[i + 1][j + 1]
            worth[i][j] = max(worth[i][j], (size + 1, tokens + (draft[i] != MASK)))
    labels, start, first, i, j = [DELETE] * len(draft), 0, 0, 0, 0
    while i < len(draft) and j < len(target):
        size, tokens = worth[i + 1][j + 1]
        fits = draft[i] in (MASK, target[j]) and worth[i][j] == (size + 1, tokens + (draft[i] != MASK))
        if not fits:
            i, j = (i + 1, j) if worth[i + 1][j] == worth[i][j] else (i, j + 1)
            continue
        count = min(i - start, j - first)
        labels[start : start + count] = target[first : first + count]
        labels[i] = INSERT if j - first > i - start else target[j]
        start, first, i, j = i + 1, j + 1, i + 1, j + 1
    return labels


def runs_of(targets, *parts):
    """Neighbouring targets with the same block and document."""
    runs = []
    for place in (place for place, target in enumerate(targets) if target):
        same = runs and runs[-1][-1] == place - 1 and all(part[place] == part[place - 1] for part in parts)
        runs[-1].append(place) if same else runs.append([place])
    return runs


def plain_row(ids, hidden, runs, uniform, rate, given):
    """`uniform(stream)`: the row's numbers. Its noisy ids and labels."""
    noisy, labels = list(ids), [-100] * len(ids)
    source = "uniform" if given["edit_source"] == "uniform" else "unigram"
    numbers = {stream: uniform(stream) for stream in range(17, 22)}
    extra, other = (LEXICON.draw(numbers[stream], source).tolist() for stream in (20, 21))
    missing, too_many, replaced = (numbers[stream].tolist() for stream in (17, 18, 19))
    for run in runs:
        draft = []
        for place in run:
            if too_many[place] < rate * given["insert_rate"]:
                draft.append(extra[place])
            if missing[place] < rate * given["drop_rate"]:
                continue
            change = ids[place] >= FIRST and replaced[place] < rate * given["edit_rate"]
            draft.append(MASK if hidden[place] else other[place] if change else ids[place])
        draft = (draft + [MASK] * len(run))[: len(run)]
        for place, token, label in zip(run, draft, plain_labels(draft, [ids[place] for place in run]), strict=True):
            noisy[place], labels[place] = token, label
    return noisy, labels


@pytest.mark.parametrize("source", ["uniform", "unigram"])
@pytest.mark.parametrize("case", ["row", "blocks", "documents", "both"])
def test_each_row_by_lists(case, source):
    """Answers in several turns, ends of text, blocks and documents that cut them: nothing else is touched."""
    draw, count, length = random.Random(4), 60, 23
    ids = torch.tensor([[draw.choice([EOS, *range(FIRST, VOCABULARY)]) for _ in range(length)] for _ in range(count)])
    targets = torch.tensor([[draw.random() < 0.85 for _ in range(length)] for _ in range(count)])
    targets[0] = False
    documents = torch.tensor([[0] * at + [1] * (length - at) for at in (draw.randrange(length) for _ in range(count))])
    blocks = (torch.arange(length) // 5).expand(count, length)
    parts = {"block_ids": blocks if case in ("blocks", "both") else None}
    parts["document_ids"] = documents if case in ("documents", "both") else None
    given = {name: value for kind in CORRUPTIONS["structural"].settings for name, value in vars(kind()).items()}
    given |= {"edit_source": source, "structural_rows": 0.7, "drop_rate": 0.5, "insert_rate": 0.6, "edit_rate": 0.4}
    given |= {"edit_rows": 0.0}
    index = torch.arange(count) * 7
    keys = {"seed": 5, "index": index, "rank": index, "epoch": torch.full_like(index, 2)}
    noise = structural.corrupt(ids, targets, CONFIG, **keys, lexicon=LEXICON, **parts, **given)
    names = vars(masking.MaskingSettings())
    plain = masking.corrupt(
        ids, targets, CONFIG, **keys, block_ids=parts["block_ids"], **{name: given[name] for name in names}
    )
    chosen = 0
    for row in range(count):
        key = (5, index[row : row + 1], keys["epoch"][row : row + 1])
        share, rate = keyed_uniform(*key, 16, 2)[0].tolist()
        if not (share < 0.7 and targets[row].any()):
            for name in ("noisy_input_ids", "labels", "weights"):
                assert torch.equal(getattr(noise, name)[row], getattr(plain, name)[row])
            continue
        chosen += 1
        runs = runs_of(targets[row].tolist(), *(part[row].tolist() for part in parts.values() if part is not None))
        hidden = plain.supervised[row].tolist()
        numbers = lambda stream, key=key: keyed_uniform(*key, stream, length)[0]  # noqa: E731
        noisy, labels = plain_row(ids[row].tolist(), hidden, runs, numbers, rate, given)
        assert noise.noisy_input_ids[row].tolist() == noisy and noise.labels[row].tolist() == labels
        visible = [place for place in range(length) if targets[row, place] and noisy[place] != MASK]
        assert noise.edited[row].nonzero()[:, 0].tolist() == [p for p in visible if labels[p] != noisy[p]]
    assert 30 < chosen < 55


def test_a_batch_without_spoilt_rows_tells_of_edits_too():
    """Else ranks would differ in whether they have something to add up for the log, and wait for each other."""
    ids = torch.full((2, 6), FIRST)
    given = {name: value for kind in CORRUPTIONS["structural"].settings for name, value in vars(kind()).items()}
    given |= {"edit_rows": 0.0, "structural_rows": 0.01}
    index = torch.arange(2)
    keys = {"seed": 0, "index": index, "rank": index, "epoch": torch.zeros_like(index)}
    noise = structural.corrupt(ids, ids == FIRST, CONFIG, **keys, lexicon=LEXICON, **given)
    assert noise.edited is not None and not noise.edited.any()
