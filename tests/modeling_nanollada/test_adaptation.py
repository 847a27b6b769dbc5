"""What an AR start may keep for a while: the shift of its labels, and attention that opens step by step."""

import itertools

import pytest
import torch
from training_cases import SHAPE, assert_same_gradients, build_trainer, make_rows, one_step
from transformers import AutoModelForMaskedLM

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.modeling_nanollada import predicted_from_before
from nanollada.trainers.noise.adaptation import partly_causal_mask
from nanollada.trainers.noise.keys import STREAM_ATTENTION, keyed_uniform
from nanollada.trainers.scoring.likelihood import exact_nelbo

MASK = 3


def build(model_class, **overrides):
    torch.manual_seed(0)
    model = model_class(NanoLLaDAConfig(vocab_size=30, **SHAPE, **overrides)).double().eval()
    with torch.no_grad():  # a model with opinions
        for parameter in model.parameters():
            parameter.mul_(6.0) if parameter.dim() == 2 else None
    return model


def tokens(rows=2, length=7):
    return torch.randint(4, 30, (rows, length), generator=torch.Generator().manual_seed(1))


def unmasked(logits):
    return torch.cat((logits[..., :MASK], logits[..., MASK + 1 :]), dim=-1)


@torch.no_grad()
def test_shift_without_a_future_is_the_ar_model():
    """The first step of a fully annealed, shifted start computes what the AR checkpoint computed."""
    causal = build(NanoLLaDAForCausalLM)
    shifted = build(NanoLLaDAForMaskedLM, label_shift=True)
    shifted.load_state_dict(causal.state_dict())
    ids, nothing = tokens(), torch.zeros(2, 7, 7, dtype=torch.bool)
    mask = partly_causal_mask(nothing, shifted.config, shifted.dtype)
    found, expected = shifted(ids, attention_mask=mask).logits, causal(ids).logits
    torch.testing.assert_close(unmasked(found[:, 1:]), unmasked(expected[:, :-1]))
    torch.testing.assert_close(unmasked(found[:, 0]), unmasked(expected[:, 0]))  # nothing stands before it


@torch.no_grad()
def test_shift_keeps_to_the_document():
    model, ids = build(NanoLLaDAForMaskedLM, label_shift=True), tokens(1, 9)
    alone = torch.cat((model(ids[:, :4]).logits, model(ids[:, 4:]).logits), dim=1)
    documents, positions = torch.tensor([[0] * 4 + [1] * 5]), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = {"document_ids": documents, "position_ids": positions}
    torch.testing.assert_close(model(ids, **packed).logits, alone)
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), ids[:, :4]), dim=1)
    left = model(padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])).logits[:, 2:]
    torch.testing.assert_close(left, alone[:, :4])
    chosen = torch.zeros(1, 9, dtype=torch.bool)
    chosen[0, [1, 4, 8]] = True
    torch.testing.assert_close(model(ids, logits_to_keep=chosen, **packed).logits, alone[chosen])
    hidden = torch.arange(9.0)[None, :, None]
    for sign in ({"document_ids": documents}, {"position_ids": positions}):  # each alone says where a document begins
        assert predicted_from_before(hidden, **sign)[0, :, 0].tolist() == [0, 0, 1, 2, 4, 4, 5, 6, 7]


@torch.no_grad()
def test_labels_are_not_shifted_twice():
    """Loss, bound and generation of a shifted model go through its logits, which stand at their own positions."""
    model, ids = build(NanoLLaDAForMaskedLM, label_shift=True), tokens(2, 5)
    noisy = ids.clone()
    noisy[:, 2] = MASK
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    logits = model(noisy).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 2], ids[:, 2])
    torch.testing.assert_close(model(noisy, labels=labels).loss, expected.float())  # HF's loss is float32
    weights = (labels != -100).double()
    torch.testing.assert_close(
        model(noisy, labels=labels, loss_weights=weights).loss.double(), expected, rtol=1e-6, atol=0
    )
    batch = {"input_ids": ids, "labels": labels, "index": torch.arange(2)}
    torch.testing.assert_close(exact_nelbo(model, batch).mean(), expected)
    written = model.generate(ids, max_new_tokens=1, pad_token_id=0, eos_token_id=2, temperature=0.0)
    last = model(torch.cat((ids, torch.full((2, 1), MASK)), dim=1)).logits[:, -1]
    assert written[:, -1].tolist() == last.argmax(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_visible_future_is_the_mask_it_says(implementation):
    model, ids = build(NanoLLaDAForMaskedLM), tokens()
    model.set_attn_implementation(implementation)
    all_visible = partly_causal_mask(torch.ones(2, 7, 7, dtype=torch.bool), model.config, model.dtype)
    torch.testing.assert_close(model(ids, attention_mask=all_visible).logits, model(ids).logits)
    some = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    padding = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    for options in ({}, {"document_ids": documents}, {"attention_mask": padding}):
        expected = some | torch.ones(7, 7, dtype=torch.bool).tril()  # [B, Q, K]
        for batch, query, key in itertools.product(range(2), range(7), range(7)):
            if "document_ids" in options:
                expected[batch, query, key] &= documents[batch, query] == documents[batch, key]
            if "attention_mask" in options:  # padding sees itself, or its softmax would be of nothing
                expected[batch, query, key] &= bool(padding[batch, key]) or query == key
        mask = partly_causal_mask(some, model.config, model.dtype, **options)
        assert torch.equal(mask[:, 0] if implementation == "sdpa" else mask[:, 0] == 0, expected)
        assert (model(ids, attention_mask=mask).logits - model(ids).logits).abs()[..., 4:].max() > 1e-3
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="`attn_implementation` must be .* annealed, got 'flash_attention_2'"):
        partly_causal_mask(some, model.config, model.dtype)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
def test_flex_attention_sees_the_same_future(shift):
    model, ids = build(NanoLLaDAForMaskedLM, label_shift=shift).float(), tokens(2, 16)
    some = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    options = {"attention_mask": torch.tensor([[1] * 16, [1] * 9 + [0] * 7])}
    inputs = {"input_ids": ids, "position_ids": torch.arange(16).expand_as(ids)}
    expected = model(**inputs, attention_mask=partly_causal_mask(some, model.config, model.dtype, **options)).logits
    model.set_attn_implementation("flex_attention")
    found = model(**inputs, attention_mask=partly_causal_mask(some, model.config, model.dtype, **options)).logits
    real = options["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-6, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="`label_shift` is for whole rows: `block_length` must be None, got 4"):
        NanoLLaDAConfig(label_shift=True, block_length=4)
    ids = tokens()
    with pytest.raises(ValueError, match="`config.label_shift` is for whole rows: .* got `block_length` 2"):
        build(NanoLLaDAForMaskedLM, label_shift=True)(ids, block_length=2)
    shifted = build(NanoLLaDAForMaskedLM, label_shift=True)
    assert shifted(ids, past_key_values=None).logits.shape == (2, 7, 30)
    with pytest.raises(ValueError, match="`approximate_cache` is for models without `config.label_shift`, got 'dual'"):
        build(NanoLLaDAForMaskedLM, label_shift=True).generate(
            ids, max_new_tokens=4, block_length=2, approximate_cache="dual", pad_token_id=0, eos_token_id=2
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_shift": True, "block_length": 4}, r"`label_shift` is for whole rows: .* got \[\(1.0, 4\)\]"),
        ({"attention_annealing_steps": 9, "block_length": 4}, "`attention_annealing_steps` is for whole rows"),
        ({"label_shift": True, "eval_block_length": 2}, "`label_shift` is for whole rows: `eval_block_length` .* 2"),
        ({"attention_annealing_steps": -1}, "`attention_annealing_steps` must be >= 0, got -1"),
    ],
)
def test_trainer_refusals(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_trainer("diffusion", tmp_path, **settings)


@pytest.mark.parametrize("steps", [4, 0.6])
def test_annealing_opens_attention_step_by_step(steps, tmp_path):
    """Rate (step + 1) / steps, the row's own draws (never the batch's), full attention from the last step on."""
    seen = []
    trainer = build_trainer(
        "diffusion",
        tmp_path,
        attention_annealing_steps=steps,
        max_steps=6,
        per_device_train_batch_size=4,
        eval_strategy="no",
    )
    micro_batch_loss = trainer.micro_batch_loss

    def spy(model, inputs, count):
        seen.append((trainer.state.global_step, inputs, trainer.visible_future(inputs)))
        return micro_batch_loss(model, inputs, count)

    trainer.micro_batch_loss = spy
    trainer.train()
    assert [step for step, _, _ in seen] == list(range(6))
    for step, inputs, future in seen:
        if step >= 3:
            assert future is None
            continue
        length = inputs["input_ids"].shape[1]
        assert future.shape == (4, length, length)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        assert future[:, later].double().mean().item() == pytest.approx((step + 1) / 4, abs=0.08)
        draws = keyed_uniform(42, inputs["index"][2:3], inputs["epoch"][2:3], STREAM_ATTENTION, length * length)[0]
        for key in range(length):
            for query in range(key):
                draw = draws[key * (key - 1) // 2 + query]
                assert future[2, query, key] == (draw < (step + 1) / 4)


def test_annealing_does_not_depend_on_the_batch(tmp_path):
    """Rows of unequal length: eight at once and one after the other give the same gradient."""
    settings = {"attention_annealing_steps": 3, "label_shift": True}
    whole, loss = one_step("diffusion", tmp_path, 8, 1, **settings)
    split, split_loss = one_step("diffusion", tmp_path, 1, 8, **settings)
    assert_same_gradients(whole, split)
    assert split_loss == pytest.approx(loss, rel=1e-6)


def test_what_an_ar_start_adds_reaches_the_loss(tmp_path):
    """A trainer's loss at step 0 is that of the model called with this attention; each option moves it."""
    rows, losses = make_rows(), {}
    for name, settings in {
        "plain": {},
        "shift": {"label_shift": True},
        "annealed": {"attention_annealing_steps": 1000},
        "both": {"label_shift": True, "attention_annealing_steps": 1000},
        "noise": {"mask_embedding_noise": 1.0, "mask_embedding_noise_steps": 9},
    }.items():
        model = build(NanoLLaDAForMaskedLM)
        trainer = build_trainer("diffusion", tmp_path, model=model, rows=rows, **settings)
        inputs = next(iter(trainer.get_train_dataloader()))
        model.train()
        trainer.state.max_steps = 1
        losses[name] = trainer.micro_batch_loss(model, inputs, torch.tensor(10))[0].item()
    assert len({round(loss, 6) for loss in losses.values()}) == 5, losses


def test_a_shifted_run_keeps_its_shift(tmp_path):
    trainer = build_trainer("diffusion", tmp_path, label_shift=True, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.objective()["label_shift"] is True
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.config.label_shift
    ids = tokens()
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)
    back = build_trainer("diffusion", tmp_path, model=again, label_shift=False)
    assert not back.model.config.label_shift
