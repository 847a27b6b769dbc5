"""Padding, what a batch leaves out, and rows cut to a random length."""

import random

import pytest
import torch

from nanollada.trainers.data.collator import Collator


def row(index, length=6, prompt=2, documents=1, **extra):
    size = length // documents
    return {
        "input_ids": [10 + index + i for i in range(length)],
        "labels": [-100] * prompt + [10 + index + i for i in range(prompt, length)],
        "document_ids": [i // size for i in range(length)],
        "position_ids": [i % size for i in range(length)],
        "num_bytes": 7 * index,
        "index": index,
        **extra,
    }


def test_equal_rows_need_no_mask():
    batch = Collator(0)([row(1), row(2)])
    assert sorted(batch) == ["index", "input_ids", "labels", "num_bytes"]
    assert batch["input_ids"].tolist() == [row(1)["input_ids"], row(2)["input_ids"]]
    assert batch["index"].tolist() == [1, 2] and batch["num_bytes"].tolist() == [7, 14]
    assert all(value.dtype == torch.long for value in batch.values())


def test_padding():
    batch = Collator(99)([row(1, length=3), row(2, length=5)])
    assert batch["input_ids"][0].tolist() == [11, 12, 13, 99, 99]
    assert batch["labels"][0].tolist() == [-100, -100, 13, -100, -100]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert "document_ids" not in batch and "position_ids" not in batch


def test_documents():
    batch = Collator(0)([row(1, length=3), row(2, length=6, documents=2)])
    assert batch["document_ids"].tolist() == [[0, 0, 0, -1, -1, -1], [0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 0, 1, 2]]


def test_one_document_that_starts_later_keeps_its_positions():
    late = {**row(1), "position_ids": [3, 4, 5, 6, 7, 8]}
    assert Collator(0)([row(0), late])["position_ids"].tolist()[1] == late["position_ids"]


def test_rank_and_epoch_are_passed_on():
    batch = Collator(0)([row(1, rank=4, epoch=2), row(2, rank=5, epoch=2)])
    assert batch["rank"].tolist() == [4, 5] and batch["epoch"].tolist() == [2, 2]


def lengths(rows, **kwargs):
    """Length after the collator, one batch."""
    batch = Collator(0, **kwargs)(rows)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return dict(zip(batch["index"].tolist(), mask.sum(1).tolist(), strict=True)), batch


def test_variable_length_is_uniform_over_targets():
    rows = [row(i, length=12, prompt=2, epoch=0) for i in range(3000)]
    cut, batch = lengths(rows, variable_length_probability=1.0)
    counts = torch.bincount(torch.tensor(list(cut.values())), minlength=13)
    assert counts[:3].sum() == 0  # the prompt stays, and one target at least
    assert (counts[3:] - 300).abs().max() < 75  # 10 lengths, 300 ± 4.5 s.d. each
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        end = int(mask.sum())
        assert (labels[2:end] == ids[2:end]).all() and (labels[end:] == -100).all() and (ids[end:] == 0).all()


def test_variable_length_touches_the_asked_share():
    rows = [row(i, length=12, prompt=2, epoch=0) for i in range(2000)]
    cut, _ = lengths(rows, variable_length_probability=0.2)
    changed = sum(length < 12 for length in cut.values())
    assert abs(changed - 2000 * 0.2 * 0.9) < 75  # 9 of 10 cuts shorten


def test_variable_length_does_not_depend_on_batch_mates():
    rows = [row(i, length=5 + i % 9, prompt=2, epoch=i % 3) for i in range(60)]
    whole, _ = lengths(rows, variable_length_probability=0.5)
    random.Random(0).shuffle(rows)
    apart = {}
    for start in range(0, 60, 7):
        apart |= lengths(rows[start : start + 7], variable_length_probability=0.5)[0]
    assert apart == whole


def test_variable_length_follows_seed_and_epoch():
    def cut(seed, epoch):
        rows = [row(i, length=30, epoch=epoch) for i in range(20)]
        return lengths(rows, variable_length_probability=1.0, seed=seed)[0]

    assert cut(1, 0) == cut(1, 0)
    assert cut(1, 0) != cut(2, 0)
    assert cut(1, 0) != cut(1, 1)


def test_cut_packed_row_keeps_its_documents():
    rows = [row(i, length=12, prompt=0, documents=3, epoch=0) for i in range(20)]
    _, batch = lengths(rows, variable_length_probability=1.0)
    for ids, mask in zip(batch["document_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == [i // 4 for i in range(int(mask.sum()))]
        assert (ids[~mask.bool()] == -1).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`variable_length_probability` must be in \[0, 1\], got 1.5"):
        Collator(0, variable_length_probability=1.5)
    with pytest.raises(ValueError, match="needs rows with an `epoch`"):
        Collator(0, variable_length_probability=0.5)([row(1)])
