"""Models of known behaviour, and a plain-loop sampler, for the tests of `generate`."""

import itertools

import torch
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForMaskedLM,
)

PAD, EOS, MASK, VOCABULARY = 0, 2, 3, 64
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = torch.tensor([[4, 5, 6, 7, 8]])


def build(seed=0, **overrides):
    """A tiny model of opinions (large weights), in float64: what differs, differs by more than rounding."""
    torch.manual_seed(seed)
    config = NanoLLaDAConfig(**{"vocab_size": VOCABULARY, "initializer_range": 0.6, **SHAPE, **overrides})
    return NanoLLaDAForMaskedLM(config).eval().double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def drafts(model, *args, **kwargs):
    streamer = Recorder()
    model.generate(*args, streamer=streamer, **kwargs)
    return streamer


class Recorder:
    def __init__(self):
        self.puts, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def put_draft(self, value):
        self.drafts.append(value.tolist())

    def end(self):
        self.ended = True


# ---------------------------------------------------------------------------------------------------------------------
# The plain loop: one row, no batch, no padding, no early stop, every logit.


def reference_logits(model, row, given, cfg_scale, penalty, eos_policy):
    logits = model(torch.tensor([row])).logits[0]
    if cfg_scale:
        hidden = [MASK if is_given else token for token, is_given in zip(row, given, strict=True)]
        unconditional = model(torch.tensor([hidden])).logits[0]
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
    for token in {token for token in row if token != MASK}:
        column = logits[:, token]
        logits[:, token] = torch.where(column < 0, column * penalty, column / penalty)
    logits[:, MASK] = -torch.inf
    if eos_policy == "forbid":
        logits[:, EOS] = -torch.inf
    return logits


def reference_score(name, logits):
    probabilities = logits.softmax(-1)
    best, second = probabilities.topk(2).values
    if name == "margin":
        return float(best - second)
    if name == "entropy":
        return float(torch.special.xlogy(probabilities, probabilities).sum())
    return float(best)


def reference_blocks(model, row, prompt_length, total, block_length):
    todo = [index for index in range(total) if row[index] == MASK]
    if model.config.block_length is None:
        number = {index: max(0, index - prompt_length) // block_length for index in todo}
    else:
        number = {index: index // block_length for index in todo}
    return [[index for index in todo if number[index] == block] for block in sorted(set(number.values()))]


@torch.no_grad()
def reference_greedy(
    model, prompt, new, block_length=None, steps=None, position_score="max_prob", cfg_scale=0.0,
    repetition_penalty=1.0, eos_policy="none",
):  # fmt: skip
    grid = model.config.block_length
    total = len(prompt) + new
    row = prompt + [MASK] * (total - len(prompt) if grid is None else -(-total // grid) * grid - len(prompt))
    given = [token != MASK for token in row]
    for block in reference_blocks(model, row, len(prompt), total, block_length or grid or max(new, 1)):
        count = min(steps or len(block), len(block))
        todo = set(block)
        for step in range(count):
            logits = reference_logits(model, row, given, cfg_scale, repetition_penalty, eos_policy)
            best = {index: int(logits[index].argmax()) for index in todo}
            score = {index: reference_score(position_score, logits[index]) for index in todo}
            late = {index: eos_policy == "last" and best[index] == EOS for index in todo}
            if eos_policy == "cut":
                ends = [index for index in todo if logits[index].softmax(-1)[EOS] > 0.5]
                late = {index: index > min(ends, default=total) for index in todo}
            order = sorted(todo, key=lambda index: (late[index], -score[index], index))
            for index in order[: len(block) // count + (step < len(block) % count)]:
                row[index] = best[index]
                todo.remove(index)
            if eos_policy == "cut" and EOS in row[len(prompt) : total]:
                end = row.index(EOS, len(prompt))
                todo = {index for index in todo if index < end}
        if eos_policy == "cut" and EOS in row[len(prompt) : total]:
            break
    row = row[:total]
    if EOS in row[len(prompt) :]:
        end = row.index(EOS, len(prompt)) + 1
        row[end:] = [PAD] * (total - end)
    return row


class Oracle(NanoLLaDAForMaskedLM):
    """Predicts the exact conditionals of a law: `outcomes` `[K, n]` with `weights` `[K]`, after one prompt token."""

    def __init__(self, outcomes, weights):
        super().__init__(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE))
        self.outcomes, self.weights = outcomes, weights

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        rows, which = input_ids[:, 1:].unique(dim=0, return_inverse=True)
        fits = ((rows[:, None] == self.outcomes) | (rows[:, None] == MASK)).all(-1)  # [U, K]
        posterior = fits * self.weights
        posterior = posterior / posterior.sum(-1, keepdim=True)
        tokens = torch.nn.functional.one_hot(self.outcomes, VOCABULARY).double()  # [K, n, V]
        logits = torch.einsum("uk,knv->unv", posterior, tokens).log().float()
        return MaskedLMOutput(logits=logits[which][logits_to_keep[:, 1:]])


def markov_law(with_eos=False):
    """Three tokens, each one of 60, each next one of two successors. 240 outcomes."""
    generator = seeded(1)
    first = torch.rand(60, generator=generator).double() + 0.2
    first = first / first.sum()
    successors = torch.zeros(VOCABULARY, 2, dtype=torch.long)
    for column in range(2):
        successors[4:, column] = torch.randperm(60, generator=generator) + 4
    if with_eos:
        successors[::3, 1] = EOS
    outcomes, weights = [], []
    for token, i, j in itertools.product(range(4, VOCABULARY), range(2), range(2)):
        second = int(successors[token, i])
        outcomes.append([token, second, int(successors[second, j])])
        weights.append(float(first[token - 4]) * (0.7, 0.3)[i] * (0.8, 0.2)[j])
    return torch.tensor(outcomes), torch.tensor(weights, dtype=torch.double)


def codes(rows):
    """One number per outcome, an EOS hiding what follows it."""
    rows = rows.clone()
    for column in range(1, rows.shape[1]):
        rows[:, column:][rows[:, column - 1] == EOS] = PAD
    return (rows * VOCABULARY ** torch.arange(rows.shape[1])).sum(1)


def total_variation(samples, outcomes, weights):
    law = torch.zeros(VOCABULARY**3, dtype=torch.double).index_add(0, codes(outcomes), weights)
    counts = torch.bincount(codes(samples), minlength=VOCABULARY**3).double()
    return float((counts / counts.sum() - law).abs().sum() / 2)


def excess_total_variation(law, rows=20_000, **kwargs):
    """Distance of the samples to the law, minus the distance of as many samples of the law itself."""
    outcomes, weights = law
    oracle = Oracle(outcomes, weights)
    prompt = torch.full((rows, 1), 1)
    samples = oracle.generate(prompt, max_new_tokens=3, generator=seeded(3), **kwargs)[:, 1:]
    truth = outcomes[torch.multinomial(weights, rows, replacement=True, generator=seeded(4))]
    return total_variation(samples, *law) - total_variation(truth, *law)


class Eager(NanoLLaDAForMaskedLM):
    """Sure of EOS at odd positions, less sure of 10 + position at even ones; the left is surer."""

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        odd = (position % 2)[..., None] == 1
        first = torch.zeros(*position.shape, VOCABULARY).scatter_(-1, 10 + position[..., None], 5.0)
        first[..., EOS] = torch.where(odd[..., 0], 9.0, 4.0)
        return MaskedLMOutput(logits=(first * (2 - position / 20)[..., None])[logits_to_keep])


def eos_model(column=7):
    """Predicts EOS at position `column` and 10 + position elsewhere, one position at a time from the left."""

    class Scripted(NanoLLaDAForMaskedLM):
        def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            token = torch.where(position == column, EOS, 10 + position)
            logits = torch.zeros(*token.shape, VOCABULARY)
            logits.scatter_(-1, token[..., None], (20.0 - position)[..., None])  # the left is surest
            return MaskedLMOutput(logits=logits[logits_to_keep])

    return Scripted(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE))


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] == self.token


class Recorded(LogitsProcessor):
    def __init__(self, rule):
        self.rule, self.shapes = rule, []

    def __call__(self, input_ids, scores):
        self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        return self.rule(input_ids, scores)
