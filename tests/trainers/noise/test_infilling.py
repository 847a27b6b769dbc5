"""A model trained to fill holes of unknown length fills them, whatever number of masks it gets."""

import random

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.diffusion import DiffusionConfig, DiffusionTrainer

QUIET = {"use_cpu": True, "report_to": "none", "plot_loss": False, "disable_tqdm": True, "save_strategy": "no"}
BOS, EOS, MASK, DELETE, INSERT, FIRST, KINDS = 1, 2, 3, 4, 5, 6, 32


def counting(draw):
    """A row that counts from one number to another: any hole in it has one filling, of one length."""
    start = draw.randrange(KINDS - 8)
    return [BOS, *range(FIRST + start, FIRST + draw.randrange(start + 8, KINDS + 1)), EOS]


def tokenized(row, index):
    columns = {"document_ids": [0] * len(row), "position_ids": list(range(len(row))), "num_bytes": len(row) - 1}
    return {"input_ids": row, "labels": [-100, *row[1:]], "index": index, **columns}


def trained(folder, corruption, steps):
    torch.manual_seed(0)
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "mask_token_id": MASK, "pad_token_id": 0}
    tokens |= {"delete_token_id": DELETE, "insert_token_id": INSERT}
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=FIRST + KINDS, **tokens, **shape))
    draw = random.Random(0)
    rows = [tokenized(counting(draw), index) for index in range(4000)]
    given = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 20}
    own = {"expand_rows": 0.9} if corruption == "expansion" else {}
    args = DiffusionConfig(output_dir=str(folder), corruption=corruption, **given, **own, **QUIET)
    DiffusionTrainer(model, args, Collator(0), rows).train()
    return model.eval()


def filled(model, share, count=60, **settings):
    """How many of `count` holes of 4 to 12 tokens are filled right from a `share` of the masks."""
    draw, right = random.Random(1), 0
    for _ in range(count):
        row = [0] * 5
        while len(row) < 16:
            row = counting(draw)
        size = draw.randrange(2, 7) * 2
        begin = draw.randrange(2, len(row) - size - 1)
        masks = [MASK] * int(size * share)
        prompt = torch.tensor([row[:begin] + masks + row[begin + size :]])
        out = model.generate(prompt, max_new_tokens=0, **settings)[0].tolist()
        assert out[:begin] == row[:begin] and out[len(out) - len(row) + begin + size :] == row[begin + size :]
        assert not {MASK, DELETE, INSERT} & set(out)
        right += out == row
    return right / count


@pytest.mark.slow
def test_a_trained_model_fills_holes_from_half_and_from_twice_the_masks(tmp_path):
    plain = trained(tmp_path / "plain", "masking", 300)
    ours = trained(tmp_path / "ours", "expansion", 300)
    assert filled(plain, 1) > 0.8
    for share in (0.5, 1, 2):
        found = filled(ours, share, max_expansions=16)
        print(share, found, filled(ours, share, max_expansions=16, threshold=0.9), filled(plain, share))
        assert found > 0.8
    for share in (0.5, 2):
        assert filled(plain, share) == 0  # it can't: the length is wrong
        assert filled(ours, share) == 0
