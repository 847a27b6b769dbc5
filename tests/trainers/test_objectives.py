"""Losses: closed forms, and where the gradient may and may not go."""

import math
from types import SimpleNamespace

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.loss_nanollada import FLOOR
from nanollada.trainers.noise.masking import MASK_COUNTS, corrupt
from nanollada.trainers.objectives import (
    confidence_entropy,
    repetition_unlikelihood,
    token_cross_entropy,
    weighted_loss,
)

VOCABULARY = 41
CONFIG = NanoLLaDAConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


def batch(rows=64, length=12, prompt=4):
    torch.manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (rows, length))
    targets = torch.arange(length).expand(rows, -1) >= prompt
    index = torch.arange(rows)
    return ids, targets, {"index": index, "rank": index, "epoch": torch.zeros_like(index), "seed": 5}


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
def test_uniform_predictor_has_loss_ln_of_the_vocabulary_less_the_mask(mask_count):
    ids, targets, keys = batch(rows=20000)
    model = NanoLLaDAForMaskedLM(CONFIG)
    torch.nn.init.zeros_(model.lm_head.weight)
    noise = corrupt(ids, targets, SimpleNamespace(mask_token_id=3), mask_count=mask_count, **keys)
    with torch.no_grad():
        logits = model(noise.noisy_input_ids[:2], logits_to_keep=noise.supervised[:2]).logits
    one = logits[:1].expand(int(noise.supervised.sum()), -1)  # the same for every token
    masked = noise.supervised
    loss = weighted_loss(one, ids[masked], noise.weights[masked], targets.sum())
    spread = (noise.weights.sum(-1) / targets.sum(-1)).std().item() / math.sqrt(20000)
    assert abs(loss.item() / math.log(VOCABULARY - 1) - 1) <= 3 * spread + 1e-6


def test_gradient_is_zero_at_visible_and_prompt_positions():
    ids, targets, keys = batch(rows=8)
    model = NanoLLaDAForMaskedLM(CONFIG)
    noise = corrupt(ids, targets, SimpleNamespace(mask_token_id=3), **keys)
    logits = model(noise.noisy_input_ids).logits
    logits.retain_grad()
    masked = noise.supervised
    weighted_loss(logits[masked], ids[masked], noise.weights[masked], targets.sum()).backward()
    assert (logits.grad[~masked] == 0).all()
    assert (logits.grad[masked].abs().sum(-1) > 0).all()
    assert (logits.grad[..., 3] == 0).all() and torch.isfinite(logits.grad).all()
    embedding = model.get_input_embeddings().weight.grad
    assert torch.isfinite(embedding).all() and embedding[3].abs().sum() > 0


def test_weighted_loss_divides_by_the_steps_targets():
    logits, labels = torch.randn(6, 9), torch.randint(0, 9, (6,))
    weights = torch.rand(6, dtype=torch.double)
    expected = sum(w * -logits[i].log_softmax(-1)[labels[i]] for i, w in enumerate(weights)) / 40
    torch.testing.assert_close(weighted_loss(logits, labels, weights, 40).double(), expected.double())
    parts = [weighted_loss(logits[at], labels[at], weights[at], 40) for at in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(sum(parts), weighted_loss(logits, labels, weights, 40))


def test_cross_entropy_is_computed_in_float32():
    logits, labels = torch.randn(50, 9).bfloat16(), torch.randint(0, 9, (50,))
    losses = token_cross_entropy(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_cross_entropy(logits.float(), labels))
    assert token_cross_entropy(logits.double(), labels).dtype == torch.float64


def logits_for(draft, probability=0.9, vocabulary=10):
    """Logits whose argmax is `draft`, with that probability."""
    rest = (1 - probability) / (vocabulary - 1)
    return torch.full((len(draft), vocabulary), rest).scatter(1, torch.tensor(draft)[:, None], probability).log()


@pytest.mark.parametrize(
    ("clean", "masked", "draft", "min_run", "penalised"),
    [
        ([5, 6, 7, 8], [0, 1, 1, 0], [5, 5], 2, 2),  # 5 5 5 8: two wrong repeats
        ([5, 6, 7, 8], [0, 1, 1, 0], [5, 5], 3, 1),  # only the second ends a run of three
        ([5, 5, 7, 8], [0, 1, 1, 0], [5, 9], 2, 0),  # the repeat is the right token
        ([5, 5, 5, 8], [0, 1, 0, 0], [6], 2, 0),  # a wrong token that repeats nothing
        ([5, 5, 5, 8], [0, 0, 0, 1], [5], 2, 1),  # a right run overrun by the model
        ([5, 6, 5, 6], [1, 0, 1, 0], [6, 6], 2, 1),  # 6 6 6 6: the first place has no left neighbour
    ],
)
def test_unlikelihood_hits_the_models_own_wrong_repeats(clean, masked, draft, min_run, penalised):
    ids, mask = torch.tensor([clean]), torch.tensor([masked], dtype=torch.bool)
    loss = repetition_unlikelihood(logits_for(draft), ids.masked_fill(mask, 3), ids.masked_fill(~mask, -100), min_run)
    assert loss.item() == pytest.approx(penalised * -math.log(1 - 0.9), rel=1e-4)


def test_unlikelihood_never_pushes_a_right_token_down():
    logits = logits_for([5, 5]).requires_grad_()
    loss = repetition_unlikelihood(logits, torch.tensor([[5, 3, 3]]), torch.tensor([[-100, 5, 6]]))
    loss.backward()
    assert (logits.grad[0] == 0).all() and logits.grad[1, 5] > 0


def test_confidence_entropy_is_a_mean_per_row_of_what_is_right():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, VOCABULARY, generator=generator, dtype=torch.double)
    logits[:, 3] = FLOOR  # the mask token
    targets = logits.argmax(-1)
    targets[[1, 5]] += 1  # two predictions are wrong
    rows = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    probs = logits.softmax(-1)
    entropy = torch.special.entr(probs).sum(-1)
    expected = 10 * (entropy[0] + entropy[2]) / 2 + 4 * (entropy[3] + entropy[4]) / 2 + 6 * entropy[6]
    row_targets = torch.tensor([10, 4, 6])
    torch.testing.assert_close(confidence_entropy(logits, targets, rows, row_targets), expected)
    # however a batch is split
    parts = [
        confidence_entropy(logits[p], targets[p], rows[p] - rows[p[0]], row_targets[r])
        for p, r in ((torch.arange(3), slice(0, 1)), (torch.arange(3, 7), slice(1, 3)))
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_confidence_entropy_has_no_gradient_for_wrong_tokens():
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = logits.argmax(-1)
    targets[3:] += 1
    with torch.no_grad():
        logits[:, 3] = FLOOR
    confidence_entropy(logits, targets, torch.zeros(6, dtype=torch.long), torch.tensor([6])).backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[3:].any() and (logits.grad[:3].abs().sum(-1) > 1e-4).all()
    step = (logits - logits.grad).detach()
    before, after = (torch.special.entr(x[:3].softmax(-1)).sum() for x in (logits.detach(), step))
    assert after < before  # it sharpens


def test_confidence_entropy_of_nothing_right_is_zero():
    logits = torch.randn(3, VOCABULARY).requires_grad_()
    wrong = (logits.argmax(-1) + 1) % VOCABULARY
    loss = confidence_entropy(logits, wrong, torch.zeros(3, dtype=torch.long), torch.tensor([3]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
