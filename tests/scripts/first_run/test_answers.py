"""(slow) A finished quickstart gives right answers: its printed commands, README's, the pipeline, the card."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from boards import brute_force, shown_sudokus

from nanollada.scripts.first_run.rows import read_rows

HARNESS = Path(__file__).parents[2] / "answering.py"
PIPELINE = """
from transformers import pipeline

write = pipeline("text-generation", model={model!r}, trust_remote_code=True)
print(write([{{"role": "user", "content": "?"}}])[0]["generated_text"][-1]["content"])
"""
GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanollada.modeling_nanollada

tokenizer, model = (auto.from_pretrained({model!r}) for auto in (AutoTokenizer, AutoModelForCausalLM))
chat, options = [{{"role": "user", "content": "?"}}], {{"return_tensors": "pt", "return_dict": True}}
output = model.generate(**tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options))
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
BOARDS, LEAST = 100, 95  # of the held-out sudokus, and right ones
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def boards(quickstart):
    """(puzzle, solution) of held-out boards."""
    rows = read_rows(quickstart / "runs" / "quickstart" / "corpus" / "sudoku_test.jsonl")
    return [(row["puzzle"], row["answer"]) for row in rows[:BOARDS]]


def output_of(folder, words, **options):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stderr[-3000:]}"
    return done.stdout


def right_answers(folder, snippet, boards):
    """How many boards a snippet solves, asked for them in its question's place."""
    (folder / "snippet.py").write_text(snippet)
    questions = json.dumps([f"Sudoku {puzzle}" for puzzle, _ in boards])
    printed = json.loads(output_of(folder, [sys.executable, HARNESS, "snippet.py", questions]).splitlines()[-1])
    return sum(answer in text for text, (_, answer) in zip(printed, boards, strict=True))


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def check_line(folder, line):
    """A command with a sudoku prints its solution."""
    (puzzle,) = shown_sudokus(line)
    assert brute_force(puzzle)[0] in output_of(folder, shlex.split(line)).splitlines(), line


def test_the_next_commands(quickstart, boards):
    log = (quickstart / "log").read_text()
    lines = log[log.index("\nNext:\n") :].splitlines()[2:]
    single, chat = [line for line in lines if " --checkpoint " in line]
    check_line(quickstart, single)
    asked = "".join(f"Sudoku {puzzle}\n/reset\n" for puzzle, _ in boards)
    shown = output_of(quickstart, shlex.split(chat), input=asked).split("Forgotten.")
    right = sum(answer in text.splitlines() for text, (_, answer) in zip(shown, boards, strict=False))
    assert right >= LEAST, f"{right} of {BOARDS}"


def test_the_lines_of_the_readmes(quickstart):
    lines = [
        line
        for page in ("README.md", "scripts/decoding/README.md")
        for block in re.findall(r"```bash\n(.*?)```", (quickstart / page).read_text(encoding="utf-8"), re.S)
        for line in block.splitlines()
        if "generate.py" in line and shown_sudokus(line)
    ]
    assert len(lines) >= 2
    for line in lines:
        check_line(quickstart, line)


def test_the_snippet_of_the_readme(quickstart, boards):
    (snippet,) = [block for block in python_blocks(quickstart / "README.md") if "model.generate(" in block]
    assert right_answers(quickstart, snippet, boards) >= LEAST


def test_the_pipeline_without_arguments(quickstart, boards):
    snippet = PIPELINE.format(model="runs/quickstart/hub/nanollada-diffusion")
    assert right_answers(quickstart, snippet, boards) >= LEAST


def test_generate_without_arguments(quickstart, boards):
    """On the checkpoint that the trainer left, before any export."""
    assert right_answers(quickstart, GENERATE.format(model="runs/quickstart/diffusion_sft"), boards) >= LEAST


def test_the_snippets_of_the_card(quickstart, boards):
    hub = quickstart / "runs" / "quickstart" / "hub"
    blocks = python_blocks(hub / "nanollada-diffusion" / "README.md")
    last = next(number for number, block in enumerate(blocks) if '"content": ' in block)
    assert right_answers(hub, "\n".join(blocks[: last + 1]), boards) >= LEAST
