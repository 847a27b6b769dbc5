"""The chunked head loss against `F.cross_entropy` of all logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanollada.modeling_nanollada.loss_nanollada import default_chunk_size, linear_cross_entropy

TOKENS, HIDDEN, VOCAB, SUPPRESSED = 23, 8, 13, 3


def problem(dtype=torch.float64, tokens=TOKENS, seed=0):
    """`hidden_states`, `weight`, `targets` (never the suppressed token or the last), `weights`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB - 2, (tokens,), generator=generator)
    targets += targets >= SUPPRESSED
    return hidden, weight, targets, torch.rand(tokens, dtype=torch.float64, generator=generator) * 3


def reference(hidden, weight, targets, weights=None, suppressed_token_ids=()):
    """All logits at once."""
    logits = F.linear(hidden, weight)
    columns = torch.isin(torch.arange(len(weight)), torch.tensor(suppressed_token_ids, dtype=torch.long))
    logits = logits.masked_fill(columns, -torch.inf)
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.to(exact), targets, reduction="none")
    return (losses if weights is None else losses * weights).sum()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk_size", [1, 5, TOKENS, 64, None])
@pytest.mark.parametrize("suppressed", [[], [SUPPRESSED], [SUPPRESSED, VOCAB - 1]])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(chunk_size, suppressed, weighted):
    hidden, weight, targets, weights = problem()
    weights = weights if weighted else None
    expected = reference(hidden, weight, targets, weights, suppressed)
    got = linear_cross_entropy(hidden, weight, targets, weights, suppressed, chunk_size)
    assert got.dtype == torch.float64 and got.shape == ()
    assert relative(got, expected) < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(got * 0.7, (hidden, weight)),  # the factor: what comes from above counts
        torch.autograd.grad(expected * 0.7, (hidden, weight)),
        strict=True,
    ):
        assert relative(ours, theirs) < 1e-12


def test_gradcheck():
    hidden, weight, targets, weights = problem(tokens=5)
    weights.requires_grad_()

    def loss(hidden, weight, weights):
        return linear_cross_entropy(hidden, weight, targets, weights, [SUPPRESSED], chunk_size=2)

    assert torch.autograd.gradcheck(loss, (hidden, weight, weights))


def test_the_suppressed_token_gets_no_gradient():
    hidden, weight, targets, weights = problem()
    linear_cross_entropy(hidden, weight, targets, weights, [SUPPRESSED], 4).backward()
    assert (weight.grad[SUPPRESSED] == 0).all()
    assert (weight.grad.abs().sum(1) > 0).sum() == VOCAB - 1
    assert linear_cross_entropy(hidden, weight, targets.fill_(SUPPRESSED), None, [SUPPRESSED]) == torch.inf


def test_no_tokens_give_a_zero_that_still_has_gradients():
    hidden, weight, targets, weights = problem(tokens=0)
    loss = linear_cross_entropy(hidden, weight, targets, weights, [SUPPRESSED])
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad.shape == (VOCAB, HIDDEN) and (weight.grad == 0).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_nothing_and_gets_nothing(frozen):
    tensors = [tensor for tensor in problem()]
    expected = reference(*tensors)
    wanted = torch.autograd.grad(expected, tensors[1 - frozen])[0]
    tensors[frozen] = tensors[frozen].detach()
    with CountProducts() as products:
        loss = linear_cross_entropy(*tensors, chunk_size=TOKENS)
    assert products.count == 2  # logits, and one of the two gradients
    loss.backward()
    assert tensors[frozen].grad is None
    assert relative(tensors[1 - frozen].grad, wanted) < 1e-12


def test_without_gradients_nothing_but_the_loss_is_computed():
    hidden, weight, targets, weights = problem()
    with torch.no_grad(), CountProducts() as products:
        loss = linear_cross_entropy(hidden, weight, targets, weights, chunk_size=TOKENS)
    assert products.count == 1 and not loss.requires_grad
    assert relative(loss, reference(hidden, weight, targets, weights)) < 1e-12


def test_a_tied_embedding_gets_both_gradients():
    _, weight, targets, weights = problem()
    ids = targets.roll(1)
    got = linear_cross_entropy(weight[ids].tanh(), weight, targets, weights, chunk_size=5)
    expected = reference(weight[ids].tanh(), weight, targets, weights)
    assert relative(torch.autograd.grad(got, weight)[0], torch.autograd.grad(expected, weight)[0]) < 1e-12


def test_two_backward_passes_add_up():
    hidden, weight, targets, weights = problem()
    loss = linear_cross_entropy(hidden, weight, targets, weights)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert relative(weight.grad, 2 * once) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_products_and_nothing_else(dtype):
    hidden, weight, targets, weights = problem(torch.float32, tokens=200)
    exact = reference(hidden.double(), weight.double(), targets, weights, [SUPPRESSED])
    exact_gradients = torch.autograd.grad(exact, (hidden, weight))
    rounding = torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, targets, weights, [SUPPRESSED], 64)
        double = linear_cross_entropy(hidden.double(), weight.double(), targets, weights, [SUPPRESSED], 64)
    assert loss.dtype == torch.float32
    # the logits were rounded once, as by F.linear, and summed over the tokens without more
    logits = F.linear(hidden.to(dtype), weight.to(dtype)).float()
    logits[:, SUPPRESSED] = -torch.inf
    assert relative(loss, (F.cross_entropy(logits, targets, reduction="none") * weights).sum()) < 1e-6
    for got, expected in zip(torch.autograd.grad(loss, (hidden, weight)), exact_gradients, strict=True):
        assert got.dtype == torch.float32
        assert 1e-7 < relative(got, expected) < 2 * rounding
    assert relative(double, exact) < 1e-12  # float64 stays


def test_small_slopes_survive_float16():
    """Below 6e-8 float16 is zero; the loss scale that would lift them comes after the products."""
    hidden = torch.zeros(4, HIDDEN)
    hidden[:, 0] = 1
    weight = torch.zeros(VOCAB, HIDDEN)
    weight[1, 0] = 20.0  # every other token has a probability of 2e-9
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, torch.ones(4, dtype=torch.long))
    loss.backward()
    assert (weight.grad[0, 0] > 0) and relative(weight.grad[0, 0], torch.tensor(4 * 2.0612e-9)) < 1e-3


def test_low_precision_weights_get_their_own_kind_of_gradient():
    hidden, weight, targets, weights = problem(torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets, weights, chunk_size=2).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = reference(hidden.double(), weight.double(), targets, weights)
    for got, expected in zip((hidden.grad, weight.grad), torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert relative(got.double(), expected.double()) < 1e-2


def test_the_largest_tensor_is_one_chunk_of_logits():
    hidden, weight, targets, weights = problem(torch.float32, tokens=4096)
    with LargestTensor() as whole:
        reference(hidden, weight, targets, weights).backward()
    assert whole.elements >= 4096 * VOCAB
    with LargestTensor() as chunked:
        linear_cross_entropy(hidden, weight, targets, weights, [SUPPRESSED], chunk_size=64).backward()
    assert chunked.elements == 4096 * HIDDEN  # the gradient of the hidden states; the logits of a chunk are smaller
    hidden, weight = torch.randn(640, 2), torch.randn(40_000, 2, requires_grad=True)
    with LargestTensor() as by_default:
        linear_cross_entropy(hidden, weight, torch.arange(640)).backward()
    assert by_default.elements == 64 * 40_000


def test_default_chunks():
    assert default_chunk_size(6400, "cpu") == 320  # 2 million logits
    assert default_chunk_size(6400, "cuda") > 8192
    assert default_chunk_size(10**9, "cpu") == 64


def test_inside_a_compiled_function():
    hidden, weight, targets, weights = problem()

    def loss(hidden, weight):
        keep = weights > 1  # the number of tokens depends on the data
        return linear_cross_entropy(hidden[keep] * 2, weight, targets[keep], weights[keep], [SUPPRESSED], 5)

    compiled = torch.compile(loss, backend="aot_eager")(hidden, weight)
    expected = loss(hidden, weight)
    assert relative(compiled, expected) < 1e-12
    for got, wanted in zip(
        torch.autograd.grad(compiled, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        assert relative(got, wanted) < 1e-12


def test_errors():
    hidden, weight, targets, weights = problem()
    with pytest.raises(ValueError, match=r"`hidden_states` must be .* got \(1, 23, 8\) and \(13, 8\)"):
        linear_cross_entropy(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"`hidden_states` must be .* got \(23, 7\) and \(13, 8\)"):
        linear_cross_entropy(hidden[:, 1:], weight, targets)
    with pytest.raises(ValueError, match=r"`targets` must have the shape \(23,\), got \(22,\)"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"`weights` must have the shape \(23,\), got \(23, 1\)"):
        linear_cross_entropy(hidden, weight, targets, weights[:, None])
    with pytest.raises(ValueError, match="`chunk_size` must be >= 1, got 0"):
        linear_cross_entropy(hidden, weight, targets, weights, chunk_size=0)


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
