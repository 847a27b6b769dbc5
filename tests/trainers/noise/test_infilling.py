"""A model trained to fill holes of unknown length fills them, whatever number of masks it gets."""

import random

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.diffusion import DiffusionConfig, DiffusionTrainer

QUIET = {"use_cpu": True, "report_to": "none", "plot_loss": False, "disable_tqdm": True, "save_strategy": "no"}
BOS, EOS, MASK, DELETE, INSERT, FIRST, KINDS = 1, 2, 3, 4, 5, 6, 14


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
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = NanoLLaDAForMaskedLM(NanoLLaDAConfig(vocab_size=FIRST + KINDS, **tokens, **shape))
    draw = random.Random(0)
    rows = [tokenized(counting(draw), index) for index in range(4000)]
    given = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 20}
    own = {"expand_rows": 1.0, "max_extra": 8} if corruption == "expansion" else {}
    args = DiffusionConfig(output_dir=str(folder), corruption=corruption, **given, **own, **QUIET)
    DiffusionTrainer(model, args, Collator(0), rows).train()
    return model.eval()


def filled(model, share, count=100, **settings):
    """The share of `count` holes of 4 or 6 tokens that are filled right, from a `share` of as many masks."""
    draw, right = random.Random(1), 0
    for _ in range(count):
        row, size = counting(draw), draw.choice((4, 6))
        begin = draw.randrange(2, len(row) - size - 1)
        masks = [MASK] * int(size * share)
        prompt = torch.tensor([row[:begin] + masks + row[begin + size :]])
        out = model.generate(prompt, max_new_tokens=0, **settings)[0].tolist()
        behind = row[begin + size :]
        assert out[:begin] == row[:begin] and out[-len(behind) :] == behind
        assert not {MASK, DELETE, INSERT} & set(out)
        right += out == row
    return right / count


@pytest.mark.slow
def test_a_trained_model_fills_holes_from_half_and_from_twice_the_masks(tmp_path):
    plain, ours = trained(tmp_path / "plain", "masking", 300), trained(tmp_path / "ours", "expansion", 500)
    found = {
        (share, name): filled(model, share, **own)
        for share in (0.5, 1, 2)
        for name, model, own in (
            ("plain", plain, {}),
            ("one by one", ours, {"max_expansions": 16}),
            ("threshold", ours, {"max_expansions": 16, "threshold": 0.9}),
        )
    }
    print(found)
    assert found[1, "plain"] > 0.9 and found[0.5, "plain"] == found[2, "plain"] == 0  # the length is wrong
    for share in (0.5, 1, 2):
        assert min(found[share, "one by one"], found[share, "threshold"]) > 0.7
