"""A decoder by hand, on a model small enough to follow every draw: the law of all rows that it can write."""

import itertools
from functools import partial

import torch
from generation_models import SHAPE

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForMaskedLM
from nanollada.modeling_nanollada.layers_nanollada import NanoLLaDARMSNorm

KINDS, MASK, PROMPT, NEW = 3, 3, [1, 0], 4
CASES = {
    "one a step": {},
    "two a step": {"steps": 2},
    "all at once": {"steps": 1},
    "threshold": {"threshold": 0.6},
    "low threshold": {"threshold": 0.45},
    "cool": {"temperature": 0.7},
    "suppressed": {"suppress_tokens": [1]},
    "margin": {"position_score": "margin"},
    "entropy": {"position_score": "entropy", "steps": 2},
    "blocks of two": {"block_length": 2},
    "growing blocks": {"block_length": 2, "grow_length": True, "threshold": 0.6},
}
GRID_CASES = {
    "grid": {},
    "grid, threshold": {"threshold": 0.6, "temperature": 0.7},
    "grid, all at once": {"steps": 1},
    "grid, smaller blocks": {"block_length": 1},
}


def toy(seed=3, grid=None):
    """Three kinds of token, in float64, of strong opinions."""
    torch.manual_seed(seed)
    config = NanoLLaDAConfig(
        vocab_size=KINDS + 1, mask_token_id=MASK, eos_token_id=None, pad_token_id=None, bos_token_id=None,
        initializer_range=0.7, block_length=grid, **SHAPE,
    )  # fmt: skip
    model = NanoLLaDAForMaskedLM(config).eval().double()
    for norm in model.modules():
        if isinstance(norm, NanoLLaDARMSNorm):  # the model's own computes in float32, too coarse for differences
            norm.forward = partial(double_norm, norm)
    return model


def double_norm(norm, hidden_states):
    """RMSNorm in the type of its input."""
    return (
        norm.weight * hidden_states * (hidden_states.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    )


def position_scores(name, probabilities):
    best = probabilities.sort(descending=True).values
    if name == "margin":
        return float(best[0] - best[1])
    if name == "entropy":
        return float(torch.special.xlogy(probabilities, probabilities).sum())
    return float(best[0])


def law(
    model, *, steps=None, threshold=None, temperature=1.0, block_length=None, grow_length=False,
    position_score="max_prob", suppress_tokens=(), prompt=PROMPT, new=NEW,
):  # fmt: skip
    """
    `{row: (probability, steps)}` over all rows, the canvas's masks behind the last new token included; `steps` are
    those in which the positions were decided, −1 for the prompt and these masks.
    """
    grid, total = model.config.block_length, len(prompt) + new
    length = block_length or grid or new
    width = total if grid is None else -(-total // grid) * grid
    number = [(i if grid else max(i - len(prompt), 0)) // length for i in range(total)]
    blocks = [[i for i in range(len(prompt), total) if number[i] == block] for block in sorted(set(number))]
    blocks = [block for block in blocks if block]
    finished = {}

    def distributions(row, block):
        seen = width
        if grid is not None:
            seen = (block[-1] // grid + 1) * grid
        elif grow_length:
            seen = block[-1] + 1
        logits = model(torch.tensor([row[:seen]])).logits[0]
        logits[:, [MASK, *suppress_tokens]] = -torch.inf
        return logits.softmax(-1), (logits / temperature).softmax(-1)

    def follow(row, taken, probability, block, index, count):
        open_places = [i for i in blocks[block] if row[i] == MASK]
        if not open_places:
            if block + 1 == len(blocks):
                assert tuple(row) not in finished, "two trajectories of one row"
                finished[tuple(row)] = (probability, taken)
            else:
                follow(row, taken, probability, block + 1, 0, count)
            return
        ranked, drawn = distributions(row, blocks[block])
        size, share = len(blocks[block]), min(steps or len(blocks[block]), len(blocks[block]))
        quota = size // share + (index < size % share)
        scores = {i: position_scores(position_score, ranked[i]) for i in open_places}
        order = sorted(open_places, key=lambda i: (-scores[i], i))
        chosen = order[:quota] + [i for i in order[quota:] if threshold is not None and scores[i] > threshold]
        for tokens in itertools.product([t for t in range(KINDS) if t not in suppress_tokens], repeat=len(chosen)):
            after, commits, weight = list(row), list(taken), probability
            for place, token in zip(chosen, tokens, strict=True):
                after[place], commits[place], weight = token, count, weight * drawn[place, token]
            follow(after, commits, weight, block, index + 1, count + 1)

    start = list(prompt) + [MASK] * (width - len(prompt))
    follow(start, [-1] * width, torch.ones((), dtype=torch.double), 0, 0, 0)
    return finished


def tensors(finished):
    """Rows, their steps, and their probabilities: `[R, W]`, `[R, W]`, `[R]`."""
    rows = torch.tensor(list(finished))
    steps = torch.tensor([steps for _, steps in finished.values()])
    return rows, steps, torch.stack([probability for probability, _ in finished.values()])
