"""Scores of continuations: the token rule, exact values, and independence of batches."""

import pytest
import torch
from generation_models import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.scoring.continuations import conditional_rows, context_ids, encode_pair, score_continuations
from nanollada.trainers.scoring.likelihood import causal_nll, exact_nelbo, monte_carlo_nelbo

PAIRS = [([0, 4], [6]), ([0, 7, 8, 9, 5], [5, 6, 4]), ([0], [9, 9, 5, 7, 6, 4, 8, 8, 6, 5, 4]), ([0, 5], [5, 6, 4])]


def build(model_class):
    torch.manual_seed(0)
    model = model_class(NanoLLaDAConfig(**{**SHAPE, "vocab_size": 12})).double().train()
    with torch.no_grad():  # a model with opinions
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.dim() == 2 else None
    return model


def test_a_pair_is_cut_where_the_context_ends(tokenizer):
    prompt, target = encode_pair(tokenizer, "The cat sat on ", "the mat.")
    assert prompt == context_ids(tokenizer, "The cat sat on") and prompt[0] == tokenizer.pad_token_id
    assert prompt + target == context_ids(tokenizer, "The cat sat on the mat.")  # the space is the continuation's
    assert tokenizer.decode(target) == " the mat."
    assert encode_pair(tokenizer, "", "the mat.")[0] == [tokenizer.pad_token_id]
    with pytest.raises(ValueError, match="`continuation` must add a token to its context, got '' behind 'a  '"):
        encode_pair(tokenizer, "a  ", "")


def test_a_pair_spells_its_text_wherever_it_is_cut(tokenizer):
    """A token that crosses the border (at most cuts) is neither the context's nor dropped."""
    crossed = 0
    for text in ("The cat sat on the mat.", "今天天气很好,我们去公园散步。", "def add(first, second):"):
        for cut in range(1, len(text)):
            prompt, target = encode_pair(tokenizer, text[:cut], text[cut:])
            assert prompt == context_ids(tokenizer, text[:cut].rstrip())
            assert tokenizer.decode(prompt[1:]) + tokenizer.decode(target) == text
            crossed += prompt + target != context_ids(tokenizer, text)
    assert crossed > 10


def test_text_without_a_token_is_refused(char_tokenizer):
    with pytest.raises(ValueError, match="the text is not in the vocabulary: '€'"):
        encode_pair(char_tokenizer, "The ", "€")
    with pytest.raises(ValueError, match="the text is not in the vocabulary: '€'"):
        context_ids(char_tokenizer, "The €")


@torch.no_grad()
def test_scores_are_the_likelihoods():
    causal, masked = build(NanoLLaDAForCausalLM), build(NanoLLaDAForMaskedLM)
    for model, reference in ((causal, causal_nll), (masked, exact_nelbo)):
        expected = []
        for prompt, target in PAIRS:
            (batch,) = conditional_rows([prompt], [target], 0)
            expected.append(reference(model.eval(), batch).item())
        model.train()
        found = score_continuations(model, PAIRS, pad_token_id=0, samples=2**11, batch_size=3)
        assert model.training
        torch.testing.assert_close(found.nats, torch.tensor(expected, dtype=torch.double))
        assert not found.variance.any() and found.bound == (model is masked)
        assert found.tokens.tolist() == [1, 3, 11, 3]
        assert found.nats[1] != found.nats[3]  # the context counts


@torch.no_grad()
def test_noise_belongs_to_the_pair():
    model = build(NanoLLaDAForMaskedLM).eval()
    told = []
    whole = score_continuations(model, PAIRS, pad_token_id=0, samples=4, seed=3, progress=told.append)
    single = score_continuations(model, PAIRS, pad_token_id=0, samples=4, seed=3, batch_size=1)
    torch.testing.assert_close(whole.nats, single.nats)
    torch.testing.assert_close(whole.variance, single.variance)
    assert sum(told) == 4 and "seed 3" in whole.estimator
    (batch,) = conditional_rows([PAIRS[2][0]], [PAIRS[2][1]], 0)
    nats, variance = monte_carlo_nelbo(model, {**batch, "index": torch.tensor([2])}, 4, 3)  # keyed by its place
    torch.testing.assert_close(whole.nats[2:3], nats)
    torch.testing.assert_close(whole.variance[2:3], variance)
    assert not torch.equal(whole.nats, score_continuations(model, PAIRS, pad_token_id=0, samples=4, seed=4).nats)
    numbers = [2**40, 1, 2, 3]  # the first is enumerated
    named = score_continuations(model, PAIRS[::-1], pad_token_id=0, samples=4, seed=3, numbers=numbers[::-1])
    again = score_continuations(model, PAIRS, pad_token_id=0, samples=4, seed=3, numbers=numbers)
    torch.testing.assert_close(again.nats, whole.nats)
    torch.testing.assert_close(named.nats.flip(0), whole.nats)


@torch.no_grad()
def test_a_foreign_causal_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, **shape)).double().eval()
    found = score_continuations(model, PAIRS, pad_token_id=0)
    for (prompt, target), nats in zip(PAIRS, found.nats, strict=True):
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        assert nats.item() == pytest.approx(model(ids, labels=labels).loss.item() * len(target), rel=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="`pairs` must hold at least one pair to score, got none"):
        score_continuations(build(NanoLLaDAForCausalLM), [], pad_token_id=0)
    with pytest.raises(ValueError, match="must not be empty, got an empty one in pair 1"):
        score_continuations(build(NanoLLaDAForCausalLM), [([0], [1]), ([0], [])], pad_token_id=0)
    with pytest.raises(ValueError, match="`numbers` must be one for each pair, got 1 for 4"):
        score_continuations(build(NanoLLaDAForCausalLM), PAIRS, pad_token_id=0, numbers=[1])
    with pytest.raises(ValueError, match="`block_length` is for diffusion models, got 4"):
        score_continuations(build(NanoLLaDAForCausalLM), PAIRS, pad_token_id=0, block_length=4)
