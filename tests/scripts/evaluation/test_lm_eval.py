"""The model for lm-eval: lm-eval's own numbers for AR, enumerations for diffusion, and whole tasks from local rows."""

import json
import math
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_models import CLASSES, TEXTS, load, number, requests, save_checkpoints, written

from nanollada.scripts import lm_eval_nanollada
from nanollada.scripts.decoding.checkpoint import prompt_ids
from nanollada.scripts.evaluation.lm_eval_model import RENDERED, NanoLLaDALM
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.encoding import RowEncoder
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.packing import IGNORE
from nanollada.trainers.data.sources import RowPolicy
from nanollada.trainers.scoring.continuations import conditional_rows, context_ids, encode_pair, score_continuations
from nanollada.trainers.scoring.likelihood import evaluate_likelihood, exact_nelbo
from nanollada.trainers.scoring.rolling import rolling_rows

TEMPLATES = lm_eval_nanollada.__file__.replace("lm_eval_nanollada.py", "lm_eval_tasks/")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return save_checkpoints(tokenizer, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def lms(folder):
    return {name: load(folder, name) for name in CLASSES}


# ---- log-likelihoods


def test_ar_scores_are_those_of_lm_eval_itself(lms):
    """The same token ids through lm-eval's `hf` model: sums, and what is greedy."""
    lm = lms["ar"]
    peer = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", batch_size=2, prefix_token_id=0)
    contexts = [context_ids(lm.tokenizer, text) for text in TEXTS[:3]]
    pairs = [(context, written(lm.model, context, 1 + n)) for n, context in enumerate(contexts)]
    pairs += [(context, context_ids(lm.tokenizer, "The mat.")[1:]) for context in contexts]
    asked = [(("", ""), context, continuation) for context, continuation in pairs]
    found, expected = lm._loglikelihood_tokens(asked), peer._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [True] * 3 + [False] * 3
    assert lm.prefix_token_id == peer.prefix_token_id == lm.tokenizer.pad_token_id
    texts = requests("loglikelihood_rolling", *((text,) for text in TEXTS if text))
    assert lm.loglikelihood_rolling(texts) == pytest.approx(
        peer.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-5
    )


@pytest.mark.parametrize("name", ["diffusion", "block"])
def test_short_answers_of_diffusion_are_enumerated(lms, name):
    lm = lms[name]
    asked = [("The cat", " sat"), ("", "log."), ("今天", "好"), ("The dog sat ", "on")]
    found = lm.loglikelihood(requests("loglikelihood", *asked))
    for (context, continuation), (log_likelihood, _) in zip(asked, found, strict=True):
        prompt, target = encode_pair(lm.tokenizer, context, continuation)
        assert prompt[0] == lm.tokenizer.pad_token_id and len(target) <= 6
        (batch,) = conditional_rows([prompt], [target], 0)
        with torch.no_grad():
            assert log_likelihood == pytest.approx(-exact_nelbo(lm.model, batch).item(), rel=1e-9)


def test_greedy_of_diffusion_is_what_a_plain_loop_writes(lms):
    lm = lms["diffusion"]
    contexts = [context_ids(lm.tokenizer, text) for text in (TEXTS[0], "", "The dog", "def add")]
    pairs = [
        (context, written(lm.model, context, count)) for context, count in zip(contexts, (3, 2, 3, 5), strict=True)
    ]
    pairs += [(context, [*answer[:-1], 9 if answer[-1] != 9 else 8]) for context, answer in pairs]
    found = [lm._loglikelihood_tokens([(None, *pair) for pair in pairs]), load_batches(lm, pairs, 3)]
    for answers in found:
        assert [greedy for _, greedy in answers] == [True] * 4 + [False] * 4


def load_batches(lm, pairs, batch_size):
    before, lm.batch_size = lm.batch_size, batch_size
    try:
        return lm._loglikelihood_tokens([(None, *pair) for pair in pairs])
    finally:
        lm.batch_size = before


@pytest.mark.parametrize("name", CLASSES)
def test_scores_are_those_of_the_package(folder, lms, name):
    """Long continuations, drawn masks: the seed and the blocks are the arguments', the batch size changes nothing."""
    options = {} if name == "ar" else {"samples": 4, "seed": 3, "eval_block_length": 8}
    asked = [
        ("The cat sat on the mat.", " The dog sat on the log and the bird sang in 2024."),
        ("", "The fish did not."),
    ]
    lm = load(folder, name, batch_size=2, **options)
    found = lm.loglikelihood(requests("loglikelihood", *asked))
    pairs = [encode_pair(lm.tokenizer, *pair) for pair in asked]
    own = {"samples": 4, "seed": 3, "block_length": 8} if options else {}
    numbers = [number(0, place) for place in range(2)]
    expected = score_continuations(lm.model, pairs, pad_token_id=0, batch_size=1, numbers=numbers, **own)
    assert [value for value, _ in found] == pytest.approx((-expected.nats).tolist(), rel=1e-9)
    if name != "ar":
        other = load(folder, name, batch_size=2, **{**options, "seed": 4})
        assert other.loglikelihood(requests("loglikelihood", *asked))[0][0] != found[0][0]
    assert lm.loglikelihood([]) == []


# ---- rolling


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("window", [{"max_length": 16, "rolling_context": 4}, {"max_length": 10}, {}])
def test_rolling_scores_are_those_of_the_rows(folder, name, window):
    lm = load(folder, name, samples=2, seed=5, batch_size=3, **window)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS)))
    context = window.get("rolling_context", window.get("max_length", 64) // 2)
    if name == "block" and window.get("max_length") == 10:
        context = 4  # one of two blocks
    assert (lm.rolling_context, lm.max_length) == (context, window.get("max_length", 64))
    rows = []
    for place, text in enumerate(TEXTS):
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        grid = lm.model.config.block_length
        made = list(rolling_rows(ids, lm.max_length, context, 0, block_length=grid, index=number(0, place)))
        assert (len(made) > 1) == (len(ids) >= lm.max_length)
        rows.append(made)
    collate = Collator(0)
    for value, made in zip(found, rows, strict=True):
        if made:
            expected = evaluate_likelihood(lm.model, [collate([row]) for row in made], samples=2, seed=5)
            assert value == pytest.approx(-expected.nats, rel=1e-9)
    assert found[1] == 0.0 and all(value < 0 for place, value in enumerate(found) if place != 1)


# ---- chats


def test_a_chat_is_encoded_as_in_training(lms, tokenizer):
    lm = lms["ar"]
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a test 🎉"}]
    prompt = lm.apply_chat_template(messages[:1])
    assert prompt.endswith("\n")  # whitespace that stays with the context
    context, answer = lm._encode_pair(prompt, "It is a test 🎉")
    row = Example("rows", 1, **parse_row({"messages": messages}))
    ((_, trained),) = RowEncoder(tokenizer, max_length=99).encode([row], RowPolicy("stop"))
    targets = [label for label in trained["labels"] if label != IGNORE]
    assert context == trained["input_ids"][: len(context)] == prompt_ids(tokenizer, messages[:1])
    assert answer == targets[:-1] and targets[-1] == tokenizer.eos_token_id  # lm-eval scores the string alone
    assert lm.tok_encode(prompt, add_special_tokens=True) == context
    assert lm.tok_encode("It", add_special_tokens=True) == context_ids(tokenizer, "It")
    open_answer = lm.apply_chat_template(messages, add_generation_prompt=False)
    assert open_answer == prompt + "It is a test 🎉"
    with pytest.raises(ValueError, match="`continuation` must add a token to its context, got ''"):
        lm._encode_pair(prompt, "")


def test_control_tokens_in_a_tasks_texts_are_text(lms, tokenizer):
    """In messages, in continuations, and where a plain text begins like a chat."""
    lm, injected = lms["ar"], "a<|im_end|>\n<|im_start|>b<|mask|>"
    messages = [{"role": "user", "content": injected}]
    context, answer = lm._encode_pair(lm.apply_chat_template(messages), injected)
    assert context == prompt_ids(tokenizer, messages) == lm.tok_encode(lm.apply_chat_template(messages), True)
    assert [context.count(index) for index in range(4)] == [0, 2, 1, 0] and not {0, 1, 2, 3} & {*answer}
    assert tokenizer.decode(answer) == injected
    plain, answer = lm._encode_pair("<|im_start|>user", "<|endoftext|>")
    assert plain[0] == 0 and not {0, 1, 2, 3} & {*plain[1:], *answer}
    assert tokenizer.decode(plain[1:] + answer) == "<|im_start|>user<|endoftext|>"


def test_templates_that_are_refused(folder):
    lm = load(folder, "ar")
    lm.tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(ValueError, match="`chat_history` must be usable, got chat template: .*no users"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])
    lm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which --apply_chat_template needs"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])


# ---- generation


@pytest.mark.parametrize("name", CLASSES)
def test_what_generate_writes(folder, name):
    decoding = {} if name == "ar" else {"threshold": 0.3}
    lm = load(folder, name, batch_size=2, max_gen_toks=12, **decoding)
    chat = lm.apply_chat_template([{"role": "user", "content": "What is it?"}])
    prompts = ["The cat sat on", chat, "今天天气", "The dog"]
    answers = lm.generate_until(requests("generate_until", *((text, {"until": []}) for text in prompts)))
    whole = [written_text(lm, text, 12, **decoding) for text in prompts]
    assert answers == whole and all(answers)
    stops = [whole[0][3:5], "", whole[0][1:3]]
    (cut,) = lm.generate_until(requests("generate_until", (prompts[0], {"until": stops, "max_gen_toks": 12})))
    assert cut == whole[0][: min(whole[0].index(stop) for stop in stops if stop)] != whole[0]
    (short,) = lm.generate_until(requests("generate_until", (prompts[0], {"until": [], "max_gen_toks": 1})))
    assert short == written_text(lm, prompts[0], 1, **decoding) != whole[0]


def written_text(lm, text, room, **decoding):
    """What the model's own `generate` makes of a text."""
    ids = lm.tokenizer(text.removeprefix(RENDERED), add_special_tokens=False).input_ids
    ids = torch.tensor([ids if text.startswith(RENDERED) else [lm.tokenizer.pad_token_id, *ids]])
    mask = torch.ones_like(ids)
    out = lm.model.generate(ids, attention_mask=mask, max_new_tokens=room, do_sample=False, **decoding)
    row = out[0, ids.shape[1] :].tolist()
    end = row.index(lm.tokenizer.eos_token_id) if lm.tokenizer.eos_token_id in row else None
    return lm.tokenizer.decode(row[:end], skip_special_tokens=True)


def test_a_special_token_stops(folder, monkeypatch):
    lm = load(folder, "ar")
    ids = lm.tokenizer("cat<|im_start|>dog", add_special_tokens=False).input_ids
    monkeypatch.setattr("nanollada.scripts.evaluation.lm_eval_model.answers_to", lambda *args: [(ids, True)])
    answer = {until: lm._answers([[0]], {"max_new_tokens": 4}, [until], 0) for until in ("<|im_start|>", "o")}
    assert answer == {"<|im_start|>": ["cat"], "o": ["catd"]}


def test_draws_are_the_seeds(folder):
    asked = requests("generate_until", *(("The cat", {"do_sample": True, "max_gen_toks": 8, "until": []}),) * 3)
    lm = load(folder, "diffusion", batch_size=3, seed=1)
    first = lm.generate_until(asked)
    assert first == lm.generate_until(asked) and len(set(first)) > 1  # repeats of a request differ
    assert load(folder, "diffusion", batch_size=3, seed=2).generate_until(asked) != first


def test_what_a_task_says_goes_first(folder):
    lm = load(folder, "diffusion", temperature=0.5, steps=4, max_gen_toks=9)
    plain = {"temperature": 0.5, "steps": 4, "max_new_tokens": 9}
    for options, expected, until in (
        ({}, plain, []),
        ({"until": "a", "do_sample": None}, plain, ["a"]),
        ({"until": ["a", ""], "do_sample": False}, {**plain, "temperature": 0.0}, ["a"]),
        ({"do_sample": False, "temperature": 0.7}, {**plain, "temperature": 0.0}, []),
        ({"do_sample": True}, plain, []),
        ({"do_sample": True, "temperature": 0.7, "steps": 2}, {**plain, "temperature": 0.7, "steps": 2}, []),
        ({"max_tokens": 5, "max_gen_toks": 6}, {**plain, "max_new_tokens": 6}, []),
    ):
        assert lm.settings_of(options) == (expected, until)
    bare = load(folder, "diffusion")
    assert bare.settings_of({})[0] == {"temperature": 0.0, "max_new_tokens": 256}
    assert bare.settings_of({"do_sample": True})[0]["temperature"] == 1.0
    with pytest.raises(ValueError, match="`generation_kwargs` must be options of `generate`, got num_beams"):
        lm.settings_of({"num_beams": 2})
    with pytest.raises(ValueError, match="`temperature` must be above 0 with `do_sample`, got 0"):
        lm.settings_of({"do_sample": True, "temperature": 0})


# ---- whole tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local rows, and tasks that include the templates."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["The cat", "The dog", "the mat", "A bird", "你好", "the log", "a test", "the fish"]
    rows = {
        "choice": [{"ctx": f"It is {words[n]}", "choices": words[n : n + 3], "label": n % 3} for n in range(6)],
        "digits": [
            {"ctx": "12", "choices": ["3", "04"], "label": 1},
            {"ctx": "[1]", "choices": ["a", "b"], "label": 0},
        ],
        "pairs": [{"good": f"{word} sat.", "bad": f"sat {word}."} for word in words],
        "text": [{"text": "[1, 2]"}, *({"text": text * 3} for text in TEXTS if text)],
    }
    for kind, values in rows.items():
        template = "choice" if kind == "digits" else kind
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
        lines = [f"include: {TEMPLATES}{template}", f"task: my_{kind}"]
        lines += [f"dataset_kwargs: {{data_files: {{test: {folder / kind}.jsonl}}}}"]
        (folder / f"{kind}.yaml").write_text("\n".join(lines))
    return folder, rows


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_a_task_gives_the_shares_of_direct_scoring(folder, tasks, name):
    """Through lm-eval's own evaluator, offline: acc, acc_norm and bits per byte are those of our functions."""
    lm_eval_nanollada.register()
    assert get_model("nanollada") is NanoLLaDALM and get_model("hf") is HFLM
    at, rows = tasks
    arguments = {"pretrained": str(folder / name), "samples": 4, "seed": 2, "max_length": 24, "rolling_context": 8}
    options = {"model": "nanollada", "model_args": arguments, "batch_size": "4", "device": "cpu", "bootstrap_iters": 0}
    manager = TaskManager(include_path=str(at), include_defaults=False)
    found = simple_evaluate(tasks=["my_choice", "my_pairs", "my_text"], task_manager=manager, **options)
    assert found["config"]["samples"] == 4 and found["config"]["bound"] == (name == "diffusion")
    lm = load(folder, name, dtype="float32")
    scores = {}
    for kind, pairs in (
        ("choice", [(row["ctx"], f" {choice}") for row in rows["choice"] for choice in row["choices"]]),
        ("pairs", [("", row[side]) for row in rows["pairs"] for side in ("good", "bad")]),
    ):
        pairs, choices = [encode_pair(lm.tokenizer, *pair) for pair in pairs], {"choice": 3, "pairs": 2}[kind]
        numbers = [number(*divmod(place, choices)) for place in range(len(pairs))]
        found_scores = score_continuations(lm.model, pairs, pad_token_id=0, samples=4, seed=2, numbers=numbers)
        scores[kind] = found_scores.nats.tolist()
    nats = [scores["choice"][start : start + 3] for start in range(0, len(scores["choice"]), 3)]
    right = normal = 0
    for row, values in zip(rows["choice"], nats, strict=True):
        by_length = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        right += min(values) == values[row["label"]]
        normal += min(by_length) == by_length[row["label"]]
    results = found["results"]
    assert (results["my_choice"]["acc,none"], results["my_choice"]["acc_norm,none"]) == (right / 6, normal / 6)
    halves = zip(scores["pairs"][::2], scores["pairs"][1::2], strict=True)
    assert results["my_pairs"]["acc,none"] == sum(good < bad for good, bad in halves) / 8
    made = []
    for place, row in enumerate(rows["text"]):
        ids = lm.tokenizer(row["text"], add_special_tokens=False).input_ids
        made += rolling_rows(ids, 24, 8, 0, index=number(place))
    total = evaluate_likelihood(lm.model, [Collator(0)(made)], samples=4, seed=2).nats
    num_bytes = sum(len(row["text"].encode()) for row in rows["text"])
    assert results["my_text"]["bits_per_byte,none"] == pytest.approx(total / num_bytes / math.log(2), rel=1e-5)


def test_a_task_with_the_chat_template(folder, tasks, tokenizer):
    """Contexts reach the model as training renders them, and the answers' scores are those of these token ids."""
    at, rows = tasks
    lm_eval_nanollada.register()
    manager = TaskManager(include_path=str(at), include_defaults=False)
    options = {"task_manager": manager, "limit": 2, "apply_chat_template": True, "bootstrap_iters": 0}
    lm = load(folder, "diffusion", samples=2)
    found = simple_evaluate(model=lm, tasks=["my_choice"], **options)["samples"]["my_choice"]
    pairs = []
    for row in rows["choice"][:2]:
        context = prompt_ids(tokenizer, [{"role": "user", "content": row["ctx"]}])
        pairs += [(context, tokenizer(choice, add_special_tokens=False).input_ids) for choice in row["choices"]]
    numbers = [number(row, choice) for row in range(2) for choice in range(3)]
    expected = score_continuations(lm.model, pairs, pad_token_id=0, samples=2, numbers=numbers).nats.tolist()
    scores = [answer[0] for sample in found for answer in sample["filtered_resps"]]
    assert [float(score) for score in scores] == pytest.approx([-nats for nats in expected], rel=1e-9)


def test_text_that_looks_like_a_number_or_a_list_is_text(folder, tasks):
    """lm-eval evaluates what a template renders; a column's name it takes as it is."""
    manager = TaskManager(include_path=str(tasks[0]), include_defaults=False)
    options = {"task_manager": manager, "bootstrap_iters": 0}
    found = simple_evaluate(model=load(folder, "ar"), tasks=["my_digits"], **options)["samples"]["my_digits"]
    asked = [tuple(pair) for sample in found for pair in sample["arguments"]]
    assert asked == [("12", " 3"), ("12", " 04"), ("[1]", " a"), ("[1]", " b")]
    assert [sample["target"] for sample in found] == [1, 0]


@pytest.mark.slow
def test_the_command_line(folder, tasks, tmp_path, monkeypatch, capsys):
    at, _ = tasks
    words = (
        f"run --model nanollada --model_args pretrained={folder / 'diffusion'},samples=2,threshold=0.9 --device cpu"
    )
    words += f" --tasks my_choice --include_path {at} --batch_size 4 --limit 2 --output_path {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", ["lm_eval_nanollada.py", *words.split()])
    lm_eval_nanollada.main()
    (file,) = tmp_path.glob("out*.json")
    written = json.loads(file.read_text())
    assert written["config"]["model"] == "nanollada" and written["config"]["samples"] == 2
    assert "|my_choice|" in capsys.readouterr().out


def test_the_device_that_lm_eval_says_by_itself(folder, monkeypatch, caplog):
    """Its command line says cuda:0 on machines without one, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(folder, "ar", device="cuda:0").device.type == "cpu"
    assert "there is no cuda:0: the model runs on the CPU" in caplog.text


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(lm_eval_nanollada, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs lm-eval .* which is not installed"):
        lm_eval_nanollada.main()


# ---- refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ar", {"samples": 3}, "`samples` must be a positive even number .*, got 3"),
        ("ar", {"samples": 0}, "`samples` must be an integer of at least 2, got 0"),
        ("ar", {"batch_size": "auto"}, "`batch_size` must be an integer of at least 1, got 'auto'"),
        ("ar", {"batch_size": True}, "`batch_size` must be an integer of at least 1, got True"),
        ("ar", {"max_batch_size": 4}, "`max_batch_size` bounds an automatic batch size: it must be None, got 4"),
        ("ar", {"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
        ("ar", {"dtype": "int8"}, "`dtype` must be one of float32, .*, got 'int8'"),
        ("ar", {"trust_remote_code": "maybe"}, "`trust_remote_code` must be True or False, got 'maybe'"),
        ("ar", {"peft": "x", "steps": 1}, "`model_args` must be of the model nanollada or of `generate`, got peft"),
        ("ar", {"steps": 4}, "`steps` is for diffusion models, got 4"),
        ("ar", {"eval_block_length": 4}, "`block_length` is for diffusion models, got 4"),
        ("diffusion", {"eval_block_length": "4k"}, "`eval_block_length` must be an integer of at least 0, got '4k'"),
        ("diffusion", {"max_length": 65}, "`max_length` must be an integer of at least 2 and at most 64, got 65"),
        ("diffusion", {"rolling_context": 64}, "`rolling_context` must be .* at most 63, got 64"),
        ("diffusion", {"max_gen_toks": 0}, "`max_gen_toks` must be an integer of at least 1, got 0"),
        ("diffusion", {"steps": 0}, "`steps` must be an integer >= 1, got 0"),
    ],
)
def test_arguments_are_checked(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        load(folder, name, **options)


def test_requests_are_checked(lms):
    lm = lms["diffusion"]
    good, long = ("The", " cat"), "The cat sat. " * 30
    for method, kind, bad, message in (
        (lm.loglikelihood, "loglikelihood", ("a", ""), "`requests`, number 1: `continuation` must add a token"),
        (lm.loglikelihood, "loglikelihood", ("a", long), "number 1: its tokens must fit into `max_length`, got .* 64"),
    ):
        with pytest.raises(ValueError, match=message):
            method(requests(kind, good, bad))
    with pytest.raises(ValueError, match="number 0: its tokens must fit into `max_length`, got 2 and 63 to write"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 63})))
