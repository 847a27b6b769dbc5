"""Programs by name, and the commands that start them: what is printed is what the user's shell understands."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanollada.trainers import records
from nanollada.trainers.commands import programs
from nanollada.trainers.commands.programs import PROGRAMS, ROOT, command_of, named_file, nearest, recorded_command
from nanollada.trainers.registry import TRAINERS

BIN = Path(sys.executable).parent


@pytest.fixture
def as_console(monkeypatch):
    """As if the console command were running."""
    monkeypatch.setattr(sys, "argv", [str(BIN / "nanollada"), "quickstart", "--seed", "1"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def as_file(monkeypatch):
    """As if a program of the checkout were running, there, in its environment."""
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", "--data", "my rows.jsonl"])
    monkeypatch.setenv("PATH", str(BIN))
    monkeypatch.chdir(ROOT)


def test_every_program_of_the_checkout_is_one_but_what_keeps_its_pages():
    rooms = ("trainers", "scripts", "hub_upload")
    files = {path for room in rooms for path in (ROOT / room).glob("*.py") if "__main__" in path.read_text()}
    pages = {"scripts/api_page.py", "scripts/technical_report.py"}  # written into the repository
    files = {path.relative_to(ROOT).as_posix() for path in files if 'if __name__ == "__main__":' in path.read_text()}
    assert files - pages == {program.file for program in PROGRAMS.values()}
    assert {PROGRAMS[entry.console].file for entry in TRAINERS.values()} == {
        "trainers/causal.py",
        "trainers/diffusion.py",
        "trainers/dpo.py",
        "trainers/grpo.py",
    }
    assert all(len(program.help) <= 70 for program in PROGRAMS.values())


def test_a_command_of_the_checkout(as_file, monkeypatch, tmp_path):
    command = command_of("generate", "--checkpoint", Path("my runs/ar"), "--prompt", "it's", "--seed", 3)
    assert command == "python scripts/generate.py --checkpoint 'my runs/ar' --prompt 'it'\"'\"'s' --seed 3"
    assert shlex.split(command)[3] == "my runs/ar"
    assert command_of("train-causal", "--bf16", True) == "accelerate launch trainers/causal.py --bf16 True"
    monkeypatch.chdir(ROOT / "tests")
    assert command_of("verify") == "python ../hub_upload/verify.py"
    monkeypatch.setenv("PATH", str(tmp_path))  # the environment is not activated
    monkeypatch.setattr(sys, "executable", str(ROOT / "tests" / "env" / "bin" / "python"))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert command_of("verify") == "env/bin/python ../hub_upload/verify.py"
    assert command_of("train-causal").startswith("env/bin/accelerate launch ")


def test_a_command_of_the_console(as_console, monkeypatch):
    monkeypatch.setenv("PATH", str(BIN))
    assert command_of("generate", "--prompt", "a b") == "nanollada generate --prompt 'a b'"
    assert command_of("train-diffusion", "--seed", 1) == "nanollada train-diffusion --seed 1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_of("train-diffusion") == "accelerate launch -m nanollada.trainers.diffusion"


@pytest.mark.parametrize(
    "program", [str(BIN / "nanollada"), "/x/nanollada/__main__.py", "/x/scripts/package/__main__.py"]
)
def test_what_the_console_is(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "puzzles"])
    assert programs.is_console() and recorded_command("puzzles", ["--rows", 3]) == "nanollada puzzles --rows 3"


def test_an_installed_package_has_no_files_to_start(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "ROOT", tmp_path / "site-packages" / "nanollada")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my_script.py")])
    monkeypatch.setenv("PATH", str(BIN))
    assert command_of("merge", "--output_dir", "x") == "nanollada merge --output_dir x"


def test_records_name_commands_that_can_be_given_again(as_file, monkeypatch):
    assert records.command() == "python scripts/evaluate.py --data 'my rows.jsonl'"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "trainers" / "diffusion.py"), "--seed", "1"])
    assert records.command() == "accelerate launch trainers/diffusion.py --seed 1"
    monkeypatch.setattr(sys, "argv", ["/x/bin/nanollada", "generate", "--prompt", "a b"])
    assert records.command() == "nanollada generate --prompt 'a b'"
    monkeypatch.setattr(sys, "argv", ["/home/me/mine.py", "--x"])
    assert records.command() == "mine.py --x"


def test_a_printed_command_runs(as_file):
    command = shlex.split(command_of("merge", "--help"))
    assert "--checkpoints" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_files_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart_ar", "quickstart_ar.yaml"):
        assert named_file(name, "recipe", "config") == ROOT / "scripts/recipes/quickstart_ar.yaml"
    assert named_file("quickstart", "suite", "suite") == ROOT / "scripts/suites/quickstart.yaml"
    Path("quickstart_ar.yaml").write_text("seed: 1\n")  # what is there goes first
    assert named_file("quickstart_ar.yaml", "recipe", "config") == Path("quickstart_ar.yaml")
    rule = "`config` must be a file or the name of a recipe, got"
    with pytest.raises(ValueError, match=f"{rule} quikstart_ar: did you mean `quickstart_ar` or"):
        named_file("quikstart_ar", "recipe", "config")
    with pytest.raises(ValueError, match=f"{rule} recipes/study_ar.yaml: did you mean `study_ar`"):
        named_file("recipes/study_ar.yaml", "recipe", "config")
    with pytest.raises(ValueError, match=f"{rule} xyz; those that come with nanollada: llada2_1gpu_ar, .*study_diff"):
        named_file("xyz", "recipe", "config")


def test_nearest():
    names = ["--max_new_tokens", "--max_length", "--seed"]
    assert nearest("--max_new", names).startswith(": did you mean `--max_new_tokens`")
    assert nearest("--max", names) == ": did you mean `--max_new_tokens` or `--max_length`?"
    assert nearest("--sed", names) == ": did you mean `--seed`?" and nearest("--colour", names) == ""
