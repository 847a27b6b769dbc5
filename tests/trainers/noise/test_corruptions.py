"""The registry of corruptions: a new one is a file and an entry; option, help and record follow by themselves."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from training_cases import command_line, fresh_model_and_rows

from nanollada.trainers.noise.registry import CORRUPTIONS
from nanollada.trainers.registry import TRAINERS

SHUFFLE = '''
"""A share of the targets takes another target's place, and is to be put right."""

from dataclasses import dataclass, field

import torch

from nanollada.trainers.noise.corruption import Corruption
from nanollada.trainers.noise.keys import STREAM_MASK, keyed_uniform


@dataclass
class ShuffleSettings:
    shuffled_share: float = field(default=0.5, metadata={"help": "Share of the targets that is moved."})

    def check(self):
        if not 0 < self.shuffled_share <= 1:
            raise ValueError(f"`shuffled_share` must lie in (0, 1], got {self.shuffled_share}")


def shuffle(input_ids, targets, config, *, seed, index, rank, epoch, block_ids, shuffled_share):
    chosen = targets & (keyed_uniform(seed, index, epoch, STREAM_MASK, input_ids.shape[1]) < shuffled_share)
    assert config.vocab_size > input_ids.max()
    noisy = torch.where(chosen, input_ids.roll(1, 1), input_ids)
    return Corruption(noisy, input_ids.masked_fill(~chosen, -100), chosen.double() / shuffled_share)
'''
PROGRAM = """
import sys
from shuffling import ShuffleSettings, shuffle

from nanollada.trainers.noise.corruption import CorruptionKind
from nanollada.trainers.noise.registry import CORRUPTIONS

CORRUPTIONS["shuffle"] = CorruptionKind(shuffle, (ShuffleSettings,), "reordering", "targets change places")

from nanollada.trainers.registry import TRAINERS
from nanollada.trainers.run import main

main(TRAINERS["diffusion"], sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "shuffling.py").write_text(SHUFFLE)
    (tmp_path / "program.py").write_text(PROGRAM)
    return lambda *argv: subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), *argv], capture_output=True, text=True, timeout=300
    )


def test_a_new_corruption_is_a_file_and_an_entry(program, tmp_path, tokenizer):
    text = " ".join(program("--help").stdout.split())
    assert "masking: targets give way to the mask token (LLaDA, BD3-LM);" in text
    assert "; shuffle: targets change places." in text
    assert "--shuffled_share" in text and "Share of the targets that is moved." in text
    job = {**fresh_model_and_rows(tmp_path, tokenizer), "max_steps": 2, "use_cpu": True, "plot_loss": False}
    job |= {"output_dir": tmp_path / "run", "corruption": "shuffle", "logging_steps": 1}
    done = program(*command_line(job, shuffled_share=0.25))
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 2 and record["objective"]["name"] == "reordering"
    assert record["objective"]["corruption"] == "shuffle" and record["objective"]["shuffled_share"] == 0.25
    assert "mask_count" not in record["objective"]
    for setting, message in (
        ({"corruption": "some"}, "argument --corruption: invalid choice: 'some' (choose from"),
        ({"mask_count": "bernoulli"}, "`mask_count` is for `corruption` masking or editing"),
        ({"shuffled_share": 0.0}, "`shuffled_share` must lie in (0, 1], got 0.0"),
    ):
        assert message in program(*command_line(job, **setting)).stderr


def test_settings_have_names_of_their_own():
    """They become options of one program."""
    classes = dict.fromkeys(settings for kind in CORRUPTIONS.values() for settings in kind.settings)
    names = [field.name for settings in classes for field in fields(settings)]
    config_class = TRAINERS["diffusion"].config_class
    inherited = {field.name for base in config_class.__mro__[len(classes) + 1 :] for field in fields_of(base)}
    assert len(set(names)) == len(names) and not inherited & set(names)
    assert set(names) <= {field.name for field in fields(config_class)}


def fields_of(base):
    return fields(base) if hasattr(base, "__dataclass_fields__") else ()
