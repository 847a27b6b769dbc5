"""Training with token edits: its loss, what the model reads, and that a step does not hang on how it was split."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from ranks import rank
from torch.nn.functional import cross_entropy
from training_cases import (
    SHAPE,
    assert_same_gradients,
    build_trainer,
    fresh_model_and_rows,
    make_rows,
    one_step,
    packed_batch,
    run,
)

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.diffusion import DiffusionConfig, DiffusionTrainer
from nanollada.trainers.noise.editing import EditingSettings

HERE = Path(__file__).parents[1]
BLOCKS = {"block_length": 4, "block_length_schedule": None}
EDITS = {"corruption": "editing", "edit_rows": 0.8, "edit_rate": 0.8, "draft_turns": 2, "draft_temperature": 1.0}


def settings_of(kind, **settings):
    return {**(BLOCKS if kind == "block" else {}), **EDITS, **settings}


NO_DRAFTS = {"draft_rate": 1.0, "draft_temperature": 0.0, "draft_turns": 1}
OFF = [
    {"edit_rows": 0.0},
    {"edit_rate": 0.0, "draft_rate": 0.0},
    {"edit_source": "uniform", "edit_rate": 0.0, **NO_DRAFTS},
]


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_off_is_masking_to_the_bit(kind, tmp_path):
    """Loss and gradient; and with edits on they are others."""

    def loss_and_gradients(**settings):
        trainer = build_trainer(kind, tmp_path, **{**settings_of(kind), **settings})
        loss = trainer.compute_loss(trainer.model, packed_batch(trainer))
        loss.backward()
        return [loss, *(parameter.grad for parameter in trainer.model.parameters())]

    plain = loss_and_gradients(
        corruption="masking", **{name: vars(EditingSettings())[name] for name in list(EDITS)[1:]}
    )
    for off in OFF:
        assert all(map(torch.equal, loss_and_gradients(**off), plain))
    assert not any(map(torch.equal, loss_and_gradients(), plain))


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_accumulation_does_not_change_the_gradient(kind, tmp_path):
    settings = settings_of(kind, keep_weight=0.3)
    whole, loss = one_step(kind, tmp_path, 8, 1, **settings)
    split, split_loss = one_step(kind, tmp_path, 2, 4, **settings)
    assert_same_gradients(whole, split)
    assert split_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_ranks_do_not_change_the_gradient(kind, tmp_path):
    whole, _ = one_step(kind, tmp_path, 8, 1, **settings_of(kind))
    target = tmp_path / "gradients.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(Path(__file__)), kind, str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(target)
    assert_same_gradients(whole, found["gradients"])
    alone = build_trainer(
        kind, tmp_path, per_device_train_batch_size=8, max_steps=2, logging_steps=1, **settings_of(kind)
    )
    alone.train()
    logs = alone.state.log_history[:2]
    for name in ("replaced_rate", "edit_loss", "edit_accuracy"):
        assert found[name] == pytest.approx([line[name] for line in logs], rel=1e-3)


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_loss_is_that_of_the_definition(kind, tmp_path):
    """Σ weight·CE at masks + targets · (mean CE at R + 0.5 · mean CE at what is left alone), row by row."""
    trainer = build_trainer(kind, tmp_path, **settings_of(kind, keep_weight=0.5, edit_weight=2.0))
    batch = packed_batch(trainer, 12)
    context = {name: batch[name] for name in ("position_ids", "document_ids")}
    noise, model = trainer.corruption(batch, context), trainer.model
    loss, masks = trainer.micro_batch_loss(model, batch, 12 * 13)
    clean = batch["input_ids"]
    logits = model(noise.noisy_input_ids, **context, **trainer.block_inputs(clean)).logits
    losses = cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    masked, edited = noise.noisy_input_ids == 3, noise.edited
    assert masks == masked.sum() and 0 < edited.any(-1).sum() < 12
    kept = noise.supervised & ~masked & ~edited
    assert (kept | masked | edited)[edited.any(-1)].sum() == 13 * edited.any(-1).sum() and kept.any()
    total = (losses * noise.weights)[masked].sum()
    for row in range(12):
        for places, weight in ((edited[row], 2.0), (kept[row], 0.5)):
            total = total + (weight * 13 * losses[row][places].mean() if places.any() else 0)
    assert loss.item() == pytest.approx(total.item() / (12 * 13), rel=1e-9)
    # and the log's numbers
    count, replaced, nats, right = trainer._edits.tolist()
    assert (
        count == 12 * 13 and replaced == edited.sum() and nats == pytest.approx(losses[edited].sum().item(), rel=1e-5)
    )
    assert right == (logits.argmax(-1) == clean)[edited].sum()


@pytest.mark.parametrize("kind", ["diffusion", "block"])
def test_drafts_read_what_the_loss_reads(kind, tmp_path):
    """The batch's own rows, with their documents, blocks and clean halves; without dropout and gradients."""
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=30, **SHAPE, hidden_dropout=0.5)).double()
    trainer = build_trainer(kind, tmp_path, model, **settings_of(kind, edit_source="self"))
    batch, model = packed_batch(trainer, 12), trainer.model.train()
    for row in range(1, 12):  # documents of its own
        batch["document_ids"][row] = torch.arange(15) >= row
        batch["position_ids"][row] = torch.arange(15) - row * batch["document_ids"][row]
    context = {name: batch[name] for name in ("position_ids", "document_ids")}
    noise, again = trainer.corruption(batch, context), trainer.corruption(batch, context)
    assert torch.equal(noise.noisy_input_ids, again.noisy_input_ids) and model.training
    where = (torch.arange(15) % 3 == 0).expand(12, -1)
    noisy, rows = batch["input_ids"].masked_fill(where, 3), torch.tensor([7, 2, 19])  # 19: row 7 of a second copy
    logits = trainer.draft(batch)(noisy[rows % 12], where[:3], rows)
    assert not logits.requires_grad and len(logits) == 15
    model.eval()
    expected = model(noisy, **context, **trainer.block_inputs(batch["input_ids"])).logits
    torch.testing.assert_close(logits.view(3, 5, 30), expected[rows % 12][where[:3]].view(3, 5, 30))


def test_drafts_see_as_much_future_as_the_loss(tmp_path):
    """While attention is annealed."""
    trainer = build_trainer("diffusion", tmp_path, **settings_of("diffusion"), attention_annealing_steps=10)
    batch, rows, model = packed_batch(trainer), torch.tensor([2, 1]), trainer.model.train()
    where = torch.ones(2, 15, dtype=torch.bool)
    logits = trainer.draft(batch)(batch["input_ids"][rows], where, rows)
    expected = model(batch["input_ids"][rows], **trainer.context_of(batch, rows)).logits
    trainer.args.attention_annealing_steps = 0
    full = model(batch["input_ids"][rows], **trainer.context_of(batch, rows)).logits
    torch.testing.assert_close(logits, expected.flatten(0, 1))
    assert (expected - full).abs().max() > 1e-4


def test_embedding_noise_is_for_masks_alone(tmp_path):
    """A token that may be wrong is read as it stands."""
    noisy = {"mask_embedding_noise": 0.5, "mask_embedding_noise_steps": 4}
    trainer = build_trainer("diffusion", tmp_path, **settings_of("diffusion"), **noisy)
    batch = packed_batch(trainer, 40)
    noise = trainer.corruption(batch, {})
    added = trainer.embedding_noise(noise, batch).abs().sum(-1)
    assert torch.equal(added > 0, noise.noisy_input_ids == 3) and noise.edited.any()


def test_only_the_noisy_half_is_edited(tmp_path):
    """The clean half, which later blocks are predicted from, holds the row as it is."""
    trainer = build_trainer("block", tmp_path, **settings_of("block"))
    batch, seen = packed_batch(trainer, 40), []
    trainer.model.register_forward_pre_hook(lambda model, args, given: seen.append((args[0], given)), with_kwargs=True)
    trainer.compute_loss(trainer.model, batch)
    noisy, given = seen[-1]
    assert len(seen) == 3 and torch.equal(given["clean_input_ids"], batch["input_ids"])
    changed = (noisy != batch["input_ids"]) & (noisy != 3)
    assert changed.any(-1).sum() > 10 and not changed[batch["labels"] == -100].any()
    for ids, call in seen[:2]:  # the drafts' own
        assert torch.equal(ids[~call["logits_to_keep"]], call["clean_input_ids"][~call["logits_to_keep"]])


@pytest.fixture
def job(tmp_path, tokenizer):
    rows = fresh_model_and_rows(tmp_path, tokenizer)
    steps = {"max_steps": 8, "save_steps": 4, "logging_steps": 2, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "plot_loss": False, "disable_tqdm": True}
    return {**rows, **steps, **quiet, **EDITS, "hidden_dropout": 0.1, "per_device_train_batch_size": 4}


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_unbroken_one(streaming, job, tmp_path):
    """To the bit, drafts included; its record and its log name the edits."""
    job |= {"streaming": streaming, "block_length": 8, "eval_strategy": "steps", "eval_steps": 4}
    facts = run("diffusion", job, output_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    (tmp_path / "broken" / "run.json").unlink()
    again = run("diffusion", job, output_dir=tmp_path / "broken", resume_from_checkpoint="last")
    assert again["sha256"] == facts["sha256"] and again["evaluation"] == facts["evaluation"]
    logs = [
        [
            [line[name] for name in ("loss", "replaced_rate", "edit_loss")]
            for line in read_metrics(folder)
            if "loss" in line
        ]
        for folder in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    objective = json.loads((tmp_path / "whole" / "run.json").read_text())["objective"]
    assert objective["name"] == "masked diffusion bound and token editing" and objective["corruption"] == "editing"
    assert {name: objective[name] for name in EDITS} == EDITS and objective["edit_source"] == "mixed"


def test_evaluation_is_that_of_clean_rows(tmp_path):
    scores = [
        build_trainer("block", tmp_path, held_out=make_rows(6), **settings).evaluate()["eval_loss"]
        for settings in (BLOCKS, settings_of("block"))
    ]
    assert scores[0] == scores[1]


def test_an_adapter_learns_to_edit(tmp_path):
    """LoRA's weights alone are trained; the drafts are the adapted model's."""
    torch.manual_seed(0)
    model, drafts = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=30, **SHAPE)), []
    model.lm_head.weight.data *= 20  # as large as a trained one's
    rows = [{**row, "input_ids": [7] * len(row["labels"])} for row in make_rows()]
    rows = [{**row, "labels": [-100 if label == -100 else 7 for label in row["labels"]]} for row in rows]
    trainer = DiffusionTrainer(
        model,
        DiffusionConfig(
            str(tmp_path),
            **settings_of("diffusion", edit_source="self", edit_rows=1.0, draft_turns=1),
            use_cpu=True,
            max_steps=12,
            learning_rate=3e-2,
            logging_steps=3,
            plot_loss=False,
            save_strategy="no",
            per_device_train_batch_size=8,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], lora_dropout=0.1),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    draft = trainer.draft
    trainer.draft = lambda inputs: drafts.append(trainer.model) or draft(inputs)
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved) and drafts[0] is trainer.model
    losses = [line["edit_loss"] for line in trainer.state.log_history if "edit_loss" in line]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_drafts_need_whole_weights(sharding, tmp_path):
    settings = settings_of("diffusion", edit_source="unigram", **NO_DRAFTS)
    trainer = build_trainer("diffusion", tmp_path, **settings, threshold_rows=0)
    setattr(trainer, sharding, True)
    trainer.set_up_objective()  # noise from the data is no matter of weights
    trainer.args.edit_source = "mixed"
    with pytest.raises(ValueError, match="`corruption` editing with the model's own drafts needs whole weights"):
        trainer.set_up_objective()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edit_rate": 0.2}, "`edit_rate` is for `corruption` editing.*, got 0.2 with masking"),
        ({"corruption": "editing", "edit_rows": -1}, "`edit_rows` must lie in .0, 1., got -1"),
        (
            {"corruption": "editing", "complementary": True, "draft_rate": 0.5},
            "`draft_rate` must be 1 with it, got 0.5",
        ),
        (
            {"corruption": "editing", "edit_source": "uniform", "draft_rate": 0.5},
            "`draft_rate` is for `edit_source` self or mixed, got 0.5 with uniform",
        ),
        (
            {"corruption": "structural", "edit_source": "unigram", "draft_turns": 2},
            "`draft_turns` is for `edit_source` self or mixed, got 2 with unigram",
        ),
        (
            {"corruption": "structural", "repetition_penalty_weight": 0.5},
            "`repetition_penalty_weight` punishes repeated tokens, .* with `structural_rows`, got 0.5",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(str(tmp_path), use_cpu=True, **settings)


def rank_of_a_run(kind, target):
    folder = Path(target).parent / "ranks"
    computed, _ = one_step(kind, folder, 4, 1, **settings_of(kind))
    trainer = build_trainer(
        kind, folder, per_device_train_batch_size=4, max_steps=2, logging_steps=1, **settings_of(kind)
    )
    trainer.train()
    names = ("replaced_rate", "edit_loss", "edit_accuracy")
    return {"gradients": computed} | {name: [line[name] for line in trainer.state.log_history[:2]] for name in names}


if __name__ == "__main__":  # a rank of `test_ranks_do_not_change_the_gradient`
    with rank():
        result = rank_of_a_run(*sys.argv[1:])
    if int(os.environ["RANK"]) == 0:
        torch.save(result, sys.argv[2])
