"""The mean of checkpoints: its values, what it refuses, and the folder that the program writes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.scripts.merge_checkpoints import main
from nanollada.trainers.weights.merging import merge_checkpoints

WIDTH = 16
NAME = "model.norm.weight"


@pytest.fixture
def folders(tmp_path, tokenizer):
    """Three checkpoints of one shape with records of their runs beside them."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = NanoLLaDAConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, **shape)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(tmp_path / f"checkpoint-{seed}")
        NanoLLaDAForMaskedLM(config).save_pretrained(found[-1])
        tokenizer.save_pretrained(found[-1])
        (found[-1] / "optimizer.pt").write_text("")
        (found[-1] / "trainer_state.json").write_text("{}")
        (found[-1] / "ema.safetensors").write_text("")
    return found


def weights(folder):
    return load_file(folder / "model.safetensors")


def change(folder, **tensors):
    changed = {name: tensor for name, tensor in {**weights(folder), **tensors}.items() if tensor is not None}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_is_the_mean_in_float64(folders):
    """Three float32 numbers whose mean a sum in float32 gets wrong."""
    for folder, value in zip(folders, (2.0**24, 1.0, 1.0), strict=True):
        change(folder, **{NAME: torch.full((WIDTH,), value)})
    mean, parts = merge_checkpoints(folders), [weights(folder) for folder in folders]
    assert mean.keys() == parts[0].keys() and all(tensor.dtype == torch.float32 for tensor in mean.values())
    for name, tensor in mean.items():
        assert tensor.equal((sum(part[name].double() for part in parts) / 3).float()), name
    naive = (parts[0][NAME] + parts[1][NAME] + parts[2][NAME]) / 3
    assert not mean[NAME].equal(naive)


def test_the_program_writes_a_checkpoint(folders, tmp_path, capsys):
    main(["--checkpoints", *map(str, folders), "--output_dir", str(tmp_path / "new/merged")])
    merged = tmp_path / "new/merged"
    assert "mean of 3 checkpoints" in capsys.readouterr().out
    model, report = NanoLLaDAForMaskedLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = merge_checkpoints(folders)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(merged).items())
    assert model.get_parameter(NAME).equal(expected[NAME])
    assert AutoTokenizer.from_pretrained(merged).mask_token_id == model.config.mask_token_id
    own = {"optimizer.pt", "trainer_state.json", "ema.safetensors"}
    assert {path.name for path in merged.iterdir()} == {path.name for path in folders[0].iterdir()} - own
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_low_precision_becomes_float32(folders, tmp_path):
    for folder in folders:
        model = NanoLLaDAForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    merge_checkpoints(folders, tmp_path / "merged")
    model = NanoLLaDAForMaskedLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.float32


def test_other_tensors_are_refused(folders):
    first, second, third = folders
    change(second, **{NAME: torch.ones(WIDTH + 1)})
    with pytest.raises(
        ValueError, match=rf"checkpoint-1/.*: {NAME} must be as in .*checkpoint-0.*\[16\].*got shape \[17\]"
    ):
        merge_checkpoints([first, second])
    change(second, **{NAME: torch.ones(WIDTH, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=rf"checkpoint-1/.*: {NAME} must .*dtype F32\), got .*dtype BF16"):
        merge_checkpoints([first, third, second])
    change(second, **{NAME: None})
    with pytest.raises(ValueError, match=rf"checkpoint-1/.*: {NAME} must .*got missing"):
        merge_checkpoints([first, second])
    with pytest.raises(ValueError, match=rf"checkpoint-2/.*: {NAME} must .*\(missing\), got shape"):
        merge_checkpoints([second, third])


def test_other_configs_are_refused(folders):
    config = json.loads((folders[2] / "config.json").read_text())
    (folders[2] / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    merge_checkpoints(folders)  # who wrote it does not matter
    (folders[2] / "config.json").write_text(json.dumps({**config, "block_length": 4}))
    with pytest.raises(ValueError, match=r"checkpoint-2: `block_length` must be as in .*checkpoint-0 \(None\), got 4"):
        merge_checkpoints(folders)


def test_checkpoints_with_edit_tokens_and_without_have_no_mean(folders):
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "delete_token_id": 8, "insert_token_id": 9}))
    with pytest.raises(
        ValueError, match=r"checkpoint-1: `delete_token_id` must be as in .*checkpoint-0 \(None\), got 8"
    ):
        merge_checkpoints(folders)
    older = {name: value for name, value in config.items() if name not in ("delete_token_id", "insert_token_id")}
    (folders[1] / "config.json").write_text(json.dumps(older))  # of before there were any
    merge_checkpoints(folders)


def test_wrong_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="`folders` must name at least two checkpoints, got 1"):
        merge_checkpoints(folders[:1])
    with pytest.raises(ValueError, match="`output` must be new or empty, got .*checkpoint-2"):
        merge_checkpoints(folders, folders[2])
    for name in ("model.safetensors", "config.json"):
        shutil.copytree(folders[0], tmp_path / f"no-{name}")
        (tmp_path / f"no-{name}" / name).unlink()
        with pytest.raises(ValueError, match=f"`folders` must hold checkpoints with {name}, got .*no-{name} without"):
            merge_checkpoints([folders[0], tmp_path / f"no-{name}"])


def test_a_failure_leaves_nothing(folders, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("nanollada.trainers.weights.merging.save_file", failing)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        merge_checkpoints(folders, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
