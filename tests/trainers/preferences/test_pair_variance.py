"""On a trained model: what sharing masks and taking more of them does to the noise of a preference score."""

import json

import pytest
import torch
from datasets import Dataset
from preference_cases import likelihood_batch, nudged

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.loading_nanollada import load_model, load_tokenizer
from nanollada.trainers.data.feedback.preferences import preference_rows
from nanollada.trainers.preferences.masks import draw_masks
from nanollada.trainers.preferences.score import score_masks

PAIRS = 6


def sudoku_pairs(quickstart, tokenizer):
    """Right boards, and the same with a wrong digit."""
    pairs = []
    for line in (quickstart / "corpus/sft_test.jsonl").read_text().splitlines():
        question, answer = json.loads(line)["messages"][-2:]
        if question["content"].startswith("Sudoku") and len(pairs) < PAIRS:
            board, place = answer["content"], len(pairs)
            wrong = board[:place] + "1234"["1234".index(board[place]) - 1] + board[place + 1 :]
            pairs.append({"prompt": [question], "chosen": [answer], "rejected": [{**answer, "content": wrong}]})
    return list(preference_rows(Dataset.from_list(pairs), tokenizer))


@torch.no_grad()
def variance(model, reference, batch, draws, steps, shared=True):
    """Of the difference of a pair's log-ratios, over independent draws of its masks: the mean over pairs."""
    margins = []
    for step in range(steps):
        scores = []
        for one, at in ((model, step), (reference, step if shared else -2 - step)):
            targets, keys = batch["labels"] != -100, {"seed": 0, "index": batch["index"], "step": at}
            noise = draw_masks(batch["input_ids"], targets, one.config, estimator="elbo", draws=draws, **keys)
            scores.append(score_masks(one.forward, noise, batch["input_ids"], batch["attention_mask"], None).draws)
        chosen, rejected = (scores[0] - scores[1]).mean(0).view(-1, 2).T
        margins.append(chosen - rejected)
    return torch.stack(margins).var(0).mean().item()


@pytest.mark.slow
def test_on_a_trained_model_sharing_takes_the_noise_away_and_twice_the_masks_half_of_the_rest(quickstart):
    folder = quickstart / "runs/quickstart"
    model = load_model(NanoLLaDAForMaskedLM, folder / "diffusion_sft").eval()
    model.config.block_length = None  # rows are shorter than the block: the same numbers, in one part
    reference = nudged(model, 0.02).eval()
    batch = likelihood_batch(sudoku_pairs(folder, load_tokenizer(folder / "diffusion_sft")))
    four = variance(model, reference, batch, 4, 300)
    eight = variance(model, reference, batch, 8, 300)
    alone = variance(model, reference, batch, 8, 40, shared=False)
    print(f"variance of a score, 4 and 8 masks: {four:.5f}, {eight:.5f}; 8 masks, not shared: {alone:.3f}")
    assert alone > 100 * eight
    assert eight == pytest.approx(four / 2, rel=0.2)
    assert variance(model, model, batch, 2, 3) == 0
