"""Ctrl-C and SIGTERM: a whole checkpoint, the command that goes on, and the weights of a run that was not stopped."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import rank
from training_cases import KINDS, build_trainer, command_line, fresh_model_and_rows, run, weights

from nanollada.trainers.causal import CausalTrainer
from nanollada.trainers.console.callbacks import read_metrics
from nanollada.trainers.resuming.checkpoints import fault_of
from nanollada.trainers.resuming.stopping import Interrupted, StopSignals, interrupted
from nanollada.trainers.run import main, resuming_arguments

HERE = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path, tokenizer):
    return {
        **fresh_model_and_rows(tmp_path, tokenizer),
        "hidden_dropout": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 2,
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "plot_loss": False,
    }


def signal_in_step(monkeypatch, step, number=signal.SIGINT):
    """The process gets a signal in the first micro-batch of a step (from 1)."""
    compute, state = CausalTrainer.micro_batch_loss, {"sent": False}

    def loss(self, *args):
        if self.state.global_step == step - 1 and not state["sent"]:
            state["sent"] = True
            os.kill(os.getpid(), number)
        return compute(self, *args)

    monkeypatch.setattr(CausalTrainer, "micro_batch_loss", loss)


def untimed(folder):
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second"))} for line in lines]


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
CASES = {
    "between logs": ({}, signal.SIGINT, 3),
    "SIGTERM where it saves anyway": ({}, signal.SIGTERM, 4),
    "the last step": ({}, signal.SIGINT, 6),
    "no checkpoints": ({"save_strategy": "no"}, signal.SIGINT, 5),
    "the model alone": ({"save_only_model": True}, signal.SIGTERM, 4),
    "a stream": ({"streaming": True}, signal.SIGINT, 3),
    "a pass ends": (EPOCHS, signal.SIGINT, None),
}


QUICK = ("no checkpoints", "a pass ends")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_stopped_run_goes_on_bit_for_bit(case, job, tmp_path, monkeypatch, capfd):
    settings, number, step = CASES[case]
    job |= settings
    expected = run("causal", job, output_dir=tmp_path / "unbroken")
    step = step or expected["steps"] // 2
    before = signal.getsignal(number)
    signal_in_step(monkeypatch, step, number)
    with pytest.raises(Interrupted) as stop:
        run("causal", job, output_dir=tmp_path / "run")
    assert signal.getsignal(number) == before
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert fault_of(checkpoint) is None and not (tmp_path / "run" / "run.json").exists()
    saved, _, command = str(stop.value).partition("\nGo on with: ")
    assert saved == f"interrupted after step {step}: {checkpoint} is saved"
    assert re.search(f"{'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: the step is fin", capfd.readouterr().err)

    words = shlex.split(command)
    assert words[1] == "launch" and words[2].endswith("trainers/causal.py")
    facts = main(KINDS["causal"], words[3:])
    assert {name for name in facts if facts[name] != expected[name]} <= {"seconds", "command"}
    first, second = weights(tmp_path / "unbroken"), weights(tmp_path / "run")
    assert all(first[name].equal(second[name]) for name in first)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "unbroken")


def test_the_command_that_goes_on():
    argv = ["--config", "a b.yaml", "--resume_from_checkpoint", "x/checkpoint-4", "--seed", "1"]
    again = ["--config", "a b.yaml", "--seed", "1", "--resume_from_checkpoint", "last"]
    assert resuming_arguments(argv) == again
    assert resuming_arguments([*argv[:2], "--resume_from_checkpoint=true", *argv[4:]]) == again


def test_before_training_and_behind_it(job, tmp_path, monkeypatch):
    """While rows are prepared nothing is there to go on from; while the last files are made, a checkpoint is."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nanollada.trainers.base.prepare_data", stop)
        with pytest.raises(Interrupted) as error:
            run("causal", job, output_dir=tmp_path / "run")
        assert str(error.value) == "interrupted before anything was saved"
    with monkeypatch.context() as patch:
        patch.setattr(CausalTrainer, "final_evaluation", stop)
        with pytest.raises(Interrupted, match=r"interrupted; .*checkpoint-6 is the newest checkpoint\nGo on with: "):
            run("causal", job, output_dir=tmp_path / "run")
    assert run("causal", job, output_dir=tmp_path / "run", resume_from_checkpoint="last")["steps"] == 6


def test_the_second_signal_acts_as_ever():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopSignals(announce=False) as signals:
        assert not signals.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested
        assert all(signal.getsignal(number) == signal.SIG_DFL for number in before)
    assert {number: signal.getsignal(number) for number in before} == before
    entered = []
    thread = threading.Thread(target=lambda: entered.append(StopSignals().__enter__().requested))
    thread.start()
    thread.join()
    assert entered == [False]


def test_other_ranks_have_nothing_to_say():
    from types import SimpleNamespace

    stop = interrupted(Interrupted("saved", "run/checkpoint-2"), SimpleNamespace(process_index=1), None, "again")
    assert str(stop) == "" and stop.command is None


def started(words, folder, **options):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **pipe, **options)


def wait_for(ready, process, seconds=120):
    deadline = time.time() + seconds
    while not ready():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_reaches_the_workers_too(job, tmp_path):
    """The whole process group gets SIGINT; the step is finished from the worker's rows."""
    job |= {"max_steps": 4000, "save_steps": 4000, "dataloader_num_workers": 1, "output_dir": tmp_path / "run"}
    program = HERE.parent / "trainers" / "causal.py"
    process = started([program, *command_line(job)], tmp_path, start_new_session=True)
    wait_for(lambda: any(line["step"] >= 4 for line in read_metrics(tmp_path / "run")), process)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault_of(checkpoint) is None and f"{checkpoint} is saved" in errors and "Go on with: " in errors
    assert "DataLoader worker" not in errors and "Traceback" not in errors and process.returncode == 130


@pytest.mark.slow
def test_all_ranks_stop_behind_the_same_step(tmp_path):
    """SIGTERM reaches the second of two ranks alone; the run goes on with the weights of an unbroken one."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, tmp_path]
    process = started(launch, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert fault_of(checkpoint) is None and {"rng_state_0.pth", "rng_state_1.pth"} < files.keys()
    messages = [(tmp_path / f"rank-{number}.txt").read_text() for number in range(2)]
    assert messages[0] == messages[1] == f"interrupted after step 3: {checkpoint} is saved"
    first, second = weights(tmp_path / "unbroken" / "checkpoint-6"), weights(tmp_path / "stopped" / "checkpoint-6")
    assert all(first[name].equal(second[name]) for name in first)


def stop_one_rank(folder):
    """A rank of `test_all_ranks_stop_behind_the_same_step`."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6, "per_device_train_batch_size": 2}
    build_trainer("causal", folder / "unbroken", **settings).train()
    trainer = build_trainer("causal", folder / "stopped", **settings)
    compute = trainer.micro_batch_loss

    def loss(*args):
        if trainer.args.process_index == 1 and trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args)

    trainer.micro_batch_loss = loss
    with pytest.raises(Interrupted) as stop:
        trainer.train()
    (folder / f"rank-{trainer.args.process_index}.txt").write_text(str(stop.value))
    again = build_trainer("causal", folder / "stopped", **settings)
    again.train(resume_from_checkpoint=str(folder / "stopped" / "checkpoint-3"))


if __name__ == "__main__":
    with rank():
        stop_one_rank(Path(sys.argv[1]))
