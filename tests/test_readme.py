"""The READMEs: the first two commands are the main job and the tests, and every other one runs (slow)."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ROOMS = ("configuration_nanollada", "modeling_nanollada", "trainers", "scripts", "hub_upload")
PAGES = [README, *sorted(path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("README.md"))]
PAGES += [ROOT / "trainers" / "EDITING.md"]
TEXT = README.read_text(encoding="utf-8")
INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -q -c tests/constraints.txt -e ".[{}]" && '


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


def commands(page):
    """The lines of a page's commands, but for the two that install."""
    lines = [line for block in blocks(page.read_text(encoding="utf-8"), "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "python3 -m venv"))]


def test_it_opens_with_the_main_job_and_the_tests():
    main_job, tests = (
        re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", TEXT, re.S)[1] for name in ("main job", "tests")
    )
    assert main_job == INSTALL.format("quickstart") + ".venv/bin/python scripts/quickstart.py\n"
    assert tests == INSTALL.format("dev") + ".venv/bin/python -m pytest -n 2 --dist loadfile\n"
    assert blocks(TEXT, "bash")[:2] == [main_job, tests] and TEXT.index("![") < TEXT.index("```bash")
    assert len(TEXT.splitlines()) <= 150 and len(TEXT.encode()) < 8500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_it_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"[\w./-]+\.(?:py|yaml|md|png|gif)\b", text):
        made = name.startswith(("runs/", "my")) or "/" not in name
        assert made or any((folder / name).exists() for folder in (ROOT, page.parent)), name
    for name, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text):
        assert name.startswith("https://") or (page.parent / name).exists(), name
        titles = re.findall(r"^#+ (.*)$", (page.parent / name).read_text(encoding="utf-8"), re.M) if anchor else ()
        assert not anchor or anchor[1:] in {
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
        }


def test_every_folder_has_a_page_or_a_line():
    """The rooms of trainers/ and scripts/ are named where their folder's page says what is where."""
    for room in ("trainers", "scripts"):
        page = (ROOT / room / "README.md").read_text(encoding="utf-8")
        for folder in (ROOT / room).iterdir():
            if (folder / "__init__.py").exists():
                assert f"`{folder.name}/`" in page, folder


def test_the_chinese_one_has_the_same_commands_and_figures():
    """The words are for a reader to check."""
    chinese = (ROOT / "scripts" / "README_zh.md").read_text(encoding="utf-8")
    fences, number = r"```\w*\n.*?```", r"\d+(?:,\d{3})*(?:\.\d+)?"
    assert re.findall(fences, TEXT, re.S) == re.findall(fences, chinese, re.S)
    figures = []
    for text in (TEXT, chinese):
        prose = re.sub(r"`[^`]+`|\]\([^)]+\)", "", re.sub(fences, "", text, flags=re.S))
        figures.append(Counter(re.findall(number, prose)))
    assert figures[0] == figures[1]
    for name in re.findall(r"\]\(([^)#]+)", chinese):
        assert name.startswith("https://") or (ROOT / "scripts" / name).exists(), name


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
def test_every_command_and_snippet_runs(quickstart):
    """In order, beside a finished quickstart; steps, rows, `--limit` and the Hub are kept small."""
    rows = [{"text": f"Number {i} comes before {i + 1}. " * 8} for i in range(300)]
    (quickstart / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "HF_DATASETS_CACHE": str(quickstart / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(line):
        done = subprocess.run(shlex.split(line), cwd=quickstart, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"

    write_foreign_model(quickstart / "models" / "Qwen3-0.6B", quickstart / "runs" / "quickstart" / "tokenizer")
    write_task(quickstart)
    lines = [line for page in PAGES for line in commands(page)]
    assert len(lines) >= 20
    for line in dict.fromkeys(lines):
        if "quickstart.py" in line or "minimind" in line:
            continue  # the fixture ran it; Nano-LLaDA's run needs the Hub and a GPU, see test_recipes.py
        if line.startswith("accelerate") and "diffusion_early" not in line:  # whose right answers others learn from
            line += " --max_steps 6 --eval_steps 2"
        line += " --rows 60" if "puzzles.py" in line else ""
        run(line + (" --limit 3 --samples 4" if "--suite" in line else ""))
    for page in PAGES:
        for number, snippet in enumerate(blocks(page.read_text(encoding="utf-8"), "python")):
            (quickstart / f"snippet_{page.parent.name}_{number}.py").write_text(snippet)
            run(f"python snippet_{page.parent.name}_{number}.py")
