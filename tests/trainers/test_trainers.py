"""Both trainers as a user runs them: the gradient of a step, resuming after a kill, and the files of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import rank
from training_cases import (
    KINDS,
    SETTINGS,
    SHAPE,
    assert_same_gradients,
    build_trainer,
    command_line,
    fresh_model_and_rows,
    make_rows,
    one_step,
    packed_batch,
    run,
    weights,
)

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM
from nanollada.trainers.causal import CausalTrainer
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.diffusion import DiffusionConfig
from nanollada.trainers.resuming.checkpoints import last_complete_checkpoint

SOON = ["causal", "diffusion", pytest.param("block", marks=pytest.mark.slow)]  # where a test starts processes
HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_does_not_change_the_gradient(kind, tmp_path):
    settings = {"variable_length_probability": 0.5} if kind == "diffusion" else {}
    if kind == "block":
        settings = {"block_length": 4, "block_length_schedule": None}
    whole, loss = one_step(kind, tmp_path, 8, 1, **settings)
    for batch, accumulation in ((2, 4), (1, 8)):
        split, split_loss = one_step(kind, tmp_path, batch, accumulation, **settings)
        assert_same_gradients(whole, split)
        assert split_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kind", SOON)
def test_ranks_do_not_change_the_gradient(kind, tmp_path):
    """Two processes of `torchrun` (gloo) with four rows each, against eight rows in one."""
    whole, _ = one_step(kind, tmp_path, 8, 1)
    target = tmp_path / "gradients.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(Path(__file__)), kind, str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "find_unused_parameters" not in done.stderr  # DDP warns where it searches for nothing
    found = torch.load(target)
    assert_same_gradients(whole, found["gradients"])
    alone = build_trainer(kind, tmp_path).likelihood(make_rows(7))  # ranks get four and three rows
    assert found["likelihood"] == pytest.approx(alone.sums())


def test_gradient_is_that_of_the_definition(tmp_path):
    """Σ CE / targets, row by row, in plain PyTorch."""
    gradients, _ = one_step("causal", tmp_path, 8, 1)
    torch.manual_seed(0)
    model = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=30, **SHAPE)).double()
    total = sum(sum(label != -100 for label in row["labels"]) for row in make_rows())
    for row in make_rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(ids).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / total).backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, gradients)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_row_carries_the_trainers_epoch(workers, tmp_path):
    trainer = build_trainer(
        "diffusion", tmp_path, num_train_epochs=3, per_device_train_batch_size=4, dataloader_num_workers=workers
    )
    seen, loss = [], trainer.micro_batch_loss
    trainer.micro_batch_loss = lambda model, inputs, num_items: (
        seen.append((inputs["epoch"], inputs["rank"])) or loss(model, inputs, num_items)
    )
    trainer.train()
    assert [epoch.unique().tolist() for epoch, _ in seen] == [[0], [0], [1], [1], [2], [2]]
    assert torch.cat([rank for _, rank in seen]).tolist() == [*range(8)] * 3


@pytest.fixture
def job(tmp_path, tokenizer):
    """A recipe's settings as a command line, without `output_dir`."""
    settings = {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "hidden_dropout": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 12,
        "logging_steps": 2,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
    }
    return settings


@pytest.mark.parametrize("kind", SOON)
def test_a_killed_run_goes_on_bit_for_bit(kind, job, tmp_path):
    """kill −9 in mid-training, `--resume_from_checkpoint last`: the weights of the unbroken run."""
    job["max_steps"] = 24
    if kind != "causal":
        job["variable_length_probability"] = 0.3
    if kind == "block":  # the run is killed before or after a change of block length
        job |= {**SETTINGS[kind], "mask_embedding_noise": 0.1, "mask_embedding_noise_steps": 9, "complementary": True}
    run(kind, job, output_dir=tmp_path / "unbroken")
    script = Path(sys.modules[CausalTrainer.__module__].__file__).parents[1] / KINDS[kind].program
    command = [sys.executable, str(script), *command_line(job, output_dir=tmp_path / "killed")]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and any(line["step"] == 6 for line in read_metrics(metrics.parent))):
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = last_complete_checkpoint(tmp_path / "killed")
    assert int(killed_at.rpartition("-")[2]) < 24 and not (tmp_path / "killed" / "run.json").exists()

    with pytest.raises(ValueError, match="`output_dir` must not hold checkpoints of another run.*checkpoint-"):
        run(kind, job, output_dir=tmp_path / "killed")
    run(kind, job, output_dir=tmp_path / "killed", resume_from_checkpoint="last")
    expected, resumed = weights(tmp_path / "unbroken"), weights(tmp_path / "killed")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    steps = [[line["step"] for line in read_metrics(tmp_path / name)] for name in ("unbroken", "killed")]
    assert steps[0] == steps[1]
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("unbroken", "killed")
    ]
    assert losses[0] == losses[1]


def test_the_run_from_text_to_diffusion(job, tmp_path):
    """AR, diffusion from AR, and the files that each leaves."""
    ar = run("causal", job, output_dir=tmp_path / "ar", plot_loss=True)
    shape = {name: value for name, value in job.items() if name not in (*SHAPE, "tokenizer_name_or_path")}
    shape |= {"model_name_or_path": tmp_path / "ar", "load_best_model_at_end": True}
    diffusion = run("diffusion", shape, output_dir=tmp_path / "diffusion", early_stopping_patience=3)

    for name, facts in (("ar", ar), ("diffusion", diffusion)):
        folder = tmp_path / name
        assert json.loads((folder / "run.json").read_text()) == json.loads(json.dumps(facts))
        assert facts["sha256"].keys() == {"config.json", "model.safetensors"}
        files = ("model.safetensors", "tokenizer.json", "modeling_nanollada.py", "trainer_state.json", "metrics.jsonl")
        assert all((folder / file).exists() for file in files)
        for checkpoint in folder.glob("checkpoint-*"):
            config = json.loads((checkpoint / "config.json").read_text())
            assert "AutoModelForCausalLM" in config["auto_map"]
        logs = read_metrics(folder)
        assert any("target_tokens_per_second" in line for line in logs)
        assert any("eval_bits_per_byte" in line for line in logs)
    assert (tmp_path / "ar" / "loss.png").read_bytes()[1:4] == b"PNG"
    assert ar["evaluation"]["tokens"] == diffusion["evaluation"]["tokens"]
    assert ar["evaluation"]["bytes"] == diffusion["evaluation"]["bytes"]
    assert not ar["evaluation"]["bound"] and diffusion["evaluation"]["bound"]
    assert diffusion["init"] == str(tmp_path / "ar") and diffusion["objective"]["mask_count"] == "exact"
    rates = [line["masked_rate"] for line in read_metrics(tmp_path / "diffusion") if "masked_rate" in line]
    assert 0.4 < sum(rates) / len(rates) < 0.65
    evaluations = [line["eval_loss"] for line in read_metrics(tmp_path / "diffusion") if "eval_loss" in line]
    assert diffusion["evaluation"]["nats_per_token"] == pytest.approx(min(evaluations), rel=1e-6)  # the best is kept


def test_streaming_trains_the_same_rows(job, tmp_path):
    """Also with a worker, and after a resumption in the second pass: weights, epochs, and what `run.json` counts."""
    job |= {"streaming": True, "max_steps": 20, "logging_steps": 1, "save_steps": 14, "eval_steps": 14}
    facts = run("diffusion", job, output_dir=tmp_path / "stream")
    assert facts["steps"] == 20 and facts["epochs"] == 2.5 and 2 * 57 + 32 <= facts["data"]["rows"] <= 160
    assert [line for line in read_metrics(tmp_path / "stream") if "eval_loss" in line]
    shutil.copytree(tmp_path / "stream", tmp_path / "broken-off")
    shutil.rmtree(tmp_path / "broken-off" / "checkpoint-20")
    settings = ({"dataloader_num_workers": 1}, {"resume_from_checkpoint": "last"})
    for name, setting in zip(("worker", "broken-off"), settings, strict=True):
        other = run("diffusion", job, output_dir=tmp_path / name, **setting)
        assert all(other[fact] == facts[fact] for fact in ("data", "epochs", "tokens_seen"))
        expected, found = weights(tmp_path / "stream"), weights(tmp_path / name)
        assert all(torch.equal(expected[tensor], found[tensor]) for tensor in expected)


def test_sft_rows_train_on_answers(job, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(60)
    ]
    job["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = run("diffusion", job, output_dir=tmp_path / "sft", eos_padding="block", eos_padding_block=8)
    assert facts["data"]["format"] == "sft" and facts["objective"]["eos_padding"] == "block"
    assert facts["evaluation"]["tokens"] < facts["data"]["target_tokens"]


def test_training_lowers_the_bound(job, tmp_path):
    run("diffusion", job, output_dir=tmp_path / "run", max_steps=40, eval_steps=5, save_steps=60)
    losses = [line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("scheduler", ["warmup_stable_decay", "cosine_with_min_lr"])
def test_learning_rate_schedules(scheduler, tmp_path):
    decay = {"lr_decay_ratio": 0.3} if scheduler == "warmup_stable_decay" else {}
    trainer = build_trainer(
        "causal",
        tmp_path,
        lr_scheduler_type=scheduler,
        learning_rate=1.0,
        warmup_steps=10,
        min_lr_ratio=0.25,
        max_steps=100,
        **decay,
    )
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:11] == sorted(set(rates[:11])) and rates[10] == pytest.approx(1)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.25)
    if scheduler == "warmup_stable_decay":
        assert set(rates[10:70]) == {1.0} and rates[85] < 1
    else:
        assert rates[40] < 1 and rates == rates[:10] + sorted(rates[10:], reverse=True)


def test_repetition_penalty_reaches_the_loss(tmp_path):
    losses = []
    for weight in (0.0, 5.0):
        trainer = build_trainer("diffusion", tmp_path, repetition_penalty_weight=weight)
        torch.nn.init.zeros_(trainer.model.lm_head.weight)
        trainer.model.lm_head.weight.data[7] = 1.0  # drafts repeat one token or another everywhere
        batch = trainer.data_collator([{**row, "rank": 0, "epoch": 0} for row in make_rows()])
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_decay_ratio": 1.5}, r"`lr_decay_ratio` must lie in \[0, 1\], got 1.5"),
        ({"min_lr_ratio": -1.0}, r"`min_lr_ratio` must lie in \[0, 1\], got -1.0"),
        ({"eval_samples": 3}, "`eval_samples` must be a positive even number, got 3"),
        ({"early_stopping_patience": -1}, "`early_stopping_patience` must be >= 0, got -1"),
        ({"early_stopping_patience": 2}, "`early_stopping_patience` needs `load_best_model_at_end`"),
        ({"mask_count": "many"}, "`mask_count` must be one of"),
        ({"eos_padding": "some"}, "`eos_padding` must be one of none, block, max_length, got 'some'"),
        ({"corruption": "some"}, "`corruption` must be one of masking, editing, structural, expansion, got 'some'"),
        ({"block_length": -1}, "`block_length` must be >= 0, got -1"),
        ({"eval_block_length": -1}, "`eval_block_length` must be >= 0, got -1"),
        ({"confidence_weight": -1.0}, "`confidence_weight` must be >= 0, got -1.0"),
        ({"mask_rate_band": [0.8, 0.3]}, r"`mask_rate_band` must be two rates.*got \[0.8, 0.3\]"),
        ({"block_length": 4, "block_length_schedule": "[[1, 4]]"}, "`block_length` must not be given with"),
        ({"block_length_schedule": "[[0.5, 4]]"}, "must have shares that sum to 1, got 0.5"),
        ({"mask_embedding_noise": 0.1}, "`mask_embedding_noise_steps` go together, got 0.1 and 0"),
        ({"eos_padding_block": 0}, "`eos_padding_block` must be >= 1, got 0"),
        ({"variable_length_probability": 2.0}, r"`variable_length_probability` must lie in \[0, 1\], got 2.0"),
        ({"repetition_penalty_weight": -1.0}, "`repetition_penalty_weight` must be >= 0, got -1.0"),
        ({"repetition_penalty_min_run": 1}, "`repetition_penalty_min_run` must be >= 2, got 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(output_dir=str(tmp_path), **settings)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="Several GPUs need one process each.*got 2 in one process"):
        build_trainer("diffusion", tmp_path)


def test_evaluation_needs_rows(tmp_path):
    trainer = build_trainer("diffusion", tmp_path)
    with pytest.raises(ValueError, match="`eval_dataset` must have a row for each of 1 ranks, got None"):
        trainer.evaluate()


def test_block_loss_is_that_of_the_definition(tmp_path):
    """Σ weight·CE / targets, with every block in a forward of its own behind its document's clean prefix."""
    trainer = build_trainer("diffusion", tmp_path, block_length=4)
    batch = packed_batch(trainer)
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    context = {name: batch[name] for name in ("position_ids", "document_ids")}
    noise = trainer.corruption(batch, context)
    total, model = 0.0, trainer.model
    for start, end in ((0, 6), (6, 15)):
        positions = torch.arange(start, end) - start
        for block in (positions // 4).unique():
            inside = start + (positions // 4 == block).nonzero()[:, 0]
            before = slice(start, int(inside[0]))
            row = torch.cat((batch["input_ids"][:, before], noise.noisy_input_ids[:, inside]), 1)
            place = positions[: row.shape[1]][None].expand(4, -1)
            logits = model(row, position_ids=place, block_length=4).logits[:, -len(inside) :]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2),
                batch["input_ids"][:, inside].masked_fill(row[:, -len(inside) :] != 3, 4),
                reduction="none",
            )
            total = total + (losses * noise.weights[:, inside]).sum()
    assert loss.item() == pytest.approx(total.item() / (4 * 13), rel=1e-9)
    assert noise.supervised.any(1).all()


def test_complements_cost_a_second_copy_and_count_targets_once(tmp_path):
    settings = {"block_length_schedule": None, "complementary": True}
    trainer = build_trainer("block", tmp_path, block_length=4, **settings)
    torch.nn.init.zeros_(trainer.model.lm_head.weight)  # a uniform predictor
    batch, shapes = packed_batch(trainer), []
    trainer.model.register_forward_pre_hook(lambda model, args: shapes.append(args[0].shape))
    losses = []
    for seed in range(200):
        trainer.args.seed = seed
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert shapes[0] == (8, 15)
    mean = torch.tensor(losses).mean().item()
    assert mean == pytest.approx(torch.tensor(29.0).log().item(), abs=4 * torch.tensor(losses).std().item() / 200**0.5)


def test_confidence_loss_reaches_the_loss(tmp_path):
    losses = []
    for weight in (0.0, 2.0):
        trainer = build_trainer(
            "block", tmp_path, block_length=4, block_length_schedule=None, confidence_weight=weight
        )
        torch.nn.init.zeros_(trainer.model.lm_head.weight)
        batch = packed_batch(trainer)
        batch["input_ids"][:, 1:6] = batch["labels"][:, 1:6] = 0  # the argmax of equal scores
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] > losses[0] + 0.1


def test_mask_embedding_noise_fades(tmp_path):
    """Gaussian with the given deviation, at masked places only, and gone after the last of its steps."""
    trainer = build_trainer("diffusion", tmp_path, mask_embedding_noise=0.5, mask_embedding_noise_steps=4)
    batch = packed_batch(trainer, 300)
    noise = trainer.corruption(batch, {})
    for step, deviation in ((0, 0.5), (2, 0.25)):
        trainer.state.global_step = step
        added = trainer.embedding_noise(noise, batch)
        assert added.shape == (300, 15, 16) and not added[~noise.supervised].any()
        values = added[noise.supervised]
        assert values.std().item() == pytest.approx(deviation, rel=0.02) and abs(values.mean().item()) < 0.01
        assert (values.abs() > deviation).double().mean().item() == pytest.approx(0.3173, abs=0.01)
    single = {name: value[7:8] for name, value in batch.items()}
    alone = trainer.embedding_noise(trainer.corruption(single, {}), single)
    assert torch.equal(alone[0], added[7])
    trainer.state.global_step = 4
    assert trainer.embedding_noise(noise, batch) is None


if __name__ == "__main__":  # a rank of `test_ranks_do_not_change_the_gradient`
    with rank():
        scored = build_trainer(sys.argv[1], Path(sys.argv[2]).parent / "ranks").likelihood(make_rows(7)).sums()
        computed, _ = one_step(sys.argv[1], Path(sys.argv[2]).parent / "ranks", 4, 1)
    if int(os.environ["RANK"]) == 0:
        torch.save({"gradients": computed, "likelihood": scored}, sys.argv[2])
