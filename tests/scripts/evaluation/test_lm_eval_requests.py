"""Requests of lm-eval one by one: what keys their noise, what a crash leaves, and which one is at fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval_models import CLASSES, TEXTS, load, save_checkpoints, written

from nanollada.scripts.evaluation.lm_eval_model import greedy_matches
from nanollada.trainers.scoring.continuations import context_ids


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_checkpoints(tokenizer, tmp_path_factory.mktemp("checkpoints"))


class Cache:
    """lm-eval's hook, as `--use_cache` sets it."""

    def __init__(self):
        self.kept = {}

    def add_partial(self, kind, arguments, answer):
        self.kept[kind, json.dumps(arguments)] = answer


LONG = " The dog sat on the log and the bird sang."


def of_rows(kind, arguments, task="t"):
    return [Instance(kind, {}, args, 0, (task, row, 1)) for row, args in enumerate(arguments)]


@pytest.mark.parametrize("name", CLASSES)
def test_a_part_of_the_requests_has_the_numbers_of_all(folder, name, monkeypatch):
    """What is left of a run, in any order, beside another task; every answer is told to the cache."""
    monkeypatch.setattr("nanollada.scripts.evaluation.lm_eval_model.CHUNK", 1)
    lm = load(folder, name, samples=2, max_length=32, rolling_context=8, batch_size=2)
    pairs = of_rows("loglikelihood", [(word, LONG) for word in ("a", "The cat", "")])
    texts = of_rows("loglikelihood_rolling", [(text * 4,) for text in (LONG, TEXTS[0], TEXTS[2])])
    room = {"until": [], "max_gen_toks": 6}
    asked = of_rows("generate_until", [(word, room) for word in ("a", "The cat", "")])
    for method, requests_ in (
        (lm.loglikelihood, pairs),
        (lm.loglikelihood_rolling, texts),
        (lm.generate_until, asked),
    ):
        lm.cache_hook = Cache()
        whole = method(requests_)
        kept = [lm.cache_hook.kept[r.request_type, json.dumps(r.args)] for r in requests_]
        assert kept == whole and len(set(map(str, whole))) == 3
        part = method([*of_rows(requests_[0].request_type, [requests_[1].args], "other"), *requests_[:0:-1]])
        scores = [answer[0] if isinstance(answer, tuple) else answer for answer in (*part[1:], *whole[:0:-1])]
        assert scores[:2] == (scores[2:] if isinstance(scores[0], str) else pytest.approx(scores[2:], rel=1e-9))


def test_a_crash_keeps_what_was_scored(folder, monkeypatch):
    monkeypatch.setattr("nanollada.scripts.evaluation.lm_eval_model.CHUNK", 1)
    lm, matches = load(folder, "ar"), []
    lm.cache_hook = Cache()

    def crash(*args):
        matches.append(args)
        if len(matches) == 3:
            raise RuntimeError("out of memory")
        return [True]

    monkeypatch.setattr("nanollada.scripts.evaluation.lm_eval_model.greedy_matches", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm.loglikelihood(of_rows("loglikelihood", [("a", word) for word in (" b", " cat", " the", " d")]))
    assert len(lm.cache_hook.kept) == 2


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_draws_belong_to_the_row(folder, name):
    options = {"do_sample": True, "max_gen_toks": 6, "until": []}
    asked = of_rows("generate_until", [("The cat", options)] * 20)
    first = load(folder, name, batch_size=3, seed=1).generate_until(asked)
    other = of_rows("generate_until", [("A", options)] * 2, task="other")
    assert load(folder, name, batch_size=8, seed=1).generate_until([*other, *asked])[2:] == first
    assert len(set(first)) > 10
    lm, sizes = load(folder, name, batch_size=8, seed=1), []
    answers = lm._answers
    lm._answers = lambda prompts, *rest: sizes.append(len(prompts)) or answers(prompts, *rest)
    repeated = lm.generate_until([request for request in asked for _ in range(2)])
    assert repeated[::2] == first != repeated[1::2] and sizes == [16, 16, 4, 4]


def test_greedy_matches_know_nothing_of_the_generation_config(folder):
    lm = load(folder, "diffusion")
    context = context_ids(lm.tokenizer, "The cat")
    pairs = [(context, written(lm.model, context, 6))]
    lm.model.generation_config.update(steps=1, repetition_penalty=3.0, remasking="random")
    before = lm.model.generation_config.to_dict()
    assert greedy_matches(lm.model, pairs, 0, 1) == [True]
    assert lm.model.generation_config.to_dict() == before == before | lm.get_model_info()["generation_config"]


def test_greedy_of_ar_computes_the_logits_of_the_continuation_alone(folder):
    lm, shapes = load(folder, "ar"), []
    lm.model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    context = context_ids(lm.tokenizer, LONG)
    first, other = [9, 8], written(lm.model, context, 2)
    shapes.clear()
    assert greedy_matches(lm.model, [(context, first), (context[:4], other), (context, other)], 0, 3)[::2] == [
        False,
        True,
    ]
    assert shapes == [(6, lm.model.config.vocab_size)]


def test_one_block_is_room_enough_for_a_short_text(folder):
    """Whatever `max_length` holds: only a text that has to roll needs a second block."""
    lm = load(folder, "block", max_length=7)
    whole = load(folder, "block").loglikelihood_rolling(of_rows("loglikelihood_rolling", [("The cat",)]))
    assert lm.loglikelihood_rolling(of_rows("loglikelihood_rolling", [("The cat",)])) == pytest.approx(whole)
    with pytest.raises(
        ValueError,
        match="number 1 of task t: `rolling_context` must leave room for a block in `max_length`, got .* of 4 and 7",
    ):
        lm.loglikelihood_rolling(of_rows("loglikelihood_rolling", [("The cat",), (LONG,)]))


def test_faults_are_told_before_anything_is_written(folder, monkeypatch):
    lm = load(folder, "diffusion")
    monkeypatch.setattr(lm, "_answers", lambda *args: pytest.fail("written"))
    good = ("a", {"max_gen_toks": 4})
    for options, message in (
        ({"temperature": 0.5, "top_p": 2.0}, "`top_p` must be"),
        ({"num_beams": 2}, "`generation_kwargs` must be options of `generate`, got num_beams"),
        ({"do_sample": True, "temperature": 0}, "`temperature` must be above 0"),
    ):
        with pytest.raises(ValueError, match=f"`requests`, number 1 of task t: {message}"):
            lm.generate_until(of_rows("generate_until", [good, ("b", {"max_gen_toks": 4, **options})]))


def test_truncation_of_the_draw_is_idle_without_draws(folder, caplog):
    """Several of lm-eval's own tasks give a greedy choice a `top_p`."""
    lm = load(folder, "diffusion")
    settings, _ = lm.settings_of({"do_sample": False, "temperature": 0.7, "top_p": 0.95})
    assert settings == {"temperature": 0.0, "max_new_tokens": 256}
    assert "top_p of the task's `generation_kwargs` is of no use without draws" in caplog.text


def test_text_that_the_vocabulary_lacks(char_tokenizer, tmp_path):
    lm = load(save_checkpoints(char_tokenizer, tmp_path), "ar")
    for request in (
        Instance("loglikelihood", {}, ("a", "€"), 0, ("t", 3, 1)),
        Instance("loglikelihood_rolling", {}, ("€",), 0, ("t", 3, 1)),
        Instance("generate_until", {}, ("€", {}), 0, ("t", 3, 1)),
    ):
        with pytest.raises(
            ValueError, match="`requests`, number 0 of task t: .*€|`requests`, number 0 of task t: .*UNK"
        ):
            getattr(lm, request.request_type)([request])


def test_one_process(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`nanollada` must run in one process, got WORLD_SIZE 2"):
        load(folder, "ar")


EVALUATE = """
import json, pathlib, trace

class Metric:
    def compute(self, references, predictions, **options):
        return {"ours": float(len(predictions))}

def load(name):
    pathlib.Path(__file__).with_name("loaded.json").write_text(json.dumps([name, trace.__file__]))
    return Metric()
"""
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: text
generation_kwargs: {{until: ["."], max_gen_toks: 2}}
metric_list:
  - {{metric: ours, aggregation: mean, higher_is_better: true, hf_evaluate: true}}
"""


def test_a_task_s_metric_comes_from_the_library(folder, tmp_path):
    """`import evaluate` and `import trace` are no programs of ours, which lie beside the one that runs."""
    library = tmp_path / "library" / "evaluate"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(EVALUATE)
    (tmp_path / "data.jsonl").write_text('{"text": "The cat"}\n')
    (tmp_path / "mine.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    script = Path(__file__).parents[3] / "scripts" / "lm_eval_nanollada.py"
    words = f"run --model nanollada --model_args pretrained={folder / 'ar'} --tasks mine --include_path {tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(library.parent), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(script), *words.split(), "--device", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "|mine" in run.stdout, run.stderr[-2000:]
    name, trace = json.loads((library / "loaded.json").read_text())
    assert name == "ours" and script.parent not in Path(trace).parents
