"""Windows over long texts: each token a target once, enough context, whole blocks, and the scores."""

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.scoring.likelihood import evaluate_likelihood, exact_nelbo
from nanollada.trainers.scoring.rolling import rolling_rows

START, MASK = 0, 3
TEXT = torch.randint(4, 11, (23,), generator=torch.Generator().manual_seed(0)).tolist()


def build(model_class):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model_class(NanoLLaDAConfig(vocab_size=11, initializer_range=0.5, **shape)).double().eval()


def score(model, rows, batch_size=3, **options):
    rows = list(rows)
    batches = [Collator(START)(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    return evaluate_likelihood(model, batches, **options)


@pytest.mark.parametrize("block_length", [None, 1, 3, 4, 8, 12, 20])
@pytest.mark.parametrize("context", [1, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 11, 12, 40, 100])
def test_every_token_is_scored_once_with_its_context(block_length, context, length):
    max_length = 12
    text = list(range(1000, 1000 + length))
    if block_length == 8:  # one block in a row, and none left for the context
        with pytest.raises(ValueError, match=f"`context` must .* got {context} with rows of 12 and blocks of 8"):
            list(rolling_rows(text, max_length, context, START, block_length=block_length))
        return
    options = {"block_length": block_length, "num_bytes": 77, "index": 5}
    rows = list(rolling_rows(text, max_length, context, START, **options))
    whole, scored = [START, *text], []
    for number, row in enumerate(rows):
        ids, labels = row["input_ids"], row["labels"]
        start = whole.index(ids[0])
        assert ids == whole[start : start + len(ids)] and len(ids) <= max_length
        first = next(place for place, label in enumerate(labels) if label != -100)
        assert labels[first:] == ids[first:]
        assert first >= context or start == 0 and first == 1
        if block_length is not None and block_length < max_length:
            assert start % block_length == 0 and (first % block_length == 0 or number == 0)
            assert (start + len(ids)) % block_length == 0 or row is rows[-1]
        assert row["position_ids"] == list(range(len(ids))) and row["document_ids"] == [0] * len(ids)
        scored += labels[first:]
    assert scored == text
    assert [row["index"] for row in rows] == list(range(5, 5 + len(rows)))
    assert sum(row["num_bytes"] for row in rows) == 77
    for row in rows:  # by tokens, up to one byte
        targets = sum(label != -100 for label in row["labels"])
        assert row["num_bytes"] == pytest.approx(77 * targets / length, abs=1)
    assert len(rows) == 1 if length < max_length else len(rows) > 1


def test_a_text_that_fits_has_its_direct_score():
    direct = {"input_ids": torch.tensor([[START, *TEXT]]), "labels": torch.tensor([[-100, *TEXT]])}
    direct |= {"index": torch.tensor([0]), "num_bytes": torch.tensor([9])}
    for model_class, lengths in ((NanoLLaDAForCausalLM, (None,)), (NanoLLaDAForMaskedLM, (None, 1, 4, 7))):
        model = build(model_class)
        for block_length in lengths:
            rows = rolling_rows(TEXT, 24, 4, START, block_length=block_length, num_bytes=9)
            rolled = score(model, rows, samples=4, block_length=block_length)
            assert rolled.sums() == evaluate_likelihood(model, [direct], samples=4, block_length=block_length).sums()


def test_ar_tokens_are_predicted_from_their_window():
    """By the definition: token after token, from what its row holds before it."""
    model, total = build(NanoLLaDAForCausalLM), 0.0
    whole = [START, *TEXT]
    for place in range(1, 24):
        start = 0 if place < 10 else (place - 10) // 6 * 6 + 6  # rows of 10 from 0, 6, 12, 18
        logits = model(torch.tensor([whole[start:place]])).logits[0, -1]
        total -= logits.log_softmax(-1)[whole[place]].item()
    found = score(model, rolling_rows(TEXT, 10, 4, START))
    assert found.nats == pytest.approx(total, abs=1e-9) and found.tokens == 23


def test_diffusion_rows_are_conditional_bounds():
    """Of whole rows, and of blocks: each block given the blocks of its window."""
    model, whole = build(NanoLLaDAForMaskedLM), [START, *TEXT]
    for block_length, windows in (
        (None, [(0, 1, 10), (6, 10, 16), (12, 16, 22), (18, 22, 24)]),
        (3, [(0, 1, 9), (3, 9, 12), (6, 12, 15), (9, 15, 18), (12, 18, 21), (15, 21, 24)]),
    ):
        total = 0.0
        for start, first, end in windows:
            labels = [-100] * (first - start) + whole[first:end]
            row = {"input_ids": torch.tensor([whole[start:end]]), "labels": torch.tensor([labels])}
            total += exact_nelbo(model, row, block_length).item()
        rows = list(rolling_rows(TEXT, 10, 4, START, block_length=block_length))
        found = score(model, rows, samples=512, block_length=block_length)
        assert found.nats == pytest.approx(total, abs=1e-9) and "exact" in found.estimator and found.tokens == 23
        drawn = score(model, rows, samples=2, block_length=block_length)
        again = score(model, rows, batch_size=1, samples=2, block_length=block_length)
        assert again.sums() == pytest.approx(drawn.sums(), rel=1e-10) and drawn.standard_error > 0


def test_context_must_leave_room():
    for context, max_length, block_length, message in (
        (0, 8, None, "got 0 with rows of 8$"),
        (8, 8, None, "got 8 with rows of 8$"),
        (5, 10, 4, "got 5 with rows of 10 and blocks of 4$"),
    ):
        with pytest.raises(ValueError, match=f"`context` must be at least 1 and leave room for targets.*{message}"):
            list(rolling_rows(TEXT, max_length, context, START, block_length=block_length))
    assert len(list(rolling_rows(TEXT, 10, 4, START, block_length=4))) == 5
