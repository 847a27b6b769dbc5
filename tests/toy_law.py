"""
The law of every commit rule on a toy chain, by exact propagation: how far from the truth a rule ends that gets the
exact conditionals. `python tests/toy_law.py` prints the table of modeling_nanollada/DECODING.md.

The chain has six tokens of three kinds. A state is a row with masks; every rule's choice comes from the sampler
itself, once for all states together; the tokens' probabilities and the rule's own coins are summed out, not drawn.
"""

import itertools

import torch
from transformers import LogitsProcessorList

from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig
from nanollada.modeling_nanollada.commit_nanollada import remdm_rates
from nanollada.modeling_nanollada.rule_nanollada import Step
from nanollada.modeling_nanollada.sampling_nanollada import Sampler

LENGTH, KINDS, MASK = 6, 3, 3
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
NEXT = torch.tensor([[0.90, 0.08, 0.02], [0.05, 0.80, 0.15], [0.10, 0.20, 0.70]], dtype=torch.double)
WEIGHTS = (KINDS + 1) ** torch.arange(LENGTH)

RULES = {
    "quota, 1 a step (default)": {},
    "quota, 1 a step, margin": {"position_score": "margin"},
    "quota, 1 a step, entropy": {"position_score": "entropy"},
    "quota, 1 a step, random": {"remasking": "random"},
    "quota, 1 a step, sampled_prob (LLaDA)": {"position_score": "sampled_prob"},
    "quota, 2 a step": {"steps": 3},
    "quota, 2 a step, random": {"steps": 3, "remasking": "random"},
    "quota, 2 a step, sampled_prob (LLaDA)": {"steps": 3, "position_score": "sampled_prob"},
    "quota, 3 a step": {"steps": 2},
    "quota, 3 a step, random": {"steps": 2, "remasking": "random"},
    "quota, 6 a step": {"steps": 1},
    "ratio s/t, 4 steps": {"steps": 4, "commit_schedule": "ratio"},
    "ramp 0.08 to 0.5": {"commit_schedule": "ramp"},
    "ramp 0.2 to 0.8, at most 2": {"commit_schedule": "ramp", "ramp_start": 0.2, "ramp_end": 0.8, "max_commits": 2},
    "threshold 0.55": {"threshold": 0.55},
    "threshold 0.7": {"threshold": 0.7},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.7 under the ramp": {"threshold": 0.7, "commit_schedule": "ramp"},
    "hierarchical 0.9, 0.3": {"threshold": 0.9, "low_threshold": 0.3},
    "KLASS 0.7, KL 0.05": {"threshold": 0.7, "kl_threshold": 0.05},
    "factor 0.5": {"factor": 0.5},
    "factor 1": {"factor": 1.0},
    "entropy bound 0.1": {"entropy_bound": 0.1},
    "entropy bound 0.5": {"entropy_bound": 0.5},
    "entropy bound 1": {"entropy_bound": 1.0},
    "ReMDM cap 0.1, 6 steps": {"remdm": "cap", "remdm_eta": 0.1, "steps": 6},
    "ReMDM cap 0.1, 24 steps": {"remdm": "cap", "remdm_eta": 0.1, "steps": 24},
    "ReMDM cap 0, 6 steps (ancestral)": {"remdm": "cap", "remdm_eta": 0.0, "steps": 6},
    "ReMDM cap 0, 24 steps (ancestral)": {"remdm": "cap", "remdm_eta": 0.0, "steps": 24},
    "ReMDM rescale 0.5, 24 steps": {"remdm": "rescale", "remdm_eta": 0.5, "steps": 24},
}


def states() -> torch.LongTensor:
    """All rows, `[4096, 6]`, in the order of their codes."""
    return torch.arange((KINDS + 1) ** LENGTH)[:, None] // WEIGHTS % (KINDS + 1)


def chain(first=FIRST, following=NEXT) -> tuple[torch.LongTensor, torch.DoubleTensor]:
    """All finished rows and their probabilities."""
    rows = torch.tensor(list(itertools.product(range(KINDS), repeat=LENGTH)))
    law = first[rows[:, 0]]
    for column in range(1, LENGTH):
        law = law * following[rows[:, column - 1], rows[:, column]]
    return rows, law


def conditionals(first=FIRST, following=NEXT) -> torch.DoubleTensor:
    """`[4096, 6, 4]`: of every state and position the exact distribution of its token; none for the mask."""
    rows, law = chain(first, following)
    table = torch.zeros((KINDS + 1) ** LENGTH, LENGTH, KINDS + 1, dtype=torch.double)
    total = torch.zeros(len(table), dtype=torch.double)
    for hidden in itertools.product((False, True), repeat=LENGTH):
        code = (rows.masked_fill(torch.tensor(hidden), MASK) * WEIGHTS).sum(1)
        total.index_add_(0, code, law)
        for column in range(LENGTH):
            table.view(-1).index_add_(0, (code * LENGTH + column) * (KINDS + 1) + rows[:, column], law)
    return table / total[:, None, None]


TABLE = conditionals()


def expand(rows, weights, columns):
    """Every row with every token at its masked positions `columns` `[S, 6]`: tokens, weights, and where from."""
    origin, tokens = torch.arange(len(rows)), rows.clone()
    exact = TABLE[(rows * WEIGHTS).sum(1)]  # [S, 6, 4]
    for column in range(LENGTH):
        split = columns[origin, column]
        parts = [(origin[~split], tokens[~split], weights[~split])]
        for kind in range(KINDS):
            drawn = tokens[split].clone()
            drawn[:, column] = kind
            parts.append((origin[split], drawn, weights[split] * exact[origin[split], column, kind]))
        origin, tokens, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, weights, origin


def merge(rows, weights):
    """Equal rows once, with the sum of their weights; rows of no weight dropped."""
    rows, index = rows[weights > 0].unique(dim=0, return_inverse=True)
    return rows, torch.zeros(len(rows), dtype=torch.double).index_add(0, index, weights[weights > 0])


def sampler_for(settings):
    config = NanoLLaDAGenerationConfig(**settings, max_new_tokens=LENGTH)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    return Sampler(config, LogitsProcessorList(), torch.empty(0, dtype=torch.long), MASK, None)


def choose(sampler, rows, before, index, steps, scores=None):
    """The sampler's own choice for every state at once, `[S, 6]`. `scores` replace random numbers or drawn tokens."""
    active = rows == MASK
    logits = TABLE[(rows * WEIGHTS).sum(1)].log()[active]  # [N, 4]
    sampler.start_block(len(rows), LENGTH)
    if before is not None:
        sampler.before = TABLE[(before * WEIGHTS).sum(1)].log()
    every, nothing = torch.full((len(rows),), LENGTH), torch.zeros_like(active)
    step = Step(torch.arange(len(rows)), every, torch.full_like(every, steps), index, active, nothing, rows, logits)
    scores = sampler.score(logits, None) if scores is None else scores[active]
    step.ranked, step.late = step.spread(scores, -torch.inf), nothing
    return active & sampler.choose(step).selected


def one_step(sampler, rows, weights, before, index, steps):
    """States and weights after a step, and for each the state before."""
    settings, active = sampler.settings, rows == MASK
    if sampler.by_sample:  # tokens first, then positions by their probability
        tokens, weights, origin = expand(rows, weights, active)
        exact = TABLE[(rows[origin] * WEIGHTS).sum(1)].gather(2, tokens[..., None])[..., 0]
        selected = choose(sampler, rows[origin], None, index, steps, exact)
        return torch.where(selected, tokens, rows[origin]), weights, rows[origin]
    if settings.remasking == "random":
        selected, origin = [], []
        for subset in itertools.product((False, True), repeat=LENGTH):  # every set of the right size alike
            found = choose(sampler, rows, before, index, steps, torch.tensor(subset).double().expand(rows.shape))
            fits = (found == (active & torch.tensor(subset))).all(1) & (active | ~torch.tensor(subset)).all(1)
            selected.append(found[fits]), origin.append(fits.nonzero()[:, 0])
        selected, origin = torch.cat(selected), torch.cat(origin)
        shares = 1 / torch.bincount(origin)[origin].double()
        tokens, weights, again = expand(rows[origin], weights[origin] * shares, selected)
        return tokens, weights, rows[origin][again]
    tokens, weights, origin = expand(rows, weights, choose(sampler, rows, before, index, steps))
    return tokens, weights, rows[origin]


def finished(rows, weights, before):
    """Merges equal states; with a memory, equal pairs of states."""
    if before is None:
        return *merge(rows, weights), None
    pairs, weights = merge(torch.cat((rows, before), dim=1), weights)
    return pairs[:, :LENGTH], weights, pairs[:, LENGTH:]


def remdm_law(settings):
    """ReMDM: given the state, positions move independently."""
    steps, weights = settings["steps"], torch.zeros(len(TABLE), dtype=torch.double)
    weights[-1] = 1  # all masked
    rows = states()
    for index in range(steps):
        sigma, decide = (
            float(rate) for rate in remdm_rates(torch.tensor([steps]), index, settings["remdm"], settings["remdm_eta"])
        )
        moves = TABLE * decide  # [4096, 6, 4], of masked positions
        moves[..., MASK] = 1 - decide
        stay = torch.nn.functional.one_hot(rows, KINDS + 1).double() * (1 - sigma)
        stay[..., MASK] = sigma
        moves = torch.where((rows == MASK)[..., None], moves, stay)
        reached = torch.zeros_like(weights)
        for chunk in weights.nonzero()[:, 0].split(256):
            joint = weights[chunk, None]
            for column in range(LENGTH):  # the first column is the lowest digit of the code
                joint = (moves[chunk, column][:, :, None] * joint[:, None]).flatten(1)
            reached += joint.sum(0)
        weights = reached
    return rows, weights, float(steps)


def propagate(settings) -> tuple[torch.DoubleTensor, float]:
    """The rule's law, `[4096]` by code, and its mean number of forward passes."""
    if "remdm" in settings:
        rows, weights, forwards = remdm_law(settings)
    else:
        sampler, steps, forwards = sampler_for(settings), settings.get("steps", LENGTH), 0.0
        memory = "kl_threshold" in settings
        rows, weights = torch.full((1, LENGTH), MASK), torch.ones(1, dtype=torch.double)
        before = None
        done = []
        for index in range(LENGTH):
            going = (rows == MASK).any(1)
            done.append((rows[~going], weights[~going]))
            rows, weights, before = rows[going], weights[going], before[going] if before is not None else None
            if len(rows) == 0:
                break
            forwards += float(weights.sum())
            after = one_step(sampler, rows, weights, before, index, steps)
            rows, weights, before = finished(*after[:2], after[2] if memory else None)
        rows, weights = (torch.cat(part) for part in zip(*done, (rows, weights), strict=True))
    assert abs(float(weights.sum()) - 1) < 1e-9 and not (rows[weights > 0] == MASK).any()
    return torch.zeros(len(TABLE), dtype=torch.double).index_add(0, (rows * WEIGHTS).sum(1), weights), forwards


def law_of(settings) -> tuple[float, float]:
    """Total variation between the rule's law and the chain's, and its mean number of forward passes."""
    found, forwards = propagate(settings)
    truth, law = chain()
    found[(truth * WEIGHTS).sum(1)] -= law
    return float(found.abs().sum() / 2), forwards


def table_rows() -> list[str]:
    """Lines of the Markdown table."""
    found = {name: law_of(settings) for name, settings in RULES.items()}
    return [f"| {name} | {distance:.3f} | {forwards:.2f} |" for name, (distance, forwards) in found.items()]


if __name__ == "__main__":
    print("| rule | total variation | forward passes |\n|---|---|---|", *table_rows(), sep="\n")
