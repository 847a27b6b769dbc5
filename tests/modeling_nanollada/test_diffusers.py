"""Inside diffusers: its `LLaDA2Pipeline` runs our model unchanged, and decodes the tokens that `generate` decodes."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from generation_models import EOS, MASK, PAD, VOCABULARY, build, seeded

from nanollada import modeling_nanollada


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


# ---- with edits


def cut(rows):
    """A pad after the first EOS."""
    ended = (rows == EOS).cumsum(1) - (rows == EOS).long() > 0
    return rows.masked_fill(ended, PAD)


def edited_cases(number):
    for seed in range(number):
        block_length = (4, 8)[seed % 2]
        model = build(seed, initializer_range=0.4, num_hidden_layers=2, block_length=block_length).float()
        prompt = torch.randint(4, VOCABULARY, (1, (8, 11)[seed // 2 % 2]), generator=seeded(seed))
        yield model, prompt, 3 * block_length - prompt.shape[1] % block_length


def pipeline_with_edits(model, prompt, new_tokens, threshold, edit_threshold, post_steps):
    """
    The pipeline makes one step without masks more than it says, none where masks took all `num_inference_steps`, and
    goes on behind an EOS.
    """
    settings = {"editing_threshold": edit_threshold, "max_post_steps": post_steps - 1, "eos_early_stop": False}
    settings |= {"num_inference_steps": model.config.block_length + 1}
    return pipeline_tokens(model, prompt, threshold, gen_length=new_tokens, **settings)


@pytest.mark.parametrize(("threshold", "edit_threshold"), [(0.2, 0.1), (0.3, 0.3), (0.7, 0.5)])
def test_edits_of_the_pipeline_are_those_of_the_joint_rule(threshold, edit_threshold):
    changed = spent = 0
    for model, prompt, new_tokens in edited_cases(4):
        for post_steps in (1, 4):
            settings = {"max_new_tokens": new_tokens, "eos_token_id": EOS, "pad_token_id": PAD}
            plain = model.generate(prompt, threshold=threshold, **settings)[:, prompt.shape[1] :]
            settings |= {"joint_threshold": threshold, "joint_edit_threshold": edit_threshold}
            ours = model.generate(prompt, max_post_steps=post_steps, **settings)[:, prompt.shape[1] :]
            theirs = pipeline_with_edits(model, prompt, new_tokens, threshold, edit_threshold, post_steps)
            assert torch.equal(cut(theirs), cut(ours))
            changed += not torch.equal(ours, plain)
            more = model.generate(prompt, max_post_steps=post_steps + 1, **settings)[:, prompt.shape[1] :]
            spent += not torch.equal(ours, more)
    assert changed  # or nothing was compared
    assert spent or edit_threshold > 0.1  # the budget counts


def test_off_is_none_or_zero_there_and_none_here():
    for model, prompt, new_tokens in edited_cases(2):
        settings = {"max_new_tokens": new_tokens, "eos_token_id": EOS, "pad_token_id": PAD}
        plain = model.generate(prompt, threshold=0.2, edit_threshold=None, **settings)
        off = [pipeline_with_edits(model, prompt, new_tokens, 0.2, value, 4) for value in (None, 0.0, -1.0)]
        assert all(torch.equal(cut(found), cut(plain[:, prompt.shape[1] :])) for found in off)
        never = model.generate(prompt, joint_threshold=0.2, joint_edit_threshold=1.0, **settings)
        assert torch.equal(never, plain)


def test_the_pages_example():
    """The lines of DECODING.md, with edits and without."""
    page = (Path(modeling_nanollada.__file__).parent / "DECODING.md").read_text(encoding="utf-8")
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", page, re.S) if "BlockRefinementScheduler" in part]
    seen = set()
    for seed in range(4):
        model = build(seed, initializer_range=0.4, num_hidden_layers=2, block_length=8).float()
        prompt = torch.randint(4, VOCABULARY, (1, 8), generator=seeded(seed))
        settings = {"max_new_tokens": 8, "eos_token_id": None}
        ways = {"0.5": {"preset": "llada2.1-quality"}, "None": {"threshold": 0.7}, "1e-6": {"joint_threshold": 0.7}}
        for value, rule in ways.items():
            namespace = {"BlockRefinementScheduler": BlockRefinementScheduler, "torch": torch}
            namespace |= {"model": model, "prompt": prompt, "block_length": 8}
            assert code.count('"editing_threshold": 0.5') == 1
            with torch.no_grad():
                exec(code.replace('"editing_threshold": 0.5', f'"editing_threshold": {value}'), namespace)
            assert torch.equal(namespace["row"], model.generate(prompt, **rule, **settings)), (seed, value)
            seen.add((seed, tuple(namespace["row"][0].tolist())))
    assert len(seen) > 4  # edits changed something


def test_edit_tokens_are_no_words_of_the_pipeline():
    """A model with `<|delete|>` and `<|insert|>` that it would love to say writes what it writes without them."""
    prompt = torch.randint(4, VOCABULARY - 2, (1, 8), generator=seeded(1))
    tokens = {"delete_token_id": VOCABULARY - 1, "insert_token_id": VOCABULARY - 2}
    model = build(1, initializer_range=0.4, num_hidden_layers=2, block_length=4, **tokens).float()
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY - 2 :] *= 9
    found = pipeline_with_edits(model, prompt, 12, 0.3, 0.3, 4)
    settings = {"joint_threshold": 0.3, "joint_edit_threshold": 0.3, "max_post_steps": 4}
    ours = model.generate(prompt, max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD, **settings)
    assert torch.equal(cut(found), cut(ours[:, 8:])) and not (found >= VOCABULARY - 2).any()
