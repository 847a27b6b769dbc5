"""LLaDA's published sampler, written down from the paper (2502.09992, appendix B.4) beside ours: the same tokens."""

import itertools

import pytest
import torch
from generation_models import EOS, MASK, VOCABULARY, build, seeded


@torch.no_grad()
def published(model, prompt, gen_length, block_length, steps, cfg_scale, remasking, generator):
    """
    One row at temperature 0, with nothing that keeps the mask token away but the model itself: guidance of −∞ would be
    no number, and a text of masks. `steps` is LLaDA's, of all blocks. Random scores come from `generator`, one for
    each open position of the block.
    """
    row = prompt + [MASK] * gen_length
    blocks = gen_length // block_length
    for block in range(blocks):
        begin = len(prompt) + block * block_length
        todo = list(range(begin, begin + block_length))
        share, remainder = divmod(len(todo), steps // blocks)
        for step in range(steps // blocks):
            logits = model(torch.tensor([row])).logits[0]  # [L, V]
            if cfg_scale:
                hidden = [MASK] * len(prompt) + row[len(prompt) :]
                without = model(torch.tensor([hidden])).logits[0]
                logits = without + (cfg_scale + 1) * (logits - without)
            logits[:, EOS] = -torch.inf  # its `logits_eos_inf`
            confidence = logits.softmax(-1).amax(-1)
            if remasking == "random":
                confidence[todo] = torch.rand(len(todo), generator=generator, dtype=torch.double)
            keep = sorted(todo, key=lambda index: -float(confidence[index]))[: share + (step < remainder)]
            for index in keep:
                row[index] = int(logits[index].argmax())
            todo = [index for index in todo if index not in keep]
        assert not todo
    return row


CASES = list(itertools.product((8, 4, 2), (1.0, 0.5, 0.375), (0.0, 0.5, 1.5), ("low_confidence", "random")))


@pytest.mark.parametrize(("block_length", "share", "cfg_scale", "remasking"), CASES)
def test_the_same_tokens(block_length, share, cfg_scale, remasking):
    steps = 8 // block_length * max(1, round(block_length * share))
    for seed in range(3):
        model = build(seed, initializer_range=0.3, num_hidden_layers=2)
        prompt = torch.randint(4, VOCABULARY, (5,), generator=seeded(seed)).tolist()
        expected = published(model, prompt, 8, block_length, steps, cfg_scale, remasking, seeded(seed))
        found = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=8,
            block_length=block_length,
            steps=steps * block_length // 8,  # per block
            cfg_scale=cfg_scale,
            remasking=remasking,
            eos_policy="forbid",
            eos_token_id=EOS,
            generator=seeded(seed),
        )
        assert found[0].tolist() == expected
