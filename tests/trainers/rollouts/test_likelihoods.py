"""The bound and the mean field: against enumeration and by hand."""

import math

import pytest
import torch
from decoder_laws import MASK, toy
from torch.nn.functional import pad

from nanollada.trainers.noise.keys import STREAM_CONDITION, keyed_uniform
from nanollada.trainers.rollouts.decoding import Decoding
from nanollada.trainers.rollouts.likelihoods import ESTIMATORS, draw_masks, elbo, mean_field
from nanollada.trainers.rollouts.passes import States, read
from nanollada.trainers.rollouts.rollouts import Rollouts
from nanollada.trainers.scoring.likelihood import exact_nelbo

ROWS = [[1, 0, 2, 1, 0, 2], [2, 2, 0, 1], [0, 1, 1, 0, 2]]  # two of the prompt, the rest decided
DECODING = Decoding(MASK, never=(MASK,))


def rollouts_of(rows=ROWS, grid=None):
    """Left-padded, one token a step from the left; a grid's last block is shown to its end."""
    width, prompt = max(map(len, rows)), 2 + max(map(len, rows)) - min(map(len, rows))
    lacking = [-len(row) % (grid or 1) for row in rows]
    tail = max(lacking)
    canvas = [[0] * (width - len(row)) + row + [MASK] * tail for row in rows]
    steps = [[-1] * (width - len(row) + 2) + list(range(len(row) - 2)) + [-1] * tail for row in rows]
    mask = [
        [0] * (width - len(row)) + [1] * (len(row) + more) + [0] * (tail - more)
        for row, more in zip(rows, lacking, strict=True)
    ]
    return Rollouts(torch.tensor(canvas), torch.tensor(steps), torch.tensor(mask), prompt)


def every_mask(rollouts, blocks):
    """All masks of every row: one subset in each block, with the probability under uniform counts."""
    rows, masks, weights = [], [], []
    for row in range(len(blocks)):
        options = [[]]
        for block in blocks[row][rollouts.decided[row]].unique():
            places = ((blocks[row] == block) & rollouts.decided[row]).nonzero()[:, 0].tolist()
            subsets = [[p for i, p in enumerate(places) if number >> i & 1] for number in range(1, 2 ** len(places))]
            options = [option + [(subset, len(places))] for option in options for subset in subsets]
        for option in options:
            masked, weight = torch.zeros(blocks.shape[1], dtype=torch.bool), torch.zeros(blocks.shape[1]).double()
            probability = math.prod(1 / n / math.comb(n, len(subset)) for subset, n in option)
            for subset, n in option:
                masked[subset], weight[subset] = True, n / len(subset) * probability
            rows.append(row), masks.append(masked), weights.append(weight)
    return torch.tensor(rows), torch.stack(masks), torch.stack(weights)


@pytest.mark.parametrize("grid", [None, 2, 4])
def test_the_mean_over_all_masks_is_the_bound(grid):
    model, rollouts = toy(grid=grid), rollouts_of(grid=grid)
    row, masked, weight = every_mask(rollouts, rollouts.blocks(grid))

    def states(some):
        canvas = rollouts.canvas[row[some]]
        return States(canvas.masked_fill(masked[some], MASK), masked[some], canvas, weight[some])

    with torch.no_grad():
        pieces, _ = read(model, rollouts, Decoding(MASK, grid=grid, never=(MASK,)), row, states)
        for place, ids in enumerate(ROWS):  # row by row, without padding
            width = len(ids) + (-len(ids) % (grid or 1))
            batch = {"input_ids": rollouts.canvas[place : place + 1, rollouts.attention_mask[place]]}
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, :2] = -100
            batch["labels"][:, len(ids) :] = -100
            assert batch["input_ids"].shape[1] == width
            assert float(pieces[place].sum()) == pytest.approx(-float(exact_nelbo(model, batch)), abs=1e-10)


@pytest.mark.parametrize("grid", [None, 2])
def test_the_masks_are_drawn_by_that_law(grid):
    """Every count alike, every subset of it alike; what it counts is the inverse."""
    rollouts, draws = rollouts_of([[1, 0, 2, 1, 0, 2]] * 6000, grid), 3
    rollouts.keys = every = torch.arange(6000)
    blocks = rollouts.blocks(grid)
    drawn = [(torch.full_like(every, draw), torch.full_like(every, draws)) for draw in range(draws)]
    masked, factor = (
        torch.cat(part) for part in zip(*(draw_masks(rollouts, blocks, every, *of, 1) for of in drawn), strict=True)
    )
    for block in (0,) if grid is None else (1, 2):
        places = ((blocks[0] == block) & rollouts.decided[0]).nonzero()[:, 0]
        n = len(places)
        count = masked[:, places].sum(1, keepdim=True)
        assert torch.equal(factor[:, places], (n / count.double()).expand(-1, n))
        observed = torch.bincount((masked[:, places] * 2 ** torch.arange(n)).sum(1), minlength=2**n).double()
        sizes = torch.tensor([number.bit_count() for number in range(2**n)])
        expected = torch.tensor([len(masked) / n / math.comb(n, int(k)) if k else 0.0 for k in sizes])
        assert observed[0] == 0, "a mask of nothing"
        statistic = float(((observed - expected).square() / expected)[1:].sum())
        assert statistic < 2**n - 2 + 4 * math.sqrt(2 * (2**n - 2)), (block, observed)


def test_as_many_masks_as_tokens_take_every_count_once():
    rollouts = rollouts_of([[1, 0, 2, 1, 0, 2, 1]])
    every = torch.arange(5)
    masked, _ = draw_masks(
        rollouts, rollouts.blocks(None), torch.zeros_like(every), every, torch.full_like(every, 5), seed=9
    )
    assert masked.sum(1).tolist() == [1, 2, 3, 4, 5]


def test_the_bound_of_many_masks():
    """The estimate converges to it, and by default a row gets as many masks as it has tokens."""
    model, rollouts = toy(), rollouts_of()
    with torch.no_grad():
        many = elbo(model, rollouts, DECODING, steps=3000, seed=1).total()
        for place, ids in enumerate(ROWS):
            batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100, -100, *ids[2:]]])}
            assert float(many[place]) == pytest.approx(-float(exact_nelbo(model, batch)), abs=0.25)  # 4 s.e.
    calls = []

    def counting(**inputs):
        calls.append(len(inputs["input_ids"]))
        return model(**inputs)

    scores = elbo(counting, rollouts, DECODING)
    assert sum(calls) == 4 + 2 + 3 and torch.equal(scores.weights, rollouts.decided.double())
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        elbo(model, rollouts, DECODING, steps=0)


@pytest.mark.parametrize("grid", [None, 4])
def test_the_mean_field_by_hand(grid):
    """One pass: the answer masked, some of the prompt hidden, every token scored."""
    model, decoding = toy(grid=grid), Decoding(MASK, grid=grid, temperature=0.7, never=(MASK,))
    rollouts = rollouts_of(grid=grid)
    rollouts.keys = torch.tensor([11, 12, 13])
    with torch.no_grad():
        scores = mean_field(model, rollouts, decoding, seed=2)
    for place, ids in enumerate(ROWS):
        draws = keyed_uniform(2, rollouts.keys[place : place + 1], torch.tensor([0]), STREAM_CONDITION, 2)[0]
        prompt = [MASK if u < 0.15 else token for u, token in zip(draws.tolist(), ids[:2], strict=True)]
        start = int(rollouts.attention_mask[place].int().argmax())
        for column in range(2, len(ids)):
            row = prompt + [MASK] * (len(ids) - 2)
            if grid is not None:  # earlier blocks as they are, this one masked to its end
                block = column // grid
                row = prompt + ids[2:] + [MASK] * (-len(ids) % grid)
                row = [MASK if i // grid == block and i >= 2 else token for i, token in enumerate(row)]
                row = row[: (block + 1) * grid]
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, column]
            logits[MASK] = -torch.inf
            expected = float((logits / 0.7).log_softmax(-1)[ids[column]])
            assert float(scores.log_probs[place, start + column]) == pytest.approx(expected, abs=1e-10)
    assert torch.equal(scores.weights, rollouts.decided.double())
    with pytest.raises(ValueError, match="`steps` must be 1 or unset for mean_field, which has one pass, got 4"):
        mean_field(model, rollouts, decoding, steps=4)


def test_a_share_of_prompt_tokens_is_hidden():
    model, rollouts = toy(), rollouts_of([[1, 0, 2]] * 3000)
    rollouts.keys = torch.arange(3000)
    hidden = []

    def watching(input_ids, **inputs):
        hidden.append((input_ids[:, :2] == MASK).double())
        return model(input_ids=input_ids, **inputs)

    with torch.no_grad():
        mean_field(watching, rollouts, DECODING)
    assert float(torch.cat(hidden).mean()) == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("grid", [None, 4])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_do_not_touch_each_other(name, grid):
    """Alone, in another order, and with other padding: the same noise and the same scores."""
    model, decoding = toy(grid=grid), Decoding(MASK, grid=grid, never=(MASK,))
    rollouts, score = rollouts_of(grid=grid), ESTIMATORS[name].score
    steps = None if name == "mean_field" else 2

    def scored(some):
        with torch.no_grad():
            scores = score(model, some, decoding, steps=steps, seed=5, entropy=True)
        return scores.log_probs, scores.weights, scores.entropies

    together = scored(rollouts)
    for place in range(3):
        seen = rollouts.attention_mask[place]
        parts = [part[place : place + 1, seen] for part in (rollouts.canvas, rollouts.commit_steps)]
        alone = Rollouts(*parts, seen[None, seen], 2)
        assert torch.equal(alone.keys, rollouts.keys[place : place + 1])
        ids, commits, mask = (pad(part, (3, 2), value=-1) for part in (*parts, seen[None, seen].long()))
        padded = Rollouts(ids.clamp(min=0), commits, mask > 0, 5)
        for again in (scored(alone), [part[:, 3:-2] for part in scored(padded)]):
            torch.testing.assert_close([part[place : place + 1, seen] for part in together], list(again))


def test_policies_share_their_noise_and_other_seeds_do_not():
    rollouts, old, new = rollouts_of(), toy(1), toy(2)
    for name, estimator in ESTIMATORS.items():
        steps = None if name == "mean_field" else 2
        with torch.no_grad():
            first, second = (estimator.score(model, rollouts, DECODING, steps=steps) for model in (old, new))
            again = estimator.score(old, rollouts, DECODING, steps=steps)
            others = [estimator.score(old, rollouts, DECODING, steps=steps, seed=seed) for seed in range(1, 6)]
        assert torch.equal(first.weights, second.weights) and not torch.equal(first.log_probs, second.log_probs)
        assert torch.equal(first.log_probs, again.log_probs)  # the ratio of equal policies is 1, exactly
        assert any(not torch.equal(first.log_probs, other.log_probs) for other in others)


def test_entries_say_what_they_are():
    said = {name: (entry.ratio, entry.exact) for name, entry in ESTIMATORS.items()}
    assert said == {"replay": ("token", True), "elbo": ("sequence", False), "mean_field": ("token", False)}
    assert all(entry.help for entry in ESTIMATORS.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_entropies_are_those_of_the_distributions(name):
    """A model that knows nothing: ln 3 nats wherever something is scored, and log-probabilities of −ln 3."""
    model, rollouts = toy(), rollouts_of()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        scores = ESTIMATORS[name].score(model, rollouts, DECODING, entropy=True)
    expected = math.log(3) * rollouts.decided.double()
    torch.testing.assert_close(scores.entropies, expected)
    torch.testing.assert_close(scores.total(), -expected.sum(-1))
    assert ESTIMATORS[name].score(model, rollouts, DECODING).entropies is None


def test_entropies_have_a_gradient():
    """For a bonus on them: that of an entropy over what can be drawn, by hand."""
    model, rollouts = toy(), rollouts_of([[1, 0, 2]])
    scores = ESTIMATORS["replay"].score(
        model, rollouts, Decoding(MASK, temperature=0.7, never=(1, MASK)), entropy=True
    )
    logits = model(torch.tensor([[1, 0, MASK]])).logits[0, 2, [0, 2]] / 0.7
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropies[0, 2], entropy)
    parameters = list(model.parameters())
    both = (torch.autograd.grad(value, parameters) for value in (scores.entropies.sum(), entropy))
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_autocast_leaves_the_softmax_alone(name):
    """bfloat16 in the layers, float32 in the scores: those of the very logits that the model gave."""
    model, rollouts, seen = toy().float(), rollouts_of(), []

    def watching(**inputs):
        output = model(**inputs)
        seen.append(output.logits.detach())
        return output

    with torch.autocast("cpu", torch.bfloat16):
        scores = ESTIMATORS[name].score(watching, rollouts, Decoding(MASK, temperature=0.7, never=(MASK,)))
    assert seen[0].dtype == torch.bfloat16 and scores.log_probs.dtype == torch.float32
    scores.total().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if name == "mean_field":
        logits = seen[0].double()
        logits[:, MASK] = -torch.inf
        expected = (logits / 0.7).log_softmax(-1).gather(1, rollouts.canvas[rollouts.decided][:, None])[:, 0]
        torch.testing.assert_close(scores.log_probs[rollouts.decided].double(), expected, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused():
    ids, steps, mask = torch.zeros(2, 4).long(), torch.full((2, 4), -1), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"`commit_steps` must have the shape of `canvas`, got \(2, 3\) and \(2, 4\)"):
        Rollouts(ids, steps[:, :3], mask, 2)
    with pytest.raises(ValueError, match=r"`prompt_length` must lie in \[0, 4\], got 5"):
        Rollouts(ids, steps, mask, 5)
    with pytest.raises(
        ValueError, match="`commit_steps` must be -1 where `attention_mask` is 0, got a step at padding"
    ):
        Rollouts(ids, steps + 1, mask - 1, 2)
    with pytest.raises(ValueError, match="`rollouts` must hold a decided position to score, got none"):
        elbo(toy(), Rollouts(ids, steps, mask, 2), DECODING)
