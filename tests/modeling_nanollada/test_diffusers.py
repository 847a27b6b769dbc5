"""Inside diffusers: its `LLaDA2Pipeline` runs our model unchanged, and decodes the tokens that `generate` decodes."""

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from generation_models import EOS, MASK, PAD, VOCABULARY, build, seeded


def pipeline_tokens(model, prompt, threshold, **kwargs):
    """New tokens of diffusers' pipeline, greedy, without editing; a pad after the first EOS, as `generate` has it."""
    block_length = model.config.block_length
    pipeline = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=block_length))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"sampling_method": "greedy", "editing_threshold": None, "output_type": "seq", "eos_token_id": EOS}
    settings |= {"mask_token_id": MASK, "num_inference_steps": block_length, "block_length": block_length, **kwargs}
    found = pipeline(input_ids=prompt, threshold=threshold, **settings).sequences
    found = found[:, prompt.shape[1] :] if found.shape[1] > kwargs["gen_length"] else found
    width = kwargs["gen_length"]
    found = torch.nn.functional.pad(found, (0, width - found.shape[1]), value=PAD)
    for row in found:
        ends = (row == EOS).nonzero()
        if len(ends):
            row[int(ends[0]) + 1 :] = PAD
    return found


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("block_length", [4, 8])
@pytest.mark.parametrize("prompt_length", [8, 11])
def test_the_pipeline_decodes_what_generate_decodes(threshold, block_length, prompt_length):
    new_tokens = 3 * block_length - prompt_length % block_length  # its tail is hidden, ours is seen as in training
    for seed in range(3):
        model = build(seed, initializer_range=0.3, num_hidden_layers=2, block_length=block_length).float()
        prompt = torch.randint(4, VOCABULARY, (1, prompt_length), generator=seeded(seed))
        ours = model.generate(
            prompt, max_new_tokens=new_tokens, threshold=threshold, eos_token_id=EOS, pad_token_id=PAD
        )
        assert torch.equal(
            pipeline_tokens(model, prompt, threshold, gen_length=new_tokens), ours[:, prompt_length:]
        ), seed


def test_batches_of_the_pipeline():
    model = build(1, num_hidden_layers=2, block_length=4).float()
    prompt = torch.randint(4, VOCABULARY, (3, 8), generator=seeded(2))
    settings = {"gen_length": 8, "eos_early_stop": False}
    found = pipeline_tokens(model, prompt, 0.2, **settings)
    ours = model.generate(prompt, max_new_tokens=8, threshold=0.2, eos_token_id=EOS, pad_token_id=PAD)
    assert torch.equal(found, ours[:, 8:])
