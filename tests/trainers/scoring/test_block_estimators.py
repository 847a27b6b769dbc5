"""What training averages is what evaluation enumerates: every estimator's mean against the exact block bound."""

import math

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.noise.blocks import block_ids_of
from nanollada.trainers.noise.masking import MASK_COUNTS, corrupt
from nanollada.trainers.noise.schedules import NOISE_SCHEDULES
from nanollada.trainers.objectives import token_cross_entropy
from nanollada.trainers.scoring.likelihood import exact_nelbo, model_inputs

MASK, DRAWS = 3, 30000  # 1/p has heavy tails: a tenth of them is not enough for a normal error
IDS = [0, 4, 6, 5, 4, 6, 1]
PACKED = {  # two documents, of 4 and 3 tokens
    "document_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=7, initializer_range=0.5, **shape)).double().eval()
    return model.requires_grad_(False)


def row(packed=False):
    ids = torch.tensor([IDS])
    labels = ids.masked_fill(torch.arange(7) == 0, -100)
    if packed:
        labels = labels.masked_fill(PACKED["position_ids"] == 0, -100)
    return {"input_ids": ids, "labels": labels, **(PACKED if packed else {})}


def losses(model, batch, block_length, draws=DRAWS, **settings):
    """Σ weight·CE of every row in as many copies, as a trainer computes it; with `complementary` of every pair."""
    batch = {name: value.expand(draws, -1) for name, value in batch.items()}
    index = torch.arange(draws)
    documents = (batch.get("position_ids"), batch.get("document_ids"))
    noise = corrupt(
        batch["input_ids"],
        batch["labels"] != -100,
        model.config,
        seed=5,
        index=index,
        rank=index,
        epoch=torch.zeros_like(index),
        block_ids=block_ids_of(block_length, *documents, batch["input_ids"].shape),
        time_epsilon=1e-5,
        **settings,
    )
    nats = cross_entropies(model, noise, batch, block_length)
    losses = (nats * noise.weights).view(-1, draws, nats.shape[1])  # [copies, draws, L]
    some = slice(0, min(draws, 100))  # the trainers' own forward
    ids = batch["input_ids"][some]
    inputs = {name: value[some] for name, value in model_inputs(batch).items()}
    inputs |= {"labels": noise.labels[some], "loss_weights": noise.weights[some], "num_items_in_batch": 1}
    fast = model(noise.noisy_input_ids[some], clean_input_ids=ids, block_length=block_length, **inputs).loss
    torch.testing.assert_close(fast.double(), losses[0, some].sum(), rtol=1e-9, atol=0)
    return losses.sum((0, 2))


def cross_entropies(model, noise, batch, block_length):
    """`[rows, L]`: of the masked tokens, from one vectorised forward; equal rows are computed once."""
    noisy, which = noise.noisy_input_ids.unique(dim=0, return_inverse=True)
    batch = {name: value[:1].expand(len(noisy), -1) for name, value in batch.items()}
    masked = noisy == MASK
    inputs = {**model_inputs(batch), "clean_input_ids": batch["input_ids"], "block_length": block_length}
    logits = model(noisy, logits_to_keep=masked, **inputs).logits
    nats = torch.zeros(masked.shape, dtype=torch.double)
    nats[masked] = token_cross_entropy(logits, batch["input_ids"][masked])
    return nats[which]


@pytest.mark.parametrize("block_length", [1, 2, 4, 7])
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("mask_count", MASK_COUNTS)
@pytest.mark.parametrize("complementary", [False, True])
def test_estimators_average_to_the_block_bound(model, block_length, schedule, mask_count, complementary):
    exact = exact_nelbo(model, row(), block_length).item()
    settings = {"mask_count": mask_count, "noise_schedule": schedule, "complementary": complementary}
    found = losses(model, row(), block_length, **settings)
    assert abs(found.mean().item() - exact) <= 3 * found.std().item() / math.sqrt(DRAWS) + 1e-9


@pytest.mark.parametrize("mask_count", MASK_COUNTS)
@pytest.mark.parametrize("complementary", [False, True])
def test_estimators_of_packed_documents(model, mask_count, complementary):
    exact = exact_nelbo(model, row(packed=True), 2).item()
    found = losses(model, row(packed=True), 2, mask_count=mask_count, complementary=complementary)
    assert abs(found.mean().item() - exact) <= 3 * found.std().item() / math.sqrt(DRAWS)


def test_exact_counts_are_ar_training_at_block_one(model):
    """One token a block is always masked: every single draw is the exact bound, without any variance."""
    exact = exact_nelbo(model, row(), 1)
    torch.testing.assert_close(losses(model, row(), 1, draws=4), exact.expand(4), rtol=1e-12, atol=0)


def test_exact_counts_scatter_less():
    """At each block length than the Bernoulli masks of the same schedule; the bound itself grows with the block."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=7, **shape)).double().requires_grad_(False)
    for block_length in (1, 2, 4, 7):
        exact, bernoulli = (losses(model, row(), block_length, mask_count=name).std() for name in MASK_COUNTS)
        assert exact < 0.8 * bernoulli
