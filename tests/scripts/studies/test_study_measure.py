"""A study's measurements: scores in parts add up, and exact counts have the noise that they must have."""

import json

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.studies.measure import gradient_variance, loss_noise, moments, score
from nanollada.trainers.data.collator import Collator
from nanollada.trainers.data.prepare import DataArguments, prepare_data
from nanollada.trainers.models import config_for
from nanollada.trainers.scoring.likelihood import evaluate_likelihood

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": f"Text {i}: the cat sat on the mat, and the dog on the log."} for i in range(12)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(model_class, tokenizer, folder, **settings):
    torch.manual_seed(0)
    model = model_class(config_for(tokenizer, initializer_range=0.5, **SHAPE, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_class", [NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM])
def test_scores_add_up(model_class, tmp_path, texts, tokenizer):
    folder = saved(model_class, tokenizer, tmp_path / "model", **({"block_length": 1}))
    found = score(folder, {"texts": texts}, [None, 4], samples=2, max_length=32, batch_size=3)
    masked = model_class is NanoLLaDAForMaskedLM
    assert [(part["block_length"], part["own"]) for part in found] == (
        [(1, True), (4, False)] if masked else [(None, True)]
    )
    rows = prepare_data(DataArguments(eval_data=[str(texts)], max_length=32), tokenizer).eval
    model = model_class.from_pretrained(folder)
    for part, block in zip(found, [None, 4], strict=False):
        batch = Collator(tokenizer.pad_token_id)(list(rows))
        whole = evaluate_likelihood(model, [batch], samples=2, block_length=block)
        nats, variance, tokens, num_bytes = map(sum, zip(*part["chunks"], strict=True))
        assert len(part["chunks"]) == -(-len(rows) // 3) and part["bound"] == whole.bound == masked
        assert (tokens, num_bytes) == (whole.tokens, whole.bytes)
        assert nats == pytest.approx(whole.nats, rel=1e-5)
        assert variance == pytest.approx(whole.standard_error**2, rel=1e-4)


def test_one_token_blocks_have_no_noise_with_exact_counts(tmp_path, texts, tokenizer):
    folder = saved(NanoLLaDAForMaskedLM, tokenizer, tmp_path / "model", block_length=1)
    found = loss_noise(folder, [str(texts)], draws=6, batch_size=4, max_length=32, seed=0)
    exact, bernoulli = found["exact"], found["bernoulli"]
    assert found["block_length"] == 1 and 0 < found["tokens"] <= 4 * 32
    assert exact["standard_deviation"] < 1e-5 and exact["gradient_variance"] < 1e-6
    assert bernoulli["standard_deviation"] > 0.05 and bernoulli["gradient_variance"] > 0.01


def test_moments_and_gradient_variance():
    assert moments([1.0, 3.0]) == {
        "mean": 2.0,
        "standard_error": pytest.approx(1.0),
        "standard_deviation": pytest.approx(2**0.5),
        "draws": 2,
    }
    generator = torch.Generator().manual_seed(0)
    gradients = list(0.5 + 2 * torch.randn(500, 100, generator=generator))  # a variance of 4 in each of 100 directions
    assert gradient_variance(gradients) == pytest.approx(400, rel=0.05)
    assert gradient_variance(gradients[:2]) == pytest.approx((gradients[0] - gradients[1]).square().sum().item() / 2)
