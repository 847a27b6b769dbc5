"""`generate` of the diffusion model against a plain-loop sampler, an exact denoiser and transformers' conventions."""

import itertools
import random

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
    dynamic_module_utils,
    pipeline,
)
from transformers.modeling_outputs import MaskedLMOutput

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    NanoLLaDAGenerationConfig,
    NanoLLaDAGenerationOutput,
)
from nanollada.modeling_nanollada.generation_nanollada import commit_quota

PAD, EOS, MASK, VOCABULARY = 0, 2, 3, 64
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = torch.tensor([[4, 5, 6, 7, 8]])


def build(seed=0, **overrides):
    """A tiny model of opinions (large weights), in float64: what differs, differs by more than rounding."""
    torch.manual_seed(seed)
    config = NanoLLaDAConfig(**{"vocab_size": VOCABULARY, "initializer_range": 0.6, **SHAPE, **overrides})
    return NanoLLaDAForMaskedLM(config).eval().double()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def block_model():
    return build(block_length=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


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
            order = sorted(todo, key=lambda index: (late[index], -score[index], index))
            for index in order[: len(block) // count + (step < len(block) % count)]:
                row[index] = best[index]
                todo.remove(index)
    row = row[:total]
    if EOS in row[len(prompt) :]:
        end = row.index(EOS, len(prompt)) + 1
        row[end:] = [PAD] * (total - end)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# 300 calls


def random_call(rng, model):
    """A batch of prompts and keyword arguments, any of them."""
    grid = model.config.block_length
    options = {
        "steps": rng.choice([None, 1, 2, 2, 3, 50]),
        "position_score": rng.choice(["max_prob", "margin", "entropy", "sampled_prob"]),
        "cfg_scale": rng.choice([0.0, 0.0, 0.7]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.4]),
        "eos_policy": rng.choice(["none", "none", "last", "forbid"]),
    }
    new = rng.choice([0, 1, 4, 6, 8])
    if grid is None:
        options["block_length"] = rng.choice([None] + [b for b in range(1, new + 1) if new % b == 0])
    else:
        options["block_length"] = rng.choice([None, 1, 2, grid])
    with_masks = new == 0 or rng.random() < 0.5
    lengths = [rng.randrange(1 + with_masks, 8) for _ in range(rng.randrange(1, 4))]
    prompts = [[rng.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]
    for prompt in (
        prompts if with_masks else []
    ):  # one token stays: in a row of masks all positions tie, but for rounding
        for index in rng.sample(range(len(prompt)), rng.randrange(1, len(prompt))):
            prompt[index] = MASK
    return prompts, new, options


def test_300_random_calls():
    rng = random.Random(0)
    # EOS is often likely: it must end rows in some calls
    models = [build(seed, block_length=grid) for seed, grid in enumerate((None, 4, None))]
    for model in models:
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 2.5
    greedy = ended = 0
    for call in range(300):
        model = models[call % len(models)]
        prompts, new, options = random_call(rng, model)
        ids, attention_mask = left_padded(prompts)
        kwargs = {"attention_mask": attention_mask, "max_new_tokens": new, **options}
        kwargs["early_stop"] = rng.choice([True, False])
        kwargs["remasking"] = rng.choice(["low_confidence", "low_confidence", "random"])
        kwargs["temperature"] = rng.choice([0, 0, 0.6, 1.0, 2])
        if kwargs["temperature"]:
            kwargs.update(top_k=rng.choice([None, 5]), top_p=rng.choice([None, 0.8]))
        result = model.generate(ids, generator=seeded(call), return_dict_in_generate=True, **kwargs)

        out = result.sequences
        assert out.shape == (len(prompts), ids.shape[1] + new)
        assert not (out == MASK).any(), (call, kwargs)
        untouched = ids != MASK
        assert torch.equal(out[:, : ids.shape[1]][untouched], ids[untouched])
        for row in out[:, ids.shape[1] :].tolist():  # nothing but pads after the first EOS
            assert EOS not in row or set(row[row.index(EOS) + 1 :]) <= {PAD}
            assert options["eos_policy"] != "forbid" or EOS not in row
            ended += EOS in row
        assert (result.tokens_per_forward > 0).all()
        if kwargs["temperature"] == 0 and kwargs["remasking"] == "low_confidence":
            greedy += 1
            for row, prompt in zip(out.tolist(), prompts, strict=True):  # batch = single = plain loop
                expected = reference_greedy(model, prompt, new, **options)
                assert row[ids.shape[1] - len(prompt) :] == expected, (call, kwargs)
        else:
            assert torch.equal(out, model.generate(ids, generator=seeded(call), **kwargs))
    assert greedy > 60 and ended > 100


# ---------------------------------------------------------------------------------------------------------------------
# An exact denoiser


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_score": "margin"},
        {"position_score": "entropy"},
        {"remasking": "random"},
        {"remasking": "random", "position_score": "sampled_prob"},
        {"block_length": 1},
    ],
    ids=str,
)
def test_the_sampler_is_exact_with_an_exact_denoiser(options):
    assert abs(excess_total_variation(markov_law(), temperature=1.0, **options)) <= 0.01


@pytest.mark.parametrize("options", [{}, {"eos_policy": "last"}, {"eos_policy": "last", "early_stop": False}], ids=str)
def test_early_stop_and_late_eos_keep_the_sampler_exact(options):
    law = markov_law(with_eos=True)
    assert (law[0][:, :2] == EOS).any()
    assert abs(excess_total_variation(law, do_sample=True, **options)) <= 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "position_score": "sampled_prob"},
        {"temperature": 1.0, "steps": 1},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.9},
    ],
    ids=str,
)
def test_what_distorts_the_samples_is_seen_to(options):
    assert excess_total_variation(markov_law(), **options) > 0.03


def test_gumbel_noise_samples_the_softmax(model):
    ids = PROMPT.repeat(8_000, 1)
    ids[:, 2] = MASK
    law = (model(ids[:1]).logits[0, 2].double() / 1.7).softmax(-1)
    for options, expected in (
        ({}, law),
        ({"top_k": 3}, torch.where(law >= law.topk(3).values[-1], law, 0.0)),
        ({"min_p": 0.5}, torch.where(law >= 0.5 * law.max(), law, 0.0)),
    ):
        out = model.generate(ids, max_new_tokens=0, temperature=1.7, generator=seeded(), **options)[:, 2]
        expected = expected / expected.sum()
        shares = torch.bincount(out, minlength=VOCABULARY).double() / len(out)
        assert (shares - expected).abs().max() < 4 * (0.25 / len(out)) ** 0.5
        assert (shares[expected == 0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Steps, blocks


def test_quotas_sum_to_the_masks_of_the_block():
    for masked, steps in itertools.product(range(1, 20), range(1, 25)):
        steps = min(steps, masked)
        shares = [int(commit_quota(torch.tensor(masked), torch.tensor(steps), step)) for step in range(25)]
        assert sum(shares) == masked
        assert shares[:steps] == sorted(shares[:steps], reverse=True) and shares[0] - shares[steps - 1] <= 1
        assert not any(shares[steps:])


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


def test_each_step_commits_its_quota(model):
    streamer = drafts(model, PROMPT, max_new_tokens=10, block_length=5, steps=3, eos_policy="forbid")
    masks = [draft[0].count(MASK) for draft in streamer.drafts]
    assert masks == [8, 6, 5, 3, 1, 0]  # blocks of 5 in 3 steps: 2, 2, 1


def test_blocks_are_decoded_left_to_right(model):
    streamer = drafts(model, PROMPT, max_new_tokens=6, block_length=2, eos_policy="forbid")
    lengths = [len(draft[0]) for draft in streamer.drafts]
    assert lengths == [6, 6, 4, 4, 2, 2]  # from the first column that was not put
    for draft in streamer.drafts:
        assert all(token == MASK for token in draft[0][2:])


def test_one_block_is_pure_diffusion(model):
    for options in ({}, {"steps": 3}, {"temperature": 1.0}):
        pure = model.generate(PROMPT, max_new_tokens=8, generator=seeded(), **options)
        block = model.generate(PROMPT, max_new_tokens=8, block_length=8, generator=seeded(), **options)
        assert torch.equal(pure, block)


def test_the_models_block_length_is_the_default_and_its_grid_binds(block_model):
    default = block_model.generate(PROMPT, max_new_tokens=7)  # 5 + 7 = 12: one token of block 2, then two whole ones
    assert torch.equal(default, block_model.generate(PROMPT, max_new_tokens=7, block_length=4))
    streamer = drafts(block_model, PROMPT, max_new_tokens=9, eos_policy="forbid")
    assert [len(put[0]) for put in streamer.puts] == [5, 3, 4, 2]
    # a longer budget only appends: the last block was decoded as a part of the whole one
    for budget in (1, 2, 3):
        shorter = block_model.generate(PROMPT[:, :4], max_new_tokens=budget, temperature=0, steps=None)
        prompt = PROMPT[0, :4].tolist()
        assert shorter[0].tolist() == reference_greedy(block_model, prompt, budget)


def test_a_partial_last_block_is_seen_whole(block_model):
    seen = []
    handle = block_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    out = block_model.generate(PROMPT, max_new_tokens=2)
    handle.remove()
    assert set(seen) == {8} and out.shape[1] == 7


def test_rows_of_any_length_keep_their_own_grid(block_model):
    rows = [[4], [4, 5, 6, 7, 8, 9], [9, MASK, 7, 6, 5]]
    ids, attention_mask = left_padded(rows)
    out = block_model.generate(ids, attention_mask=attention_mask, max_new_tokens=6, eos_policy="forbid")
    for row, prompt in zip(out, rows, strict=True):
        single = block_model.generate(torch.tensor([prompt]), max_new_tokens=6, eos_policy="forbid")
        assert torch.equal(row[ids.shape[1] - len(prompt) :], single[0])


def test_prompt_masks_join_the_first_block(model, block_model):
    prompt = torch.tensor([[4, MASK, 6, 7, 8, MASK]])
    streamer = drafts(model, prompt, max_new_tokens=4, block_length=2, steps=2, eos_policy="forbid")
    assert [draft[0].count(MASK) for draft in streamer.drafts] == [4, 2, 1, 0]
    assert [len(draft[0]) for draft in streamer.drafts] == [9, 9, 2, 2]  # from the prompt's first mask on
    assert streamer.puts[0] == prompt.tolist()
    # on the grid: block 0 holds one mask, block 1 the other and two new tokens, block 2 the rest
    streamer = drafts(block_model, prompt, max_new_tokens=4, steps=1, eos_policy="forbid")
    assert [draft[0].count(MASK) for draft in streamer.drafts] == [5, 2, 0]


def test_infilling_alone(model):
    prompt = torch.tensor([[4, MASK, 6, MASK, 8], [4, 5, 6, 7, MASK], [4, 5, 6, 7, 8]])
    result = model.generate(prompt, max_new_tokens=0, return_dict_in_generate=True)
    assert result.sequences.shape == prompt.shape and not (result.sequences == MASK).any()
    assert torch.equal(result.sequences[prompt != MASK], prompt[prompt != MASK])
    assert result.tokens_per_forward.tolist() == [1.0, 1.0, 0.0]
    assert torch.equal(result.sequences, model.generate(prompt, max_length=5))


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


def test_greedy_is_the_default_and_has_three_names(model):
    default = model.generate(PROMPT, max_new_tokens=6)
    for options in ({"do_sample": False}, {"temperature": 0}, {"temperature": 0.0, "do_sample": False}):
        assert torch.equal(default, model.generate(PROMPT, max_new_tokens=6, **options))


def test_sampling_has_three_names(model):
    sample = model.generate(PROMPT, max_new_tokens=6, temperature=1.0, generator=seeded())
    for options in ({"do_sample": True}, {"do_sample": True, "temperature": 1}):
        assert torch.equal(sample, model.generate(PROMPT, max_new_tokens=6, generator=seeded(), **options))
    torch.manual_seed(7)
    first = model.generate(PROMPT, max_new_tokens=6, temperature=1.0)
    torch.manual_seed(7)
    assert torch.equal(first, model.generate(PROMPT, max_new_tokens=6, temperature=1.0))  # the global generator
    assert not torch.equal(first, model.generate(PROMPT, max_new_tokens=6, temperature=1.0))


@pytest.mark.parametrize(
    ("saved", "call", "temperature"),
    [
        ({}, {}, 0.0),
        ({"temperature": 0.7}, {}, 0.7),
        ({"do_sample": True}, {}, 1.0),
        ({"temperature": 0.7}, {"do_sample": False}, 0.0),
        ({"temperature": 0.7, "do_sample": True}, {"do_sample": False}, 0.0),
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 0}, 0.0),
        ({"temperature": 0.7, "do_sample": True}, {"generation_config": GenerationConfig(do_sample=False)}, 0.0),
        ({"temperature": 0.0, "do_sample": False}, {"do_sample": True}, 1.0),
        ({"temperature": 0.0}, {"generation_config": GenerationConfig(do_sample=True)}, 1.0),
        ({"do_sample": False}, {"temperature": 0.5}, 0.5),
        ({"do_sample": False}, {"temperature": 0.5, "do_sample": True}, 0.5),
        ({"do_sample": True}, {"temperature": 0.5}, 0.5),
    ],
)
def test_the_call_outranks_what_the_model_saved(saved, call, temperature):
    model = build()
    model.generation_config = NanoLLaDAGenerationConfig(**saved)
    settings, _ = model._prepare_generation_config(**{"generation_config": None, **call})
    assert (settings.temperature, settings.do_sample) == (temperature, temperature > 0)
    assert settings.top_k is None and settings.top_p is None


def test_low_temperatures_are_nearly_greedy_and_high_ones_nearly_uniform(model):
    ids = PROMPT.repeat(64, 1)
    greedy = model.generate(PROMPT, max_new_tokens=6)
    cold = model.generate(ids, max_new_tokens=6, temperature=1e-4, generator=seeded())
    assert torch.equal(cold, greedy.expand_as(cold))
    hot = model.generate(ids, max_new_tokens=6, temperature=1e4, eos_policy="forbid", generator=seeded())
    assert len(hot[:, 5:].unique()) == VOCABULARY - 2


def test_num_return_sequences_are_independent(model):
    out = model.generate(PROMPT, max_new_tokens=6, num_return_sequences=5, temperature=1.0, generator=seeded())
    assert out.shape == (5, 11) and len(out.unique(dim=0)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Guidance, penalties, processors


def test_guidance_of_zero_is_no_guidance_and_costs_nothing(model):
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    plain = model.generate(PROMPT, max_new_tokens=4, eos_policy="forbid")
    assert torch.equal(plain, model.generate(PROMPT, max_new_tokens=4, eos_policy="forbid", cfg_scale=0))
    assert calls == [1] * 8
    result = model.generate(PROMPT, max_new_tokens=4, cfg_scale=2.0, eos_policy="forbid", return_dict_in_generate=True)
    handle.remove()
    assert calls[8:] == [2] * 4 and result.tokens_per_forward.tolist() == [1.0]


def test_guidance_by_hand(model):
    prompt = torch.tensor([[4, 5, MASK, 7, 8]])
    conditional = model(prompt).logits[0, 2]
    unconditional = model(torch.full((1, 5), MASK)).logits[0, 2]
    for scale in (0.5, 1.5, 4.0):
        logits = unconditional + (scale + 1) * (conditional - unconditional)
        logits[MASK] = -torch.inf
        for options in ({}, {"renormalize_logits": True}):  # the mask token's −inf must not become a nan
            assert model.generate(prompt, max_new_tokens=0, cfg_scale=scale, **options)[0, 2] == logits.argmax()
    weights = logits.softmax(-1)
    out = model.generate(prompt.repeat(5000, 1), max_new_tokens=0, cfg_scale=4.0, temperature=1.0, generator=seeded())[
        :, 2
    ]
    assert (torch.bincount(out, minlength=VOCABULARY) / 5000 - weights).abs().max() < 0.03


def test_repetition_penalty_counts_visible_tokens_only(model):
    out = model.generate(PROMPT, max_new_tokens=12, repetition_penalty=1e6, eos_policy="forbid")[0].tolist()
    assert len(set(out)) == len(out) and MASK not in out
    padded = model.generate(
        torch.tensor([[PAD, PAD, *PROMPT[0]]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
        max_new_tokens=12,
        repetition_penalty=1e6,
        eos_policy="forbid",
    )
    assert padded[0, 2:].tolist() == out


class Recorded(LogitsProcessor):
    def __init__(self, rule):
        self.rule, self.shapes = rule, []

    def __call__(self, input_ids, scores):
        self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        return self.rule(input_ids, scores)


def test_logits_processors_see_every_masked_position_with_its_row(model):
    def only_nine(input_ids, scores):
        assert (input_ids == MASK).any(1).all() and torch.equal(input_ids[:, :5], PROMPT.expand(len(input_ids), -1))
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

    processor = Recorded(only_nine)
    out = model.generate(PROMPT, max_new_tokens=4, logits_processor=[processor])
    assert out[0, 5:].tolist() == [9] * 4
    assert processor.shapes == [((n, 9), (n, VOCABULARY)) for n in (4, 3, 2, 1)]


def test_no_processor_brings_the_mask_token_back(model):
    processor = Recorded(lambda input_ids, scores: scores.index_fill(1, torch.tensor([MASK]), 1e9))
    out = model.generate(PROMPT, max_new_tokens=4, logits_processor=[processor], temperature=1.0)
    assert not (out == MASK).any()


def test_suppressed_tokens_stay_away(model):
    first = int(model.generate(PROMPT, max_new_tokens=1, eos_policy="forbid")[0, -1])
    out = model.generate(PROMPT, max_new_tokens=6, suppress_tokens=[first, MASK])
    assert first not in out[0, 5:].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The end


class Eager(NanoLLaDAForMaskedLM):
    """Sure of EOS at odd positions, less sure of 10 + position at even ones; the left is surer."""

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        position = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        odd = (position % 2)[..., None] == 1
        first = torch.zeros(*position.shape, VOCABULARY).scatter_(-1, 10 + position[..., None], 5.0)
        first[..., EOS] = torch.where(odd[..., 0], 9.0, 4.0)
        return MaskedLMOutput(logits=(first * (2 - position / 20)[..., None])[logits_to_keep])


@pytest.mark.parametrize(
    ("policy", "order"),
    [("none", [5, 7, 9, 6, 8, 10]), ("last", [6, 8, 10, 5, 7, 9]), ("forbid", [5, 6, 7, 8, 9, 10])],
)
def test_eos_policies(policy, order):
    model = Eager(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE))
    streamer = drafts(model, PROMPT, max_new_tokens=6, eos_policy=policy, early_stop=False)
    masked = [{5 + index for index, token in enumerate(draft[0]) if token == MASK} for draft in streamer.drafts]
    assert [left - right for left, right in itertools.pairwise([{*range(5, 11)}, *masked])] == [{i} for i in order]
    final = streamer.drafts[-1][0]
    assert final == ([15, 16, 17, 18, 19, 20] if policy == "forbid" else [EOS, 16, EOS, 18, EOS, 20])


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


@pytest.mark.parametrize("block_length", [None, 2, 8])
def test_decoding_stops_at_an_eos_with_nothing_masked_before_it(block_length):
    for early_stop, forwards in ((True, 3), (False, 8)):
        model = eos_model()
        result = model.generate(
            PROMPT, max_new_tokens=8, block_length=block_length, early_stop=early_stop, return_dict_in_generate=True
        )
        assert result.sequences[0, 5:].tolist() == [15, 16, EOS, PAD, PAD, PAD, PAD, PAD]
        assert model.calls == forwards
        assert result.tokens_per_forward.tolist() == pytest.approx([3 / forwards])


def test_an_eos_of_the_prompt_or_of_a_hole_in_it_ends_nothing():
    prompt = torch.tensor([[4, EOS, 6, MASK, 8]])
    out = eos_model(column=3).generate(prompt, max_new_tokens=3)
    assert out[0].tolist() == [4, EOS, 6, EOS, 8, 15, 16, 17]


def test_early_stop_changes_no_token(model):
    ids = torch.randint(4, VOCABULARY, (1, 4), generator=seeded())
    for seed in range(20):
        kwargs = {"max_new_tokens": 8, "temperature": 1.5, "eos_token_id": list(range(4, 20))}
        outs = [model.generate(ids, early_stop=flag, generator=seeded(seed), **kwargs) for flag in (True, False)]
        assert torch.equal(*outs)


def test_any_of_several_eos_ends_the_row():
    out = eos_model().generate(PROMPT, max_new_tokens=6, eos_token_id=[EOS, 16])
    assert out[0, 5:].tolist() == [15, 16, PAD, PAD, PAD, PAD]
    out = eos_model().generate(PROMPT, max_new_tokens=6, eos_token_id=[EOS, 16], eos_policy="forbid")
    assert EOS not in out and 16 not in out


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("block_length", [1, 3, 6])
def test_stopping_criteria_cut_the_row_where_they_stop(block_length):
    model, criterion = eos_model(column=99), StopAt(16)
    out = model.generate(PROMPT, max_new_tokens=6, block_length=block_length, stopping_criteria=[criterion])
    assert out[0, 5:].tolist() == [15, 16, PAD, PAD, PAD, PAD]
    prefixes = [row[0] for row in criterion.seen]
    expected = [[*PROMPT[0].tolist(), *range(15, 15 + n)] for n in range(1, 7)]
    assert prefixes == expected[: max(2, block_length)]
    assert model.calls == -(-2 // block_length) * block_length  # the blocks up to the stop


def test_stopping_criteria_on_a_grid_see_each_rows_own_prefixes(block_model):
    rows = [[4, 5, 6], [4, 5, 6, 7, 8, 9]]
    ids, attention_mask = left_padded(rows)
    kwargs = {"max_new_tokens": 8, "eos_policy": "forbid"}
    free = block_model.generate(ids, attention_mask=attention_mask, **kwargs)
    stop = int(free[0, 6 + 3])
    batch = block_model.generate(ids, attention_mask=attention_mask, stopping_criteria=[StopAt(stop)], **kwargs)
    for row, prompt in zip(batch, rows, strict=True):
        single = block_model.generate(torch.tensor([prompt]), stopping_criteria=[StopAt(stop)], **kwargs)
        assert torch.equal(row[6 - len(prompt) :], single[0])
    assert batch[0].tolist()[-1] == PAD


def test_max_time_and_max_length_criteria(model):
    kwargs = {"max_new_tokens": 6, "block_length": 2, "eos_policy": "forbid"}
    free = model.generate(PROMPT, **kwargs)
    timed = model.generate(PROMPT, max_time=1e-9, **kwargs)
    assert timed[0].tolist() == free[0, :7].tolist() + [PAD] * 4  # the block at work is kept
    short = model.generate(PROMPT, stopping_criteria=[MaxLengthCriteria(6)], **kwargs)
    assert short[0].tolist() == free[0, :6].tolist() + [PAD] * 5


def test_stop_strings(tokenizer):
    model = build(vocab_size=len(tokenizer))
    prompt = tokenizer("The cat", return_tensors="pt").input_ids
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list("abcdefghi")))
    spell = Recorded(lambda ids, scores: torch.full_like(scores, -1e9).index_copy(1, letters, scores[:, letters]))
    kwargs = {"max_new_tokens": 8, "block_length": 4, "logits_processor": [spell]}
    free = tokenizer.decode(model.generate(prompt, **kwargs)[0, prompt.shape[1] :])
    word = free[4:6]
    out = model.generate(prompt, stop_strings=[word], tokenizer=tokenizer, **kwargs)[0, prompt.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == free[: free.index(word) + 2] != free


# ---------------------------------------------------------------------------------------------------------------------
# Output, lengths, streamers, pipelines


def test_output_of_a_dictionary(model):
    result = model.generate(PROMPT, max_new_tokens=8, steps=2, eos_policy="forbid", return_dict_in_generate=True)
    assert isinstance(result, NanoLLaDAGenerationOutput)
    assert result.past_key_values is None and result.scores is None
    assert result.tokens_per_forward.tolist() == [4.0]
    assert set(result) == {"sequences", "tokens_per_forward"}


def test_lengths_as_in_transformers(model):
    assert model.generate(PROMPT, max_length=9).shape == (1, 9)
    with pytest.warns(UserWarning, match="max_length"):
        assert model.generate(PROMPT).shape == (1, 25)  # transformers' default: 20 new tokens
    assert model.generate(max_new_tokens=3).shape == (1, 4)  # from the bos token
    assert model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=3).shape == (1, 3)


def test_the_attention_mask_is_guessed_as_in_transformers(model):
    ids, attention_mask = left_padded([[4, 5, 6, 7], [8, 9]])
    given = model.generate(ids, attention_mask=attention_mask, max_new_tokens=4)
    assert torch.equal(given, model.generate(ids, max_new_tokens=4))


def test_only_the_logits_of_the_block_are_computed(model):
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    model.generate(PROMPT, max_new_tokens=6, block_length=3, eos_policy="forbid")
    handle.remove()
    assert sizes == [3, 2, 1, 3, 2, 1]


def test_put_and_drafts_make_the_row(model):
    streamer = drafts(model, PROMPT, max_new_tokens=6, block_length=3, eos_policy="forbid")
    out = model.generate(PROMPT, max_new_tokens=6, block_length=3, eos_policy="forbid")[0].tolist()
    assert streamer.ended and sum((put[0] for put in streamer.puts), []) == out
    for draft, length in zip(streamer.drafts, [6, 6, 6, 3, 3, 3], strict=True):
        row = out[: 11 - length] + draft[0]
        assert len(draft[0]) == length and all(token in (MASK, out[index]) for index, token in enumerate(row))


def test_nothing_is_streamed_after_the_end():
    streamer = drafts(eos_model(), PROMPT, max_new_tokens=8, block_length=4)
    assert streamer.puts == [PROMPT.tolist(), [[15, 16, EOS]]]


def test_transformers_streamers(tokenizer, capsys):
    model = build(vocab_size=len(tokenizer))
    prompt = tokenizer("The cat", return_tensors="pt").input_ids
    kwargs = {"max_new_tokens": 8, "block_length": 4, "suppress_tokens": [0, 1, 2]}
    out = tokenizer.decode(model.generate(prompt, **kwargs)[0])
    for streamer_class in (TextStreamer, TextDiffusionStreamer):
        model.generate(prompt, streamer=streamer_class(tokenizer), **kwargs)
        printed = capsys.readouterr().out
        assert printed.endswith("\n")
        if streamer_class is TextStreamer:
            assert printed == out + "\n"
        else:
            assert printed.count("\033[33m") == 8 and tokenizer.mask_token in printed
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt, streamer=streamer, **kwargs)
    assert "The cat" + "".join(streamer) == out


@pytest.fixture
def text_pipeline(tokenizer):
    return pipeline("text-generation", model=build(vocab_size=len(tokenizer)), tokenizer=tokenizer, device="cpu")


def test_pipeline(text_pipeline):
    [record] = text_pipeline("The cat", max_new_tokens=6)  # samples: the pipeline's own default
    assert record["generated_text"].startswith("The cat")
    greedy = [text_pipeline(text, max_new_tokens=6, do_sample=False) for text in ("The cat sat on", "The dog")]
    assert greedy == [text_pipeline(text, max_new_tokens=6, do_sample=False) for text in ("The cat sat on", "The dog")]
    text_pipeline.tokenizer.padding_side = "left"
    batch = text_pipeline(["The cat sat on", "The dog"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert batch == greedy
    chat = [{"role": "user", "content": "What is it?"}]
    [record] = text_pipeline(chat, max_new_tokens=6, block_length=3, return_dict_in_generate=True)
    assert record["generated_text"][-1]["role"] == "assistant"


def test_pipeline_samples_with_its_own_temperature(text_pipeline):
    seen = []
    sample = text_pipeline.model._sample.__func__

    class Spy(type(text_pipeline.model)):
        def _sample(self, *args, **kwargs):
            seen.append((kwargs["generation_config"].temperature, kwargs["generation_config"].top_k))
            return sample(self, *args, **kwargs)

    text_pipeline.model.__class__ = Spy
    text_pipeline("The cat", max_new_tokens=2)
    text_pipeline("The cat", max_new_tokens=2, do_sample=False)
    assert seen == [(0.7, None), (0.0, None)]


def test_pipeline_leaves_a_greedy_model_greedy(tokenizer):
    model = build(vocab_size=len(tokenizer))
    model.generation_config.temperature = 0.0
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert pipe("The cat", max_new_tokens=6) == pipe("The cat", max_new_tokens=6, do_sample=False)


# ---------------------------------------------------------------------------------------------------------------------
# The configuration on disk

SETTINGS = {"block_length": 2, "steps": 1, "position_score": "margin", "cfg_scale": 0.5, "temperature": 0.9}


def same_settings(config):
    assert type(config).__name__ == "NanoLLaDAGenerationConfig"
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert (config.eos_token_id, config.pad_token_id) == (EOS, PAD)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_generation_config_survives_save_and_load(tmp_path, auto_class):
    model = build()
    model.generation_config.update(**SETTINGS)
    for folder in ("first", "second"):  # and from a loaded model once more
        model.save_pretrained(tmp_path / folder)
        model = auto_class.from_pretrained(tmp_path / folder)
        same_settings(model.generation_config)
    kwargs = {"max_new_tokens": 4}
    explicit = build().generate(PROMPT, generator=seeded(), **kwargs, **SETTINGS)
    assert torch.equal(model.generate(PROMPT, generator=seeded(), **kwargs), explicit)


def test_generation_config_survives_as_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = build()
    model.generation_config.update(**SETTINGS)
    model.save_pretrained(tmp_path / "model")
    remote_class = dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_nanollada.NanoLLaDAForMaskedLM", str(tmp_path / "model")
    )
    assert remote_class.__module__.startswith("transformers_modules")
    remote = remote_class.from_pretrained(tmp_path / "model")
    same_settings(remote.generation_config)
    assert torch.equal(
        remote.generate(PROMPT, max_new_tokens=4, generator=seeded()),
        model.generate(PROMPT, max_new_tokens=4, generator=seeded()),
    )


def test_an_ar_checkpoint_without_and_with_a_generation_config(tmp_path):
    torch.manual_seed(0)
    NanoLLaDAForCausalLM(NanoLLaDAConfig(vocab_size=VOCABULARY, **SHAPE)).save_pretrained(tmp_path)
    for _ in range(2):
        model = NanoLLaDAForMaskedLM.from_pretrained(tmp_path)
        assert type(model.generation_config) is NanoLLaDAGenerationConfig
        assert model.generation_config.eos_token_id == EOS and not model.generation_config._from_model_config
        assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 9)
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
    model.generation_config.steps = 2
    model.save_pretrained(tmp_path)
    assert NanoLLaDAForMaskedLM.from_pretrained(tmp_path).generation_config.steps == 2


def test_a_config_object_and_keywords_mean_the_same(model):
    settings = {"max_new_tokens": 6, "block_length": 3, "steps": 2, "temperature": 0.8}
    by_keyword = model.generate(PROMPT, generator=seeded(), **settings)
    by_object = model.generate(PROMPT, generation_config=NanoLLaDAGenerationConfig(**settings), generator=seeded())
    assert torch.equal(by_keyword, by_object)
    plain = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=0.8)
    by_plain = model.generate(PROMPT, generation_config=plain, block_length=3, steps=2, generator=seeded())
    assert torch.equal(by_keyword, by_plain)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

CACHE = DynamicCache()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"block_length": 24, "max_new_tokens": 100}, "`block_length` must divide `max_new_tokens`, got 24 and 100"),
        ({"block_length": 8}, "`block_length` must divide `max_new_tokens`, got 8 and 4"),
        ({"block_length": 0}, "`block_length` must be an integer >= 1, got 0"),
        ({"steps": 0}, "`steps` must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "`steps` must be an integer >= 1, got 2.5"),
        ({"steps": True}, "`steps` must be an integer >= 1, got True"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be an integer >= 0, got -1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be > 0 for a prompt without mask tokens, got 0"),
        ({"temperature": -0.5}, "`temperature` must be a number >= 0, got -0.5"),
        ({"temperature": float("nan")}, "`temperature` must be a number >= 0, got nan"),
        ({"temperature": float("inf")}, "`temperature` must be a number >= 0, got inf"),
        ({"temperature": "hot"}, "`temperature` must be a number >= 0, got 'hot'"),
        ({"do_sample": True, "temperature": 0}, "`do_sample` must be False where `temperature` is 0 .*got True and 0"),
        ({"do_sample": False, "temperature": 0.5}, "and True where it is not, got False and 0.5"),
        ({"do_sample": "yes"}, r"`do_sample` must be one of \(True, False\), got 'yes'"),
        ({"top_k": -1, "temperature": 1.0}, "`top_k` must be an integer >= 0, got -1"),
        ({"top_p": 0.0, "temperature": 1.0}, r"`top_p` must be a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.5, "temperature": 1.0}, r"`top_p` must be a number in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be a number > 0, got 0"),
        ({"cfg_scale": -1}, "`cfg_scale` must be a number >= 0, got -1"),
        ({"remasking": "sorted"}, r"`remasking` must be one of \('low_confidence', 'random'\), got 'sorted'"),
        ({"position_score": "random"}, r"`position_score` must be one of \('max_prob', .*\), got 'random'"),
        ({"eos_policy": "first"}, r"`eos_policy` must be one of \('none', 'last', 'forbid'\), got 'first'"),
        ({"early_stop": "never"}, r"`early_stop` must be one of \(True, False\), got 'never'"),
        ({"generator": 0}, "`generator` must be a torch.Generator, got 0"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 4}, "`num_beams` is not supported by the diffusion `generate`: it must be unset, got 4"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "`penalty_alpha` is not supported"),
        ({"dola_layers": "high"}, "`dola_layers` is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` is not supported"),
        ({"guidance_scale": 1.5}, "`guidance_scale` is not supported"),
        ({"min_new_tokens": 2}, "`min_new_tokens` is not supported"),
        ({"no_repeat_ngram_size": 2}, "`no_repeat_ngram_size` is not supported"),
        ({"bad_words_ids": [[5]]}, "`bad_words_ids` is not supported"),
        ({"forced_eos_token_id": 2}, "`forced_eos_token_id` is not supported"),
        ({"cache_implementation": "static"}, "`cache_implementation` is not supported .*got static"),
        ({"output_scores": True, "return_dict_in_generate": True}, "`output_scores` is not supported"),
        ({"output_logits": True, "return_dict_in_generate": True}, "`output_logits` is not supported"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "`output_attentions` is not supported"),
        ({"past_key_values": CACHE}, "`past_key_values` is not supported .* got DynamicCache"),
        ({"position_ids": torch.arange(5)[None]}, "`position_ids` is not supported .* got Tensor"),
        ({"document_ids": torch.zeros(1, 5)}, "`document_ids` is not supported"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [4]}, "`prefix_allowed_tokens_fn` is not supported"),
        ({"negative_prompt_ids": PROMPT}, "`negative_prompt_ids` is not supported .* got Tensor"),
        ({"synced_gpus": True}, "`synced_gpus` is not supported"),
        (
            {"logits_processor": [NoBadWordsLogitsProcessor([[5, 6]])]},
            "`logits_processor` must not read the row left to right, got NoBadWordsLogitsProcessor",
        ),
        (
            {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5)]},
            "`logits_processor` must not read the row left to right, got RepetitionPenaltyLogitsProcessor",
        ),
        ({"stepz": 3}, r"`model_kwargs` are not used by the model: \['stepz'\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refusals(model, kwargs, match):
    with pytest.raises(ValueError, match=match):
        model.generate(PROMPT, **{"max_new_tokens": 4, **kwargs})


def test_refusals_of_other_inputs(model, block_model):
    with pytest.raises(ValueError, match="`inputs_embeds` is not supported .* got Tensor"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 16), max_new_tokens=4)
    with pytest.raises(ValueError, match="`assistant_model` is not supported .* got NanoLLaDAForMaskedLM"):
        model.generate(PROMPT, assistant_model=block_model, max_new_tokens=4)
    with pytest.raises(ValueError, match="Input length of input_ids is 5, but `max_length` is set to 4"):
        model.generate(PROMPT, max_length=4)
    for block_length in (3, 8):
        message = f"`block_length` must divide the model's `config.block_length`, got {block_length} and 4"
        with pytest.raises(ValueError, match=message):
            block_model.generate(PROMPT, max_new_tokens=24, block_length=block_length)


def test_refusals_without_special_tokens():
    model = build(eos_token_id=None, pad_token_id=None)
    assert model.generate(PROMPT, max_new_tokens=4).shape == (1, 9)
    for policy in ("last", "forbid"):
        with pytest.raises(ValueError, match=f"`eos_policy` must be 'none' without an `eos_token_id`, got '{policy}'"):
            model.generate(PROMPT, max_new_tokens=4, eos_policy=policy)
    with pytest.raises(ValueError, match="`pad_token_id` must be set for `stopping_criteria`, got None"):
        model.generate(PROMPT, max_new_tokens=4, stopping_criteria=[StopAt(9)])


def test_bad_settings_are_refused_when_written_down():
    with pytest.raises(ValueError, match="`steps` must be an integer >= 1, got 0"):
        NanoLLaDAGenerationConfig(steps=0)
    with pytest.raises(ValueError, match="got True and 0"):
        NanoLLaDAGenerationConfig(do_sample=True, temperature=0)
