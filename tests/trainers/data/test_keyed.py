"""The rows of optimizer step s depend on (seed, s) alone: against a plain loop over the definition of their order."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from step_cases import (
    KINDS,
    STEPS,
    SaveBefore,
    build,
    cases,
    facts_of,
    make_rows,
    plain_run,
    run_cases,
    stream_of,
)

from nanollada.trainers.data.keyed import (
    MicroBatches,
    PreparedSteps,
    StepCollator,
    StepShape,
    StreamedSteps,
    Window,
    digest_of,
)

HERE = Path(__file__).parents[2]
TOLERANCE = 2e-6  # float32, after seven steps of SGD


def assert_as_one_run(found, folder):
    """Each run of a case: the plain loop's weights and losses, and bit for bit those of the other runs."""
    for (accumulation, streaming, data, kind), runs in found.items():
        weights, losses = plain_run(kind, data, folder, streaming)
        first = next(iter(runs.values()))
        for at, run in runs.items():
            case = (accumulation, streaming, data, kind, at)
            assert torch.equal(run["weights"], first["weights"]), case
            assert all(run[name] == first[name] for name in ("losses", "epochs", "tokens", "counts", "train_loss")), (
                case
            )
        assert (first["weights"] - weights).abs().max() <= TOLERANCE, case
        assert first["losses"] == pytest.approx(losses, abs=TOLERANCE), case
        assert first["train_loss"] == pytest.approx(sum(losses) / STEPS, abs=TOLERANCE), case
        assert first["epochs"] == sorted(first["epochs"]) and first["epochs"][-1] >= 2, case
        assert not streaming or first["counts"]["rows"] == (32 if data == "partial" else 42), case


@pytest.mark.parametrize("kind", KINDS)
def test_interruptions_and_accumulation_change_nothing(kind, tmp_path):
    found = run_cases(tmp_path, 1, cases(accumulations=(3,), data=("partial",), kinds=(kind,)), workers=(0,))
    assert len(found) == 2 and all(len(runs) == 4 for runs in found.values())
    assert_as_one_run(found, tmp_path)


def in_two_processes(mode, folder, environment=None):
    """What the ranks of `step_cases` find."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", str(HERE / "step_cases.py"), mode, str(folder)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        **(environment or {}),
    }
    process = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=1200)
    except subprocess.TimeoutExpired:  # killed outright, torchrun would leave its ranks
        process.terminate()
        output, _ = process.communicate()
    assert process.returncode == 0, output[-8000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.slow
def test_the_whole_product_in_one_process(tmp_path):
    """{1, 3 accumulation} × {map, stream} × {0, 2 workers} × {unbroken, three breaks} × rows × objectives."""
    found = run_cases(tmp_path, 1, cases())
    assert sum(map(len, found.values())) == 2 * 2 * 2 * 4 * 3 * 3
    assert_as_one_run(found, tmp_path)


@pytest.mark.slow
def test_the_whole_product_on_two_ranks(tmp_path):
    one = build("causal", "sft", tmp_path / "one", save_strategy="steps", save_steps=100)
    one.add_callback(SaveBefore((3,)))
    one.train()
    found = in_two_processes("ranks", tmp_path)
    resumed, one = found.pop("resumed"), facts_of(one)
    assert sum(map(len, found.values())) == 2 * 2 * 2 * 4 * 3 * 3
    assert_as_one_run(found, tmp_path)
    assert (resumed["weights"] - one["weights"]).abs().max() <= TOLERANCE
    assert resumed["train_loss"] == pytest.approx(one["train_loss"], abs=TOLERANCE)


@pytest.mark.slow
def test_shards_with_blocks(tmp_path):
    """FSDP2, block length 8, one row a rank: a row that fits into one block beside one that does not."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    launcher = str(HERE.parent / "scripts" / "recipes" / "accelerate" / "fsdp2_8gpu.yaml")
    options = launch_command_parser().parse_args(["--config_file", launcher, "--num_processes", "2", "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    sharded = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE", "FSDP"))}
    for data, run in in_two_processes("shards", tmp_path, sharded).items():
        weights, losses = plain_run("block", data, tmp_path, streaming=False, block_length=8)
        assert (run["weights"] - weights).abs().max() <= TOLERANCE
        assert run["losses"] == pytest.approx(losses, abs=TOLERANCE)


# ---- the division of a step


def test_ranks_share_a_steps_rows():
    """Each row on one rank, once; micro-batches idle on all ranks or on none; the division of a single process."""
    for accumulation, ranks, batch in ((1, 1, 4), (3, 1, 2), (1, 2, 3), (3, 2, 1), (2, 3, 2)):
        shapes = [StepShape(batch, accumulation, rank, ranks) for rank in range(ranks)]
        for rows in range(1, shapes[0].rows + 1):
            shares = [[list(shape.share(rows, turn)) for shape in shapes] for turn in range(accumulation)]
            flat = [place for turn in shares for share in turn for place in share]
            assert flat == list(range(rows))  # in the order of a single process's micro-batches
            working = [any(turn) for turn in shares]
            assert working == sorted(working) and sum(working) == shapes[0].micro_batches(rows)


def test_a_pass_is_a_permutation_of_its_own():
    steps = PreparedSteps(make_rows("partial"), StepShape(batch=6, seed=1))
    passes = [[row for step in range(at, at + 3) for row in steps[step, 0][1]] for at in (0, 3)]
    for epoch, rows in enumerate(passes):
        assert sorted(row["index"] for row in rows) == list(range(13))
        assert [row["rank"] for row in rows] == list(range(13)) and {row["epoch"] for row in rows} == {epoch}
    assert [row["index"] for row in passes[0]] != [row["index"] for row in passes[1]]
    assert [steps.window(step).last for step in range(6)] == [False, False, True] * 2


def test_a_stream_is_read_in_its_order():
    """Also from the middle, and back again."""
    steps = StreamedSteps(stream_of(make_rows("partial")), StepShape(batch=6))
    first = [[(row["index"], row["epoch"]) for row in steps[step, 0][1]] for step in range(7)]
    rows = [(place, epoch) for epoch in range(3) for place in range(13)]
    assert first == [rows[0:6], rows[6:12], rows[12:13], rows[13:19], rows[19:25], rows[25:26], rows[26:32]]
    anchor = steps.window(6).anchor
    assert (anchor.epoch, anchor.step, anchor.counts["rows"], anchor.counts["dropped_tokens"]) == (2, 6, 26, 6)
    steps.start(anchor)
    assert [(row["index"], row["epoch"]) for row in steps[6, 0][1]] == first[6]
    assert [(row["index"], row["epoch"]) for row in steps[1, 0][1]] == first[1]


def test_a_resumed_stream_is_read_from_its_pass_on(tmp_path):
    trainer = build("causal", "partial", tmp_path, streaming=True, save_strategy="steps", save_steps=4)
    opened = []
    for resume, passes in ((None, 3), (str(tmp_path / "checkpoint-4"), 2)):
        rows = stream_of(make_rows("partial"))
        inner = rows._read
        rows._read = lambda report, inner=inner: opened.append(report["rows"]) or inner(report)
        rebuilt(trainer, rows=rows).train(resume_from_checkpoint=resume)
        assert opened == [0, 13, 26][-passes:]
        opened.clear()


def test_a_micro_batch_without_rows_is_not_computed(tmp_path):
    """Three steps of a pass with three micro-batches each, but one row for the last step: seven forwards."""
    trainer, seen = build("causal", "partial", tmp_path, accumulation=3, max_steps=3), []
    trainer.model.register_forward_pre_hook(lambda *args: seen.append(1))
    trainer.train()
    assert len(seen) == 7


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("causal", {}),
        ("diffusion", {"mask_count": "bernoulli", "attention_annealing_steps": 3}),
        ("diffusion", {"confidence_weight": 1.0, "repetition_penalty_weight": 1.0}),
        ("block", {"complementary": True, "mask_embedding_noise": 0.1, "mask_embedding_noise_steps": 3}),
        ("block", {"weighting": "unweighted", "mask_rate_band": [0.3, 0.8]}),
    ],
)
def test_a_rank_without_rows_adds_nothing(kind, settings, tmp_path):
    """A loss of 0, and a gradient of 0 for every parameter, which DDP waits for."""
    trainer = build(kind, "sft", tmp_path, **settings)
    trainer.train_dataset = PreparedSteps(make_rows("sft"), StepShape(batch=2, accumulation=3, rank=1, ranks=2))
    trainer.train_dataset.window = lambda step: Window(step, 0, 0, 1, True)
    trainer.create_optimizer()
    trainer.accelerator.gradient_accumulation_steps, trainer.state.max_steps = 1, STEPS
    batch = StepCollator(trainer.data_collator)([trainer.train_dataset[0, 2]])
    assert batch["share"].rows == 0 and not batch["share"].idle and not batch["attention_mask"].any()
    assert trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(9)).item() == 0
    assert all((parameter.grad == 0).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("streaming", [False, True])
def test_drop_last_leaves_out_a_passs_partial_step(streaming):
    rows, shape = make_rows("partial"), StepShape(batch=2, accumulation=3, drop_last=True)
    steps = StreamedSteps(stream_of(rows), shape) if streaming else PreparedSteps(rows, shape)
    assert [steps.window(step).rows for step in range(5)] == [6] * 5
    assert [steps.window(step).epoch for step in range(5)] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="`dataloader_drop_last` needs 6 rows for a full step, got 5 in a pass"):
        (StreamedSteps if streaming else PreparedSteps)(rows[:5], shape).window(0)


def test_a_stream_without_rows_is_refused():
    with pytest.raises(ValueError, match="`train_dataset` must hold rows, got 0 in a pass"):
        StreamedSteps(iter([]), StepShape(batch=2)).window(0)


def test_keys_of_a_pass():
    keys = MicroBatches(accumulation=2, per_pass=3)
    keys.begin(4)
    assert [key for (key,) in keys] == [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1)] and len(keys) == 6
    with pytest.raises(TypeError, match="no length"):
        len(MicroBatches(2, None))


# ---- what would change a step's rows is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"per_device_train_batch_size": 3},
            r"rows per step \(.per_device_train_batch_size.*: checkpoint-1 has 6, got 3",
        ),
        ({"gradient_accumulation_steps": 2}, "checkpoint-1 has 6, got 12"),
        ({"seed": 7}, "needs the run's `seed`.*: checkpoint-1 has 42, got 7"),
        ({"dataloader_drop_last": True}, "needs the run's `dataloader_drop_last`.*: checkpoint-1 has False, got True"),
    ],
)
def test_a_run_goes_on_with_its_own_steps(changed, message, tmp_path):
    build("causal", "sft", tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    settings = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, **changed}
    trainer = rebuilt(build("causal", "sft", tmp_path), **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    fewer = rebuilt(build("causal", "sft", tmp_path), rows=make_rows("sft")[:9])
    with pytest.raises(ValueError, match="needs the run's number of rows.*: checkpoint-1 has 12, got 9"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    others = rebuilt(build("causal", "sft", tmp_path), rows=make_rows("sft")[::-1])
    with pytest.raises(ValueError, match="needs the run's rows, in their order .SHA-256.*: checkpoint-1 has [0-9a-f]"):
        others.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_digest_of_rows_is_that_of_their_tokens_targets_and_order(tmp_path):
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    table = datasets.Dataset.from_list([{**row, "num_bytes": 3} for row in rows])
    others = [rows[::-1], [{"input_ids": [1], "labels": [-100]}, {"input_ids": [2, 3], "labels": [2, 3]}]]
    others += [[{**rows[0], "labels": [1, 2]}, rows[1]], rows[:1]]
    digests = [digest_of(table), *(digest_of(datasets.Dataset.from_list(other)) for other in others)]
    digests += [digest_of(rows), *map(digest_of, others)]
    assert len(set(digests)) == len(digests)  # a list's is another than a table's
    table.save_to_disk(tmp_path)
    kept = datasets.load_from_disk(tmp_path)
    assert digest_of(kept) == digests[0] == digest_of(kept.select([1, 0]).select([1, 0]))


def rebuilt(trainer, rows=None, **settings):
    """The trainer with other settings or rows."""
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    return type(trainer)(trainer.model, trainer.args, trainer.data_collator, rows or trainer.train_dataset.rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "must leave split_batches at False.*got True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "must leave dispatch_batches at None.*got True"),
    ],
)
def test_settings_that_would_change_a_steps_rows(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("causal", "sft", tmp_path, **settings)


def test_what_a_trainer_would_ignore_is_refused(tmp_path):
    trainer = build("causal", "sft", tmp_path)
    rows = trainer.train_dataset.rows
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"`{name}` must be None: losses and scores are the objective's own"):
            type(trainer)(trainer.model, trainer.args, trainer.data_collator, rows, **{name: len})
    with pytest.raises(ValueError, match=r"`eval_dataset` must be one .*got a dict \['a', 'b'\]"):
        trainer.evaluate({"a": rows, "b": rows})
    with pytest.raises(ValueError, match="`predict` has no meaning here"):
        trainer.predict(rows)
