"""Trainers called from Python as TRL's are: datasets of every format, models by name, and what they refuse."""

import json

import datasets
import pytest
import torch
from training_cases import SHAPE, run, weights
from transformers import TrainerCallback

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.causal import CausalConfig, CausalTrainer
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.files import DataError
from nanollada.trainers.data.prepare import DataArguments, prepare_data, prepare_datasets
from nanollada.trainers.diffusion import DiffusionConfig, DiffusionTrainer
from nanollada.trainers.models import config_for

QUIET = {"use_cpu": True, "report_to": "none", "plot_loss": False, "disable_tqdm": True, "save_strategy": "no"}
TURNS = [
    [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": f"It is {n}, the cat."}]
    for n in range(24)
]
WORDS = "the cat sat on the mat and the dog on the log".split()
TEXTS = [{"text": " ".join(WORDS[n % 7 :]) + f" {n}."} for n in range(40)]
FORMATS = {
    "texts": TEXTS,
    "messages": [{"messages": turns} for turns in TURNS],
    "strings": [{"prompt": turns[0]["content"], "completion": turns[1]["content"]} for turns in TURNS],
    "turns": [{"prompt": turns[:1], "completion": turns[1:]} for turns in TURNS],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": q["content"]}, {"from": "gpt", "value": a["content"]}]}
        for q, a in TURNS
    ],
}
TRAINERS = {"causal": (CausalTrainer, CausalConfig), "diffusion": (DiffusionTrainer, DiffusionConfig)}
LENGTH = DataArguments(max_length=48)


def fresh(kind, tokenizer):
    torch.manual_seed(42)
    model_class = TRAINERS[kind][0].model_class
    return model_class(config_for(tokenizer, **SHAPE))


def trainer_of(kind, folder, tokenizer, rows, settings=None, **kwargs):
    trainer_class, config_class = TRAINERS[kind]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, **QUIET, **(settings or {})}
    kwargs = {"model": fresh(kind, tokenizer), "processing_class": tokenizer, "data_args": LENGTH, **kwargs}
    args = config_class(output_dir=str(folder), **settings)
    return trainer_class(args=args, train_dataset=rows, **kwargs)


def trained(trainer):
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "kind"), [("texts", "diffusion"), ("turns", "causal"), ("sharegpt", "diffusion")])
def test_a_dataset_trains_as_its_rows_in_a_file(name, kind, tmp_path, tokenizer):
    """The program's weights, bit for bit: the same rows, in the same order, with the same keys."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FORMATS[name]))
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, **QUIET}
    rows = {"data": path, "held_out_fraction": 0.0, "max_length": 48, "tokenizer_name_or_path": tmp_path / "tokenizer"}
    run(kind, {**rows, **SHAPE, **settings}, output_dir=tmp_path / "program")
    trainer = trainer_of(kind, tmp_path / "python", tokenizer, datasets.Dataset.from_list(FORMATS[name]))
    trainer.train()
    trainer.save_model()
    assert_equal(weights(tmp_path / "python"), weights(tmp_path / "program"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_datasets_rows_are_those_of_a_file(name, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FORMATS[name]))
    args, dataset = DataArguments(data=[str(path)], held_out_fraction=0.0, max_length=48), FORMATS[name]
    made, given = prepare_data(args, tokenizer), datasets.Dataset.from_list(dataset)
    for rows in (given, given.to_iterable_dataset(), given.with_format("numpy")):
        rows = prepare_datasets(rows, given, LENGTH, tokenizer)
        assert list(rows.train) == list(made.train) and rows.format == made.format
        assert rows.format == ("pretrain" if name == "texts" else "sft") and len(rows.eval) >= len(made.train)
    assert made.report["target_tokens"] == rows.report["target_tokens"] and made.report["documents"] == len(dataset)


@pytest.mark.parametrize("kind", TRAINERS)
def test_rows_of_input_ids_are_taken_as_they_are(kind, tmp_path, tokenizer):
    """Of `prepare_data`, of TRL's kind with a mask or labels, and of a plain tokenizer."""
    made = prepare_data(
        DataArguments(data=["rows"], held_out_fraction=0.0, max_length=48),
        tokenizer,
        given={"rows": datasets.Dataset.from_list(FORMATS["strings"])},
        **TRAINERS[kind][0].data_settings(TRAINERS[kind][1](output_dir="x", **QUIET)),
    ).train
    expected = trained(trainer_of(kind, tmp_path, tokenizer, made, data_args=None))
    labelled = made.select_columns(["input_ids", "labels"])
    completions = datasets.Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]], "id": "x"}
            for row in made
        ]
    )
    for rows in (labelled, completions, list(made)):
        trainer = trainer_of(kind, tmp_path, tokenizer, rows, data_args=None)
        assert trainer.rows.format == "sft"
        assert [row["num_bytes"] for row in trainer.rows.train] == [row["num_bytes"] for row in made]
        assert_equal(trained(trainer), expected)
    plain = datasets.Dataset.from_list([dict(tokenizer(row["text"])) for row in TEXTS])
    trainer = trainer_of(kind, tmp_path, tokenizer, plain, data_args=None)
    row = trainer.rows.train[0]
    assert trainer.rows.format == "pretrain" and row["labels"] == [-100, *row["input_ids"][1:]]
    assert row["num_bytes"] == len(tokenizer.decode(row["input_ids"][1:]))


BAD_IDS = [
    ({"input_ids": [5, 6], "labels": [5]}, "row 2: wrong length: every column must be as long as `input_ids`, 2"),
    ({"input_ids": [5, 6], "attention_mask": [1, 0]}, "row 2: padding: `input_ids` must not be padded"),
    ({"input_ids": [5, 600]}, "row 2: not in the vocabulary: `input_ids` must be 0 to .*, got 600"),
    ({"input_ids": [5, -1]}, "row 2: not in the vocabulary: `input_ids` must be 0 to .*, got -1"),
    ({"input_ids": None}, "row 2: null value: `input_ids` is null"),
    ({"input_ids": [5, 6], "labels": None}, "row 2: null value: `labels` is null"),
    ({"input_ids": [5, 6], "completion_mask": None}, "row 2: null value: `completion_mask` is null"),
    ({"input_ids": [5, None]}, "row 2: no integers: `input_ids` must hold integers, got None"),
    ({"input_ids": [5, 3]}, "row 2: mask token: `input_ids` hold '<|mask|>'".replace("|", r"\|")),
    ({"input_ids": [5]}, "row 2: no target"),
]


@pytest.mark.parametrize(("row", "message"), BAD_IDS)
def test_broken_rows_of_input_ids_are_named(row, message, tmp_path, tokenizer):
    good = {name: [5, 6] if name != "attention_mask" else [1, 1] for name in row}
    with pytest.raises(DataError, match=f"train_dataset, {message}"):
        trainer_of("causal", tmp_path, tokenizer, datasets.Dataset.from_list([good, row]), data_args=None)


def test_a_stream_and_a_formatting_function(tmp_path, tokenizer):
    """Of rows in the stream's order; a shuffled stream is shuffled anew at each pass."""
    rows = datasets.Dataset.from_list([{"question": row["text"], "id": n} for n, row in enumerate(TEXTS)])
    options = {"formatting_func": lambda row: row["question"]}
    plain = trainer_of("causal", tmp_path, tokenizer, datasets.Dataset.from_list(TEXTS))
    expected = list(plain.rows.train)
    assert list(trainer_of("causal", tmp_path, tokenizer, rows, **options).rows.train) == expected
    stream = trainer_of("causal", tmp_path, tokenizer, rows.to_iterable_dataset(), **options)
    assert list(stream.rows.train) == expected and stream.streaming
    stream.train()
    shuffled = datasets.Dataset.from_list(TEXTS).to_iterable_dataset().shuffle(seed=1, buffer_size=40)
    trainer = trainer_of("causal", tmp_path, tokenizer, shuffled, {"max_steps": 9})
    seen = []
    loss = trainer.micro_batch_loss
    trainer.micro_batch_loss = lambda model, inputs, n: (
        seen.append(inputs["input_ids"][:, 1:]) or loss(model, inputs, n)
    )
    trainer.train()
    per_pass = trainer.record.steps_per_pass
    assert 1 < per_pass <= 8 and not torch.equal(seen[0], seen[per_pass])
    with pytest.raises(ValueError, match="`formatting_func` makes texts: `train_dataset` must have no `input_ids`"):
        trainer_of("causal", tmp_path, tokenizer, plain.rows.train, data_args=None, formatting_func=len)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_model_by_name_with_its_tokenizer_and_an_evaluation(kind, tmp_path, tokenizer):
    """A checkpoint's folder is model and tokenizer; diffusion begins at an AR one, too."""
    for name in ("causal", kind):
        fresh(name, tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        rows, held_out = (datasets.Dataset.from_list(part) for part in (TEXTS[8:], TEXTS[:8]))
        kwargs = {"model": str(tmp_path / name), "processing_class": None, "eval_dataset": held_out}
        trainer = trainer_of(kind, tmp_path / "run", tokenizer, rows, {"max_steps": 1}, **kwargs)
        assert type(trainer.model) is TRAINERS[kind][0].model_class
        assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
        trainer.train()
    score = trainer.evaluate()
    assert score["eval_loss"] > 0 and score["eval_bytes"] == sum(len(row["text"].encode()) for row in TEXTS[:8])
    assert trainer.evaluate(held_out) == score and trainer.evaluate(rows)["eval_bytes"] > score["eval_bytes"]
    trainer.save_model()
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    with pytest.raises(ValueError, match="`push_to_hub` must not be called"):
        trainer.push_to_hub()


def test_what_a_caller_brings(tmp_path, tokenizer, monkeypatch):
    """Callbacks, an optimizer, a collator that knows nothing of noise; without `args` a folder named by the model."""

    class Steps(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    def collate(rows):
        batch = Collator(0)(rows)
        return {name: batch[name] for name in ("input_ids", "labels", "attention_mask") if name in batch}

    rows, steps = datasets.Dataset.from_list(FORMATS["strings"]), Steps()
    expected = trained(trainer_of("diffusion", tmp_path, tokenizer, rows))
    trainer = trainer_of("diffusion", tmp_path, tokenizer, rows, data_collator=collate, callbacks=[steps])
    assert_equal(trained(trainer), expected)
    assert steps.steps == 2
    model = fresh("diffusion", tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    still = trainer_of("diffusion", tmp_path, tokenizer, rows, model=model, optimizers=(optimizer, None))
    assert_equal(trained(still), {n: p.detach() for n, p in fresh("diffusion", tokenizer).named_parameters()})
    monkeypatch.chdir(tmp_path)
    model.name_or_path = "some/where"
    default = DiffusionTrainer(model, train_dataset=rows, processing_class=tokenizer)
    assert default.args.output_dir == "where-diffusion" and type(default.args) is DiffusionConfig
    with pytest.raises(ValueError, match="`data_collator` must return 'labels', got"):
        bad = trainer_of(
            "causal", tmp_path, tokenizer, rows, data_collator=lambda rows: {"input_ids": torch.ones(4, 2)}
        )
        bad.train()


ROWS = datasets.Dataset.from_list(FORMATS["strings"])
REFUSED = [
    ({"train_dataset": None}, "`train_dataset` must be given, or the rows' sources as `data` of `data_args`"),
    (
        {"train_dataset": datasets.DatasetDict(train=ROWS)},
        r"`train_dataset` must be one .*got a DatasetDict \['train'\]",
    ),
    ({"train_dataset": "me/set"}, "`train_dataset` must be one `datasets.Dataset` .*, got a str"),
    ({"train_dataset": TEXTS}, "`train_dataset` must be one .* got a list"),
    ({"eval_dataset": {"a": ROWS}}, r"`eval_dataset` must be one .* got a dict \['a'\]"),
    ({"eval_dataset": ROWS.to_iterable_dataset()}, "`eval_dataset` must have a length"),
    ({"data_args": DataArguments(held_out_fraction=0.5)}, "`held_out_fraction` is for sources: .* got 0.5"),
    ({"data_args": DataArguments(data=["x"])}, "`data` is for sources: it must be left out beside datasets"),
    ({"data_args": DataArguments(max_length=40_000)}, "`max_length` must be at most the model's"),
    ({"data_collator": ROWS}, "`data_collator` must make batches: `train_dataset` comes after it, got a Dataset"),
    ({"processing_class": "runs/ar"}, "`processing_class` must be a tokenizer, got 'runs/ar'"),
    ({"processing_class": None}, "`processing_class` must be given to make rows"),
    ({"args": CausalConfig(output_dir="x", **QUIET)}, "`args` must be a DiffusionConfig, got a CausalConfig"),
    ({"compute_loss_func": len}, "`compute_loss_func` must be None: losses and scores are the objective's own"),
    ({"quantization_config": 1}, "`quantization_config` must be None: a quantised model is none of ours"),
    ({"model_init": len}, "`model_init` must be None: the model is `model`"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_refused_by_name(change, message, tmp_path, tokenizer):
    args = DiffusionConfig(output_dir=str(tmp_path), **QUIET)
    given = {
        "model": fresh("diffusion", tokenizer),
        "args": args,
        "train_dataset": ROWS,
        "processing_class": tokenizer,
    }
    with pytest.raises(ValueError, match=message):
        DiffusionTrainer(**{**given, **change})


def test_a_model_of_the_other_kind_and_args_for_made_rows(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`model` must be a NanoLLaDAForMaskedLM, got a NanoLLaDAForCausalLM"):
        trainer_of("diffusion", tmp_path, tokenizer, ROWS, model=fresh("causal", tokenizer))
    made = trainer_of("causal", tmp_path, tokenizer, ROWS).rows.train
    with pytest.raises(ValueError, match="`data_args` make rows of text: .*, got max_length=48$"):
        trainer_of("causal", tmp_path, tokenizer, made)
    assert NanoLLaDAForMaskedLM.is_diffusion and not NanoLLaDAForCausalLM.is_diffusion
