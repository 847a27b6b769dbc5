"""Training with structural edits: its loss, how a step may be split, and that a model learns to remove and insert."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_cases import SHAPE, assert_same_gradients, build_trainer, make_rows, one_step, packed_batch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.structural_nanollada import restructure

MASK, DELETE, INSERT = 3, 30, 31
BLOCKS = {"block_length": 4, "block_length_schedule": None}
NOISE = {"structural_rows": 0.8, "drop_rate": 0.6, "insert_rate": 0.6, "edit_rate": 0.5, "edit_source": "unigram"}
OFF = {"structural_rows": 0.0, "edit_rows": 0.0}


def model_of(**shape):
    torch.manual_seed(0)
    config = NanoLLaDAConfig(vocab_size=32, delete_token_id=DELETE, insert_token_id=INSERT, **{**SHAPE, **shape})
    return NanoLLaDAForMaskedLM(config).double()


def settings_of(kind, **settings):
    return {**(BLOCKS if kind == "block" else {}), "corruption": "structural", **NOISE, **settings}


def trainer_of(kind, folder, **settings):
    return build_trainer(kind, folder, model_of(), **settings_of(kind, **settings))


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_off_is_masking_to_the_bit(kind, tmp_path):
    """Noise and loss: nothing is removed or inserted, so nothing is kept open for it."""
    trainer = trainer_of(kind, tmp_path, **OFF)
    plain = build_trainer(kind, tmp_path, model_of(), **(BLOCKS if kind == "block" else {}))
    batch = packed_batch(trainer)
    context = {name: batch[name] for name in ("position_ids", "document_ids")}
    one, other = (each.corruption(batch, context) for each in (trainer, plain))
    for name in ("noisy_input_ids", "labels", "weights", "edited"):
        pair = getattr(one, name), getattr(other, name)
        assert pair == (None, None) or torch.equal(*pair)
    losses = [each.compute_loss(each.model, batch) for each in (trainer, plain)]
    assert torch.equal(*losses)
    nothing = trainer_of(kind, tmp_path, **{**OFF, "structural_rows": 1.0, "drop_rate": 0.0, "insert_rate": 0.0})
    assert torch.equal(nothing.compute_loss(nothing.model, batch), losses[0])


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_accumulation_does_not_change_the_gradient(kind, tmp_path):
    """In micro-batches of one row many have no spoilt one."""
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        settings = settings_of(kind, structural_rows=0.4, edit_rows=0.3)
        results.append(one_step(kind, tmp_path, batch, accumulation, model=model_of(), **settings))
    (whole, loss), (split, split_loss) = results
    assert_same_gradients(whole, split)
    assert split_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_loss_is_that_of_the_definition(kind, tmp_path):
    """Of spoilt rows: targets · mean CE at masks + 2 · ΣCE of what is to change + 0.5 · ΣCE of what is to stay."""
    given = {"structural_rows": 1.0, "site_weight": 2.0, "anchor_weight": 0.5, "mask_rate_band": [0.0, 0.5]}
    trainer = trainer_of(kind, tmp_path, **given)
    batch, seen = packed_batch(trainer, 12), []
    context = {name: batch[name] for name in ("position_ids", "document_ids")}
    noise, model = trainer.corruption(batch, context), trainer.model
    hook = model.register_forward_pre_hook(lambda _, args, given: seen.append((args[0], given)), with_kwargs=True)
    loss, _ = trainer.micro_batch_loss(model, batch, 12 * 13)
    hook.remove()
    clean, targets = batch["input_ids"], batch["labels"] != -100
    ((noisy, call),) = seen
    assert torch.equal(noisy, noise.noisy_input_ids) and torch.equal(noisy[~targets], clean[~targets])
    assert (call["clean_input_ids"] is None) == (kind == "diffusion")  # the clean half is the row as it is
    assert kind == "diffusion" or torch.equal(call["clean_input_ids"], clean)
    logits = model(noisy, **context, **trainer.block_inputs(clean), edit_tokens=True).logits
    losses = cross_entropy(logits.transpose(1, 2), noise.labels, reduction="none")
    total = 0
    for row in range(12):
        masks = targets[row] & (noisy[row] == MASK)
        site = targets[row] & ~masks & (noisy[row] != noise.labels[row])
        stays = targets[row] & ~masks & ~site
        total += 13 * losses[row][masks].mean() if masks.any() else 0
        total += 2 * losses[row][site].sum() + 0.5 * losses[row][stays].sum()
    assert {DELETE, INSERT} <= set(noise.labels.unique().tolist())
    assert loss.item() == pytest.approx(total.item() / (12 * 13), rel=1e-9)


def test_evaluation_is_that_of_clean_rows(tmp_path):
    scores = [
        build_trainer("block", tmp_path, model_of(), held_out=make_rows(6), **settings).evaluate()["eval_loss"]
        for settings in (BLOCKS, settings_of("block"))
    ]
    assert scores[0] == scores[1]


# ---------------------------------------------------------------------------------------------------------------------
# A model that counts on from its prompt, modulo 20.

KINDS, LENGTH = 20, 12


def counting(starts):
    """`[B, 1 + LENGTH]`: a start and the twelve tokens behind it."""
    return 4 + (starts[:, None] + torch.arange(LENGTH + 1)) % KINDS


def one_round(model, ids):
    """Every choice at once, the model's best, executed; the prompt stays."""
    with torch.no_grad():
        logits = model(ids, edit_tokens=True).logits
    block = torch.ones_like(ids, dtype=torch.bool)
    block[:, 0] = False
    return restructure(ids, logits.argmax(-1).where(block, ids), block, ~block, MASK, (DELETE, INSERT))[0]


@pytest.mark.slow
def test_a_model_learns_to_remove_and_to_insert(tmp_path):
    """A token too many goes in one round, a missing one comes in two: room, and the token. What is right stays."""
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in counting(torch.arange(KINDS)).tolist() * 20]
    places = {"document_ids": [0] * (LENGTH + 1), "position_ids": [*range(LENGTH + 1)], "num_bytes": LENGTH}
    rows = [{**row, **places, "index": index} for index, row in enumerate(rows)]
    noise = {"structural_rows": 1.0, "drop_rate": 0.2, "insert_rate": 0.2, "edit_rows": 0.0, "edit_rate": 0.0}
    noise |= {"site_weight": 3.0, "mask_rate_band": [0.0, 0.3], "corruption": "structural"}
    settings = {"max_steps": 500, "per_device_train_batch_size": 40, "learning_rate": 6e-3, "logging_steps": 100}
    model = model_of(hidden_size=64, intermediate_size=128).float()
    trainer = build_trainer("diffusion", tmp_path, model, rows, **noise, **settings)
    trainer.train()
    model, right = trainer.model.eval(), counting(torch.arange(KINDS))
    place = 2 + torch.arange(KINDS) % (LENGTH - 3)  # every inner one
    columns = torch.arange(LENGTH + 1)
    behind = columns >= place[:, None]
    other = 4 + (right.gather(1, place[:, None]) - 4 + 7) % KINDS
    more = right.gather(1, (columns - behind.long()).expand_as(right)).where(columns != place[:, None], other)
    fewer = right.gather(1, (columns + behind.long()).clamp(max=LENGTH)).where(columns < LENGTH, MASK)
    for name, draft, rounds in (("right", right, 1), ("more", more, 2), ("fewer", fewer, 2)):
        state = draft
        for _ in range(rounds):
            state = one_round(model, state)
        assert (state == right).all(1).double().mean() >= 0.9, name
    one = one_round(model, more)
    assert ((one == right) | (one == MASK)).all(1).double().mean() >= 0.9  # without the token too many, a mask behind
    assert (one_round(model, fewer).gather(1, place[:, None]) == MASK).double().mean() >= 0.9
