"""The README: its first two commands are the main job and the tests, and every other one runs (slow)."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S) for kind in ("bash", "python")}
INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -q -c tests/constraints.txt -e ".[{}]" && '
COMMANDS = [line for block in BLOCKS["bash"][2:] for line in block.splitlines() if line and not line.startswith("#")]


def test_it_opens_with_the_main_job_and_the_tests():
    main_job, tests = BLOCKS["bash"][:2]
    assert main_job == INSTALL.format("quickstart") + ".venv/bin/python scripts/quickstart.py\n"
    assert tests == INSTALL.format("dev") + ".venv/bin/python -m pytest\n"
    assert TEXT.index("![") < TEXT.index("\n## ")


def test_every_file_it_names_exists():
    for name in re.findall(r"[\w./-]+\.(?:py|yaml|md|png)\b", TEXT):
        made = name.startswith(("runs/", "my")) or "/" not in name
        assert made or (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert name.startswith("https://") or (ROOT / name).exists(), name


def test_every_source_file_is_in_its_map():
    for room in ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload"):
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or f"`{path.name}`" in TEXT, path


def test_the_chinese_one_says_the_same():
    """Code, numbers and links are the English one's; the words are for a reader to check."""
    chinese = (ROOT / "scripts" / "README_zh.md").read_text(encoding="utf-8")
    blocks, number = r"```\w*\n.*?```", r"\d+(?:,\d{3})*(?:\.\d+)?"
    assert re.findall(blocks, TEXT, re.S) == re.findall(blocks, chinese, re.S)
    prose = [re.sub(blocks, "", text, flags=re.S) for text in (TEXT, chinese)]
    english, other = (Counter(code.replace("\n", " ") for code in re.findall(r"`[^`]+`", text)) for text in prose)
    assert english == other
    prose = [re.sub(r"`[^`]+`", "", text) for text in prose]
    links = [re.findall(r"\]\(([^)]+)\)", text) for text in prose]
    assert len(links[0]) == len(links[1])
    for name in links[1]:
        assert name.startswith("https://") or (ROOT / "scripts" / name).exists(), name
    prose = [re.sub(r"\]\([^)]+\)", "]", text) for text in prose]
    english, other = (Counter(re.findall(number, text)) for text in prose)
    assert english == other
    headings_and_rows = [len(re.findall(r"^(?:#+ |\|)", text, re.M)) for text in prose]
    assert headings_and_rows[0] == headings_and_rows[1]


def write_foreign_model(folder, tokenizer):
    """A Qwen3 of two layers with the tokenizer of a folder."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_task(folder):
    """A task of lm-eval over local rows."""
    rows = [{"ctx": "One and one is", "choices": [" two", " ten"], "label": 0}] * 3
    (folder / "my_choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_tasks").mkdir()
    template, data = folder / "scripts" / "lm_eval_tasks" / "choice", folder / "my_choices.jsonl"
    lines = (f"include: {template}", "task: my_choices", f"dataset_kwargs: {{data_files: {{test: {data}}}}}")
    (folder / "my_tasks" / "my_choices.yaml").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_every_command_and_snippet_runs(tmp_path):
    """In order, beside a quickstart run of a few steps; `--max_steps`, `--limit` and the Hub are kept small."""
    for room in ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload"):
        shutil.copytree(ROOT / room, tmp_path / room)
    rows = [{"text": f"Number {i} comes before {i + 1}. " * 8} for i in range(300)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(line):
        done = subprocess.run(shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"

    run("python scripts/quickstart.py --steps_share 0.01")
    write_foreign_model(tmp_path / "models" / "Qwen3-0.6B", tmp_path / "runs" / "quickstart" / "tokenizer")
    write_task(tmp_path)
    assert len(COMMANDS) >= 12
    for line in COMMANDS:
        if "quickstart.py" in line or "minimind" in line:
            continue  # run above with few steps; Nano-LLaDA's run needs the Hub and a GPU, see test_recipes.py
        line += " --max_steps 6 --eval_steps 2" if line.startswith("accelerate") else ""
        run(line + (" --limit 3 --samples 4" if "--suite" in line else ""))
    for number, snippet in enumerate(BLOCKS["python"]):
        (tmp_path / f"snippet_{number}.py").write_text(snippet)
        run(f"python snippet_{number}.py")
