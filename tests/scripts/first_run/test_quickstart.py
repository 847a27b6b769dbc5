"""The main job: its rows and settings, and (slow) the whole of it in few steps: killed, and on a user's rows."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanollada.scripts.first_run.rows import read_rows, split_rows
from nanollada.scripts.first_run.stages import STAGES, Quickstart, QuickstartArguments

SCRIPT = Path(__file__).parents[3] / "scripts" / "quickstart.py"


def test_test_rows_are_never_training_rows(tmp_path):
    rows = [{"text": f"document {i % 400}"} for i in range(1000)]  # with duplicates
    counts = split_rows(rows, tmp_path, "text")
    train, test = (read_rows(tmp_path / f"text_{part}.jsonl") for part in ("train", "test"))
    assert counts == {"train": len(train), "test": len(test)} and len(train) + len(test) == 1000
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert len({row["text"] for row in test}) == 8
    split_rows(rows[::-1], tmp_path, "again")
    assert sorted(map(str, read_rows(tmp_path / "again_test.jsonl"))) == sorted(map(str, test))


def test_few_rows_leave_one_to_test(tmp_path):
    assert split_rows([{"text": "a"}, {"text": "b"}], tmp_path, "text") == {"test": 1, "train": 1}
    with pytest.raises(ValueError, match="`data` must hold at least two different text rows, got 2"):
        split_rows([{"text": "a"}, {"text": "a"}], tmp_path, "text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "7b"}, "`size` must be 1m or 32m, got '7b'"),
        ({"steps_share": 0.0}, r"`steps_share` must lie in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuickstartArguments(**settings)


def test_a_folder_serves_one_run(tmp_path):
    Quickstart(QuickstartArguments(output=str(tmp_path), steps_share=0.5))
    Quickstart(QuickstartArguments(output=str(tmp_path), steps_share=0.5))
    with pytest.raises(ValueError, match="`output` holds a run with another `steps_share`"):
        Quickstart(QuickstartArguments(output=str(tmp_path)))


def test_recipes_get_this_runs_paths(tmp_path):
    run = Quickstart(QuickstartArguments(output=str(tmp_path / "run"), size="32m", steps_share=0.1, seed=7))
    for stage in STAGES:
        arguments = run.overrides(stage)
        given = dict(zip((name.removeprefix("--") for name in arguments[::2]), arguments[1::2], strict=True))
        assert given["output_dir"] == str(tmp_path / "run" / stage) and given["seed"] == "7"
        assert "resume_from_checkpoint" not in given  # it begins
        kind = "sft" if "sft" in stage else "text"
        assert given["data"].endswith(f"{kind}_train.jsonl") and given["eval_data"].endswith(f"{kind}_test.jsonl")
        assert ("hidden_size" in given) == (stage == "ar")
        assert given.get("model_name_or_path") == {
            "ar": None,
            "diffusion": str(tmp_path / "run" / "ar"),
            "ar_sft": str(tmp_path / "run" / "ar"),
            "diffusion_sft": str(tmp_path / "run" / "diffusion"),
        }.get(stage)


def test_a_killed_stage_goes_on(tmp_path):
    run = Quickstart(QuickstartArguments(output=str(tmp_path / "run")))
    (tmp_path / "run" / "ar" / "checkpoint-4").mkdir(parents=True)
    arguments = run.overrides("ar")
    assert arguments[arguments.index("--resume_from_checkpoint") + 1] == "last"
    assert "--resume_from_checkpoint" not in run.overrides("diffusion")


def test_users_rows_are_sorted_by_kind(tmp_path):
    chats = [
        {"conversations": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "so"}]}
        for i in range(9)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)))
    data = [str(tmp_path / "chat.jsonl"), str(tmp_path / "text.jsonl")]
    run = Quickstart(QuickstartArguments(output=str(tmp_path / "run"), data=data))
    run.make_corpus()
    assert run.has_answers and run.sudoku is None
    assert len(read_rows(run.corpus / "sft_train.jsonl")) == len(read_rows(run.corpus / "text_train.jsonl")) == 8
    assert "messages" in read_rows(run.corpus / "sft_train.jsonl")[0]
    assert run.prompts()[0][0]["role"] == "user"


def next_words(run):
    return [shlex.split(line)[shlex.split(line).index("--checkpoint") :] for line in run.next_commands()]


def test_the_next_commands_fit_the_rows(tmp_path):
    """A sudoku and a chat; of a user's chats a question and a chat; of other rows a prompt that is no chat."""
    kinds = {
        "chat": {"messages": [{"role": "user", "content": "it's?"}, {"role": "assistant", "content": "so"}]},
        "pair": {"prompt": "1 + 1 = ", "completion": "2"},
        "text": {"text": "One comes before two. " * 9},
    }
    expected = {"chat": [["--chat", "--prompt", "it's?"], ["--chat"]], "pair": [["--prompt", "1 + 1 = "]]}
    expected["text"] = [["--prompt", kinds["text"]["text"][:60]]]
    for kind, row in kinds.items():
        run = Quickstart(QuickstartArguments(output=str(tmp_path / f"a {kind}"), data=["my.jsonl"]))
        run.corpus.mkdir()
        name = "text" if kind == "text" else "sft"
        for part in ("train", "test"):
            (run.corpus / f"{name}_{part}.jsonl").write_text(json.dumps(row) + "\n")
        start = ["--checkpoint", str(run.folder / ("diffusion" if kind == "text" else "diffusion_sft")), "--watch"]
        limit = ["--max_new_tokens", "32"] if kind != "chat" else []
        assert next_words(run) == [start + words + limit for words in expected[kind]]
    run = Quickstart(QuickstartArguments(output=str(tmp_path / "built in")))
    run.corpus.mkdir()
    (run.corpus / "sft_train.jsonl").write_text("")
    (run.corpus / "sudoku_test.jsonl").write_text('{"prompt": [{"role": "user", "content": "Sudoku 0"}]}\n')
    assert [words[3:] for words in next_words(run)] == [["--chat", "--prompt", "Sudoku 0"], ["--chat"]]
    assert run.limit() == {}


class Page(HTMLParser):
    """Collects what a page loads from elsewhere, and its tags."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith(("#", "data:"))
        ]


def check_run(folder, stages):
    for stage in stages:
        assert json.loads((folder / stage / "evaluation.json").read_text())["results"]
        assert (folder / stage / "loss.png").exists()
    for kind in ("ar", "diffusion"):
        report = json.loads((folder / f"verified_{kind}.json").read_text())
        assert report["ok"] and report["max_logit_difference"] <= 1e-5
        assert (folder / "hub" / f"nanollada-{kind}" / "README.md").exists()
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert not page.links and page.tags.count("svg") >= len(stages) and "section" in page.tags
    assert (folder / "denoising.png").read_bytes()[1:4] == b"PNG"
    counts = []
    for stage in stages[:2]:
        results = json.loads((folder / stage / "evaluation.json").read_text())["results"]
        counts.append([(result["tokens"], result["bytes"]) for result in results if result["kind"] == "text"])
    assert counts[0] == counts[1]  # AR and diffusion are scored on the same tokens and bytes


def start(folder, *options):
    """The main job with few steps, in a folder of its own."""
    command = [sys.executable, str(SCRIPT), "--output", "run", "--steps_share", "0.01", *options]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    output = open(folder / "log", "w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(process, folder):
    assert process.wait() == 0, (folder / "log").read_text()[-3000:]


@pytest.mark.slow
def test_the_main_job_survives_a_kill(tmp_path):
    """Killed in the middle of a training, the same command again ends what was begun."""
    process = start(tmp_path)
    deadline = time.time() + 300
    while not (tmp_path / "run" / "diffusion" / "metrics.jsonl").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (tmp_path / "run" / "ar" / "run.json").stat().st_mtime_ns
    finish(start(tmp_path), tmp_path)
    assert (tmp_path / "run" / "ar" / "run.json").stat().st_mtime_ns == before  # not done twice
    check_run(tmp_path / "run", STAGES)
    assert "--checkpoint run/diffusion_sft --watch --chat" in (tmp_path / "log").read_text()
    sudoku = json.loads((tmp_path / "run" / "diffusion_sft" / "evaluation.json").read_text())["results"][-1]
    assert sudoku["metric"] == "exact_match" and sudoku["rows"] == 200
    finish(start(tmp_path), tmp_path)  # of a finished run: its page again, and no question
    shown = (tmp_path / "log").read_text()
    assert "--checkpoint run/diffusion_sft --watch --chat" in shown and "custom code" not in shown


@pytest.mark.slow
def test_the_main_job_on_a_users_texts(tmp_path):
    rows = [{"text": f"Number {i} comes before {i + 1}. " * 8} for i in range(300)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(start(tmp_path, "--data", "my.jsonl"), tmp_path)
    check_run(tmp_path / "run", ("ar", "diffusion"))
    assert not (tmp_path / "run" / "ar_sft").exists()
