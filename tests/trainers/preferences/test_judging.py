"""Held-out pairs: scores are log-likelihoods or their bounds, margins and accuracy what they say."""

import pytest
import torch
from preference_cases import VOCABULARY, build_model, likelihood_batch, make_pairs, nudged

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM
from nanollada.trainers.data.packing import EosPadding
from nanollada.trainers.preferences.judging import PairScores, score_pairs
from nanollada.trainers.preferences.pairs import PAIR
from nanollada.trainers.scoring.likelihood import exact_nelbo


def test_an_ar_model_s_scores_are_its_log_likelihoods():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **shape)).double()
    rows = make_pairs(5)
    scores = score_pairs(model, rows, batch_size=2)
    for row, both in zip(rows, scores.scores, strict=True):
        for name, score in zip(PAIR[1:], both, strict=True):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            assert score.item() == pytest.approx(log_probs[len(row["prompt_ids"]) - 1 :].sum().item(), rel=1e-9)
    assert not scores.variances.any()


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_diffusion_model_s_are_elbos(block_length):
    model, rows = build_model(block_length=block_length), make_pairs(3, longest=4)
    exact = -exact_nelbo(model, likelihood_batch(rows)).view(3, 2)
    scores = score_pairs(model, rows, samples=4096, batch_size=2)  # few targets: enumerated
    assert torch.allclose(scores.scores, exact, rtol=1e-9) and not scores.variances.any()
    drawn = score_pairs(model, rows, samples=6, seed=1)
    assert drawn.variances.any()
    assert (drawn.scores - exact).sum().abs() < 4 * drawn.variances.sum().sqrt()


def test_margins_are_of_what_the_model_learnt_since_its_reference():
    model, rows = build_model(), make_pairs()
    other = nudged(model, 0.02)
    alone, same, since = (score_pairs(model, rows, samples=4, reference=one) for one in (None, model, other))
    assert torch.equal(alone.margins, alone.scores[:, 0] - alone.scores[:, 1])
    assert not same.margins.any() and same.accuracy == 0.5
    assert torch.allclose(since.margins, alone.margins - score_pairs(other, rows, samples=4).margins)
    exact = score_pairs(model, rows, samples=2**12, reference=other).margins
    noise = (since.margins - exact).square().mean()
    assert noise < 0.05 * (alone.margins - score_pairs(model, rows, samples=2**12).margins).square().mean()


def test_accuracy_counts_ties_half_and_knows_its_error():
    scores = PairScores(torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [3.0, 1.0]]).double(), torch.zeros(4, 2))
    assert scores.accuracy == pytest.approx(2.5 / 4)
    assert scores.accuracy_standard_error == pytest.approx(torch.tensor([1, 0, 0.5, 1]).std().item() / 2)
    assert PairScores(scores.scores[:1], scores.variances[:1]).accuracy_standard_error is None
    with pytest.raises(ValueError, match="`rows` must hold at least one pair"):
        score_pairs(build_model(), [])


def test_padding_is_scored_as_the_answer_s_end():
    model = build_model(block_length=4)
    rows = make_pairs(2, longest=3)
    padding = EosPadding("block", 2, 64, 4)
    filled = [
        row | {name: row[name] + [2] * (-(len(row["prompt_ids"]) + len(row[name])) % 4) for name in PAIR[1:]}
        for row in rows
    ]
    by_hand = score_pairs(model, filled, samples=4096)
    assert torch.equal(score_pairs(model, rows, samples=4096, padding=padding).scores, by_hand.scores)
    assert not torch.allclose(score_pairs(model, rows, samples=4096).scores, by_hand.scores)
