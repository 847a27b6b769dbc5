"""`--preset` of the programs: it is its settings, in what is decoded, reported and refused."""

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.decoding.prompting import GenerateArguments, main, run
from nanollada.scripts.decoding.settings import DecodingArguments, effective_settings, generation_settings
from nanollada.trainers.models import config_for

QUALITY = {"joint_threshold": 0.7, "joint_edit_threshold": 0.5, "temperature": 0.0}


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = config_for(tokenizer, initializer_range=0.6, block_length=4, **shape)
    return NanoLLaDAForMaskedLM(config).eval()


def test_it_is_its_settings(model):
    assert generation_settings(model, preset="llada2.1-quality", max_new_tokens=8) == {**QUALITY, "max_new_tokens": 8}
    call = {"preset": "llada2.1-quality", "joint_threshold": 0.8, "max_new_tokens": 8}
    reported = effective_settings(model, **call)
    assert "preset" not in reported and reported["joint_threshold"] == 0.8
    assert reported["joint_edit_threshold"] == 0.5 and DecodingArguments(**call).given() == call


def test_an_autoregressive_model_has_none(model):
    ar = NanoLLaDAForCausalLM(model.config)
    with pytest.raises(
        ValueError, match="`preset` is for diffusion models, got 'llada2.1-speed' for an autoregressive"
    ):
        generation_settings(ar, preset="llada2.1-speed")


def test_on_the_command_line(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["--checkpoint", str(tmp_path), "--prompt", "The cat", "--max_new_tokens", "8"]
    main([*command, "--preset", "llada2.1-speed"])
    text = capsys.readouterr().out
    args = GenerateArguments(checkpoint=str(tmp_path), prompt="The cat")
    expected = run(args, DecodingArguments(max_new_tokens=8, joint_threshold=0.5))
    assert expected.text in text
    assert run(args, DecodingArguments(max_new_tokens=8)).text != expected.text
    with pytest.raises(SystemExit):
        main([*command, "--preset", "llada3"])
    assert "invalid choice: 'llada3' (choose from" in capsys.readouterr().err
