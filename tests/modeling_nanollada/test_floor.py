"""The mask token's logit is finite: what other people compute with our logits is numbers, and its probability is 0."""

import pytest
import torch
from generation_models import MASK, build
from torch.nn import functional as F

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(params=DTYPES, ids=str)
def pair(request):
    """Logits of two models in one dtype, `[1, L, V]`; those of the second are some hundreds wide."""
    ids = torch.tensor([[5, MASK, 7, MASK, MASK, 9]])
    first, second = (build(seed, initializer_range=0.3, num_hidden_layers=2).to(request.param) for seed in (0, 1))
    with torch.no_grad():
        second.lm_head.weight *= 50
        return first(ids).logits, second(ids).logits


def test_the_probability_is_zero(pair):
    for logits in pair:
        assert logits[..., MASK].isfinite().all() and not logits.softmax(-1)[..., MASK].any()
        others = torch.cat((logits[..., :MASK], logits[..., MASK + 1 :]), dim=-1)
        torch.testing.assert_close(logits.logsumexp(-1), others.logsumexp(-1))


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_guidance_is_a_number(pair, scale):
    conditional, unconditional = pair
    guided = unconditional + (scale + 1) * (conditional - unconditional)  # LLaDA's
    assert guided.isfinite().all() and not guided.softmax(-1)[..., MASK].any()
    guided = (1 + scale) * conditional - scale * unconditional  # others'
    assert guided.isfinite().all() and not guided.softmax(-1)[..., MASK].any()


def test_what_others_compute_of_it(pair):
    p, q = pair
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    assert log_p.isfinite().all()
    for value in (
        -(p.softmax(-1) * log_p).sum(-1),  # entropy
        (p.softmax(-1) * (log_p - log_q)).sum(-1),  # KL
        F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
        p.softmax(-1).topk(2).values.diff(dim=-1),  # margin
        torch.distributions.Categorical(logits=p.float()).entropy(),
        (p / 0.2).softmax(-1),  # temperature
        (p.mean(-1) - p.amax(-1)),
    ):
        assert value.isfinite().all()


def test_its_column_has_no_gradient():
    model, ids = build(0), torch.tensor([[5, MASK, 7, MASK]])
    model(ids, labels=torch.tensor([[-100, 6, -100, 8]])).loss.backward()
    assert not model.lm_head.weight.grad[MASK].any() and model.lm_head.weight.grad.any()
