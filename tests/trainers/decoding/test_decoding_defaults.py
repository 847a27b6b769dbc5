"""What a model was trained for stands in its `generation_config.json`, and `generate` without arguments obeys it."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from training_cases import KINDS, SHAPE, build_trainer, make_rows, run, weights
from transformers import AutoModelForCausalLM, GenerationConfig

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAGenerationConfig
from nanollada.trainers.data.prepare import PreparedData
from nanollada.trainers.decoding import threshold
from nanollada.trainers.decoding.defaults import longest_row, set_defaults
from nanollada.trainers.diffusion import DiffusionTrainer

ANSWERS = {"trained_length": 15, "eos_policy": "cut"}
BLOCKS = {"eos_padding": "block", "eos_padding_block": 4}
CASES = {
    "AR text": ("causal", "pretrain", {}, {"max_new_tokens": 7}),
    "AR answers": ("causal", "sft", {}, {"max_new_tokens": 15}),
    "text": ("diffusion", "pretrain", {}, {"trained_length": 15, "max_new_tokens": 7}),
    "text in blocks": ("diffusion", "pretrain", {"block_length": 4}, {"trained_length": 15, "max_new_tokens": 7}),
    "growing": (
        "diffusion",
        "sft",
        BLOCKS,
        {**ANSWERS, "block_length": 4, "grow_length": True, "max_new_tokens": 15},
    ),
    "canvas": ("diffusion", "sft", {"eos_padding": "max_length"}, {**ANSWERS, "max_length": 15}),
    "no padding": ("diffusion", "sft", {"eos_padding": "none"}, {**ANSWERS, "max_length": 15}),
    "answers in blocks": ("diffusion", "sft", {**BLOCKS, "block_length": 4}, {**ANSWERS, "max_new_tokens": 15}),
}


def prepared(format):
    return PreparedData(datasets.Dataset.from_list(make_rows()), None, format, {"max_length": 99})


def decoding_in(folder):
    """All that a checkpoint says of lengths and denoising."""
    content = json.loads((folder / "generation_config.json").read_text())
    plain = {*vars(GenerationConfig())} - {"max_new_tokens", "max_length"}
    return {name: value for name, value in content.items() if name not in plain}


@pytest.mark.parametrize("case", CASES)
def test_what_each_kind_of_training_says(case, tmp_path):
    kind, format, settings, expected = CASES[case]
    trainer = build_trainer(kind, tmp_path, **settings)
    trainer.rows = prepared(format)
    trainer.save_model(str(tmp_path / "model"))
    assert decoding_in(tmp_path / "model") == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.tensor([[1, 5, 6]])
    width = expected.get("max_length") or 3 + expected["max_new_tokens"]
    assert model.generate(prompt, eos_token_id=29).shape[1] <= width
    wide = {"eos_policy": "none"} if kind == "diffusion" else {}
    assert model.generate(prompt, suppress_tokens=[3, 29], eos_token_id=29, **wide).shape[1] == width


def test_what_was_said_before_goes(tmp_path):
    """A checkpoint's lengths and its way of denoising were about other training; how tokens are drawn stays."""
    before = {"max_length": 9, "factor": 1.0, "steps": 3, "grow_length": True, "threshold": 0.5, "temperature": 0.7}
    trainer = build_trainer("diffusion", tmp_path, block_length=4)
    trainer.model.generation_config = NanoLLaDAGenerationConfig(**{**before, "factor": None}, eos_token_id=2)
    trainer.rows = prepared("sft")
    trainer.save_model(str(tmp_path / "model"))
    after = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (after.pop("temperature"), after.pop("eos_token_id")) == (0.7, 2)
    assert decoding_in(tmp_path / "model") == {**ANSWERS, "max_new_tokens": 15}
    causal = build_trainer("causal", tmp_path).model
    for name, value in before.items():  # an AR model that begins with a diffusion checkpoint
        setattr(causal.generation_config, name, value)
    set_defaults(causal, {"max_new_tokens": 5})
    assert not {"factor", "steps", "grow_length", "threshold"} & {*vars(causal.generation_config)}
    assert (causal.generation_config.max_new_tokens, causal.generation_config.max_length) == (5, None)
    assert causal.generation_config.temperature == 0.7


def test_a_checkpoint_says_what_its_own_phase_is_for(tmp_path):
    """In a phase of whole rows answers grow in blocks; in blocks of 2 that would be an error."""
    schedule = "[[0.5, 2], [0.5, 0]]"
    trainer = build_trainer("diffusion", tmp_path, **BLOCKS, block_length_schedule=schedule, max_steps=2, save_steps=1)
    trainer.args.save_strategy = "steps"
    trainer.rows = prepared("sft")
    trainer.train()
    blocks, rows = (decoding_in(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert "block_length" not in blocks and "grow_length" not in blocks
    assert (rows["block_length"], rows["grow_length"]) == (4, True)


def test_the_longest_row():
    assert longest_row(prepared("sft")) == 15
    assert longest_row(PreparedData(SimpleNamespace(), None, "sft", {"max_length": 99})) == 99, "a stream"
    chosen = prepared("sft")
    chosen.train = chosen.train.select([0, 1])
    assert longest_row(chosen) == 9


def chats(path, count):
    words = "cat dog mat log rain sun wind snow".split()
    lines = []
    for i in range(count):
        turns = [("user", words[i % 8]), ("assistant", f"the {words[i // 8 % 8]}")]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def as_json(facts):
    return json.loads(json.dumps(facts))


@pytest.fixture
def job(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return {
        "data": chats(tmp_path / "train.jsonl", 24),
        "eval_data": chats(tmp_path / "eval.jsonl", 16),
        "max_length": 64,
        "tokenizer_name_or_path": tmp_path / "tokenizer",
        **SHAPE,
        "eos_padding": "block",
        "eos_padding_block": 8,
        "eval_samples": 2,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "ema_decay": 0.5,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
        "threshold_rows": 5,
        "output_dir": tmp_path / "run",
    }


def test_a_run_writes_them_and_generate_obeys(job, tmp_path, monkeypatch):
    """The threshold is that of the weights that are saved; it is not chosen again, and goes where it holds no more."""
    seen = []

    def kept(model, *args):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return decode_rows(model, *args)

    decode_rows, folder = threshold.decode_rows, tmp_path / "run"
    monkeypatch.setattr(threshold, "decode_rows", kept)
    facts = as_json(run("diffusion", job))
    saved = weights(folder)
    assert seen and all(state[name].equal(saved[name]) for state in seen for name in saved)
    choice, written = facts["decoding"]["threshold"], decoding_in(folder)
    assert written == facts["decoding"]["generation_config"] and json.loads((folder / "run.json").read_text()) == facts
    assert choice["rows"] == 5 and choice["tried"][0]["threshold"] is None
    assert written["threshold"] == choice["threshold"] == 0.9, "so little training is sure of nothing"
    longest = written["trained_length"]
    assert longest % 8 == 0 and written["max_new_tokens"] == longest and written["grow_length"] is True
    early = decoding_in(folder / "checkpoint-2")
    assert early == {name: value for name, value in written.items() if name != "threshold"}

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[1, 5, 6]])
    plain = {"max_new_tokens": longest, "block_length": 8, "grow_length": True, "eos_policy": "cut", "threshold": 0.9}
    bare = AutoModelForCausalLM.from_pretrained(folder)
    bare.generation_config = NanoLLaDAGenerationConfig(eos_token_id=2, pad_token_id=0, suppress_tokens=[3])
    assert model.generate(prompt).equal(bare.generate(prompt, **plain))

    seen.clear()
    before = (folder / "generation_config.json").stat().st_mtime_ns
    assert as_json(run("diffusion", job, resume_from_checkpoint="last")) == facts
    assert not seen and (folder / "generation_config.json").stat().st_mtime_ns == before

    rest = {name: value for name, value in job.items() if name not in ("tokenizer_name_or_path", *SHAPE)}
    rest |= {"model_name_or_path": folder, "max_steps": 1, "output_dir": tmp_path / "next", "threshold_rows": 0}
    facts = run("diffusion", rest, block_length=8)
    assert facts["decoding"]["threshold"] == {"threshold": None, "reason": "`threshold_rows` is 0"}
    assert decoding_in(tmp_path / "next") == {**ANSWERS, "trained_length": longest, "max_new_tokens": longest}


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionTrainer, "is_fsdp_enabled", True, raising=False)
    model = KINDS["diffusion"].model_class(NanoLLaDAConfig(vocab_size=30, **SHAPE))
    monkeypatch.setattr(
        "nanollada.trainers.base.NanoLLaDATrainer.__init__",
        lambda self, model, args: vars(self).update(model=model, args=args) or self.set_up_objective(),
    )
    monkeypatch.setattr(DiffusionTrainer, "is_deepspeed_enabled", False, raising=False)
    args = KINDS["diffusion"].config_class(output_dir=str(tmp_path), threshold_rows=8, use_cpu=True)
    with pytest.raises(ValueError, match="`threshold_rows` needs whole weights on every rank.*, got 8"):
        DiffusionTrainer(model, args)
    with pytest.raises(ValueError, match="`threshold_rows` must be >= 0, got -1"):
        KINDS["diffusion"].config_class(output_dir=str(tmp_path), threshold_rows=-1)
