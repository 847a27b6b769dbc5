"""`generate` of the diffusion model against a plain-loop sampler and an exact denoiser."""

import itertools
import random

import pytest
import torch
from generation_models import (
    EOS,
    MASK,
    PAD,
    PROMPT,
    SHAPE,
    VOCABULARY,
    Eager,
    Recorded,
    StopAt,
    build,
    drafts,
    eos_model,
    excess_total_variation,
    left_padded,
    markov_law,
    reference_greedy,
    seeded,
)
from transformers import (
    MaxLengthCriteria,
)

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
)
from nanollada.modeling_nanollada.commit_nanollada import commit_quota


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def block_model():
    return build(block_length=4)


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
        "eos_policy": rng.choice(["none", "none", "last", "cut", "forbid"]),
    }
    new = rng.choice([0, 1, 4, 6, 8])
    if grid is None:
        options["block_length"] = rng.choice([None, *range(1, new + 3)])
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
    models = [build(seed, block_length=grid) for seed, grid in enumerate((None, 4, None, None))]
    for model in models:
        with torch.no_grad():
            model.lm_head.weight[EOS] *= 2.5
    greedy = ended = 0
    for call in range(300):
        model = models[call % len(models)]
        prompts, new, options = random_call(rng, model)
        ids, attention_mask = left_padded(prompts)
        kwargs = {"attention_mask": attention_mask, "max_new_tokens": new, **options}
        kwargs["early_stop"] = None if options["eos_policy"] == "cut" else rng.choice([True, False])
        kwargs["remasking"] = rng.choice(["low_confidence", "low_confidence", "random"])
        if kwargs["remasking"] == "random":
            kwargs["position_score"] = None  # no use for one: refused
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_score": "margin"},
        {"position_score": "entropy"},
        {"remasking": "random"},
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
    out = block_model.generate(PROMPT, max_new_tokens=2, use_cache=False)
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
