"""The card's snippets: what they ask, what they print, and that a checkpoint's own settings are enough for them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin

from nanollada.configuration_nanollada import NanoLLaDAConfig
from nanollada.hub_upload.card_check import card_faults
from nanollada.hub_upload.card_facts import Facts, without_paths
from nanollada.hub_upload.card_results import PROGRAMS, command_block, eval_results, evaluation_section
from nanollada.hub_upload.card_use import choose_example, fenced, run_snippet
from nanollada.hub_upload.evaluation_file import VERSION, model_digests, results_of
from nanollada.hub_upload.export import export
from nanollada.hub_upload.upload import TWIN
from nanollada.hub_upload.verify import SNIPPET, VerificationError, _CleanProcess, read_printed
from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QUESTION = {"prompt": [{"role": "user", "content": "What is it?"}], "answer": "It is a test, and the test is long."}
NONE = {"task": "quiz", "kind": "generation", "metric": "exact_match", "value": 0.0, "standard_error": 0.0}
NONE |= {"bound": False, "rows": 200, "data": "quiz.jsonl", "interval": [0.0, 0.0188], "examples": [QUESTION]}
PIXEL = b"\x89PNG\r\n\x1a\n and so on"


def facts_of(*examples, format="sft") -> Facts:
    return Facts([{"data": {"format": format}}], evaluation={"results": [{**NONE, "examples": list(examples)}]})


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """A diffusion model with settings of its own, that was asked something."""
    folder = tmp_path_factory.mktemp("asked") / "checkpoint"
    torch.manual_seed(0)
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SHAPE))
    model.generation_config.update(max_new_tokens=12, block_length=6, threshold=0.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    evaluation = {"version": VERSION, **model_digests(folder), "command": "quickstart.py", "results": [NONE]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "run.json").write_text(json.dumps({"data": {"format": "sft"}}))
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint):
    (checkpoint.parent / "picture.png").write_bytes(PIXEL)
    options = {"picture": checkpoint.parent / "picture.png", "twin": "small-ar", "license": "mit", "language": "en"}
    return export(checkpoint, checkpoint.parent / "small", **options)


def test_the_card_alone_shows_a_held_out_row(checkpoint, exported, tmp_path):
    """Rows that the card doesn't show stay at home, in every result; with a prompt that is given, all of them."""
    assert json.loads((exported / "evaluation.json").read_text())["results"][0]["examples"] == [QUESTION]
    asked = tmp_path / "evaluation.json"
    other = {"prompt": "Mine", "answer": "alone"}
    results = [{**NONE, "examples": [QUESTION, other]}, {**NONE, "task": "second", "examples": [other]}]
    asked.write_text(json.dumps({**json.loads((checkpoint / "evaluation.json").read_text()), "results": results}))
    for options, kept in (({}, [[QUESTION], None]), ({"prompt": "The test"}, [None, None])):
        folder = export(checkpoint, tmp_path / f"of_{len(options)}", evaluation=asked, **options)
        text = (folder / "evaluation.json").read_text()
        assert [result.get("examples") for result in json.loads(text)["results"]] == kept and "Mine" not in text


def test_what_is_asked(tokenizer, char_tokenizer):
    """What the evaluation asked, if it is short and the vocabulary spells it; what is given goes before."""
    assert choose_example(tokenizer, facts_of(QUESTION)) == (QUESTION["prompt"], QUESTION["answer"])
    assert choose_example(tokenizer, facts_of(QUESTION), "Why?") == ([{"role": "user", "content": "Why?"}], None)
    text = {"prompt": "The cat", "answer": " sat"}
    document = {"prompt": "The cat. " * 100, "answer": "cat"}
    assert choose_example(tokenizer, facts_of(document, text)) == ("The cat", " sat")
    assert choose_example(char_tokenizer, facts_of({"prompt": "Zebra~", "answer": "~"}, text)).prompt == "The cat"
    assert choose_example(tokenizer, facts_of(format="pretrain")).prompt == "The"


def test_snippets_ask_it_without_settings_and_print_the_answer(exported, tokenizer):
    card = (exported / "README.md").read_text()
    load, ask, infill = SNIPPET.findall(card)
    assert f"messages = {json.dumps(QUESTION['prompt'])}" in ask and "model.generate(**inputs)" in ask
    model = NanoLLaDAForMaskedLM.from_pretrained(exported)
    rendered = tokenizer.apply_chat_template(QUESTION["prompt"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(rendered, return_tensors="pt").input_ids
    row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, block_length=6)[0]
    namespace = {"model": model, "tokenizer": tokenizer}
    said = read_printed(card)
    printed = run_snippet(ask, namespace)
    assert printed == tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True).rstrip("\n")
    assert (said[0], said[1]) == (None, printed if fenced(printed) else None)
    filled = run_snippet(infill, namespace)
    known = tokenizer(QUESTION["answer"]).input_ids
    quarter = len(known) // 4
    assert f"tokenizer.mask_token * {len(known) - 2 * quarter} +" in infill
    assert filled.startswith(tokenizer.decode(known[:quarter])) and filled.endswith(tokenizer.decode(known[-quarter:]))
    assert "user" not in filled


def test_the_card_tells_the_settings(exported, tokenizer, tmp_path):
    card = (exported / "README.md").read_text()
    assert "| `max_new_tokens` | 12 | tokens written at most. |\n| `block_length` | 6 | tokens per block" in card
    assert "| `threshold` | 0.9 | " in card and "`steps` |" not in card and "`remasking` |" not in card
    folder = tmp_path / "plain"
    NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "| Setting |" not in card and "twin" not in card and "![" not in card


def test_a_card_that_says_another_answer_is_refused(exported, tmp_path, monkeypatch):
    """And one that says none is not."""
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    card, said = (folder / "README.md").read_text(), "```text\nIt is a zebra.\n```\n"
    clean = _CleanProcess(folder, tmp_path)
    clean.settings = NanoLLaDAForMaskedLM.from_pretrained(folder).config
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)  # the check replaces it
    assert clean.snippets() is None
    bare = re.sub(r"\nIt printed:\n\n```text\n.*?\n```\n", "", card, flags=re.DOTALL)
    (folder / "README.md").write_text(bare.replace("\nInfilling:", f"\nIt printed:\n\n{said}\nInfilling:"))
    with pytest.raises(VerificationError, match="says that a python block printed 'It is a zebra.', got '"):
        clean.snippets()


@pytest.mark.parametrize("text", ["It is", "a\n\n`b`", "`` and \t.\n "])
def test_any_text_can_be_quoted(text):
    block = fenced(text)
    assert read_printed(f"```python\nx\n```\n\nIt printed:\n\n{block}\n\nMore:\n\n```bash\nls\n```\n") == [text]


def test_a_model_writes_no_block_that_is_run():
    """Nor what a file or a terminal would change."""
    assert [fenced(text) for text in ("", " \n", "a\rb", "```python\nx = 1\n```")] == [""] * 4


def test_picture_and_twin(exported, checkpoint, tmp_path):
    card = (exported / "README.md").read_text()
    assert "![How the model writes, step by step](denoising.png)" in card
    assert (exported / "denoising.png").read_bytes() == PIXEL and card_faults(exported) == []
    assert "Its autoregressive twin is [small-ar](../small-ar)." in card
    assert "[small-ar](https://huggingface.co/me/small-ar)" in TWIN.sub("](https://huggingface.co/me/", card)
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / "denoising.png").unlink()
    assert card_faults(folder) == ["README.md shows denoising.png, got no such file in copy"]
    (tmp_path / "text.png").write_text("no picture")
    for wrong in ("text.png", "none.png"):
        with pytest.raises(ValueError, match=f"`picture` must be a PNG or GIF file, got .*{wrong}"):
            export(checkpoint, tmp_path / "out", picture=tmp_path / wrong)
    with pytest.raises(ValueError, match="`twin` must be names on the Hub, got '../ar'"):
        export(checkpoint, tmp_path / "out", twin="../ar")
    owned = (export(checkpoint, tmp_path / "out", repo_id="me/small", twin="small-ar") / "README.md").read_text()
    assert "[small-ar](https://huggingface.co/me/small-ar)" in owned


def test_none_of_200_has_an_interval():
    section = evaluation_section({"results": [NONE]})
    assert "| 0.0000 [0.0000, 0.0188] |" in section and "Wilson's 95 % interval" in section
    (result,) = eval_results({"results": [NONE]}, "me/small")
    assert result.metric_args["interval"] == [0.0, 0.0188]
    wrong = {"interval": [0.5, 0.1], "examples": [{"prompt": 3, "answer": "x"}]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`evaluation` must give `{name}` of task 'quiz' as "):
            results_of({"results": [{**NONE, name: value}]})


# ---- commands


def test_programs_are_those_there_are():
    """Whose files have a `main`, but the one that only makes a page of documentation."""
    for room, names in PROGRAMS.items():
        programs = [
            path.name for path in (ROOT / room).glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
        ]
        assert sorted(names) == sorted({*programs} - {"api_page.py"}), room


def test_commands_can_be_pasted():
    recipe = "/home/me/nanollada/scripts/recipes/quickstart_ar.yaml"
    words = ["causal.py", "--config", recipe, "--data", "my texts.jsonl", "--output_dir", "runs/" + 60 * "x"]
    block = command_block(without_paths({"command": shlex.join(words)})["command"])
    head, *lines, end = block.splitlines()
    assert (head, end) == ("```bash", "```") and len(lines) == 4 and all(line.endswith(" \\") for line in lines[:-1])
    pasted = shlex.split("\n".join(lines).replace("\\\n", ""))
    assert pasted == ["python", "trainers/causal.py", "--config", "scripts/recipes/quickstart_ar.yaml", *words[3:]]
    assert command_block("quickstart.py") == "```bash\npython scripts/quickstart.py\n```"
    assert command_block("nanollada evaluate --seed 1") == "```bash\nnanollada evaluate --seed 1\n```"
    for made in ("-c 'import x'", "ipykernel_launcher.py -f /x.json", "'open", ""):
        assert "```" not in command_block(made) and "By Python code" in command_block(made)
