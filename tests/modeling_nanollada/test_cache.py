"""Decoding with caches: the exact one gives tokens and logits of whole rows, the approximate ones what they say."""

import random

import pytest
import torch
from generation_models import EOS, MASK, PAD, VOCABULARY, build, left_padded, seeded

from nanollada.modeling_nanollada import prediction_nanollada
from nanollada.modeling_nanollada.cache_nanollada import BlockCache, BlockCacheLayer

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
RULES = (
    {},
    {"steps": 2},
    {"threshold": 0.3},
    {"threshold": 0.5, "low_threshold": 0.1},
    {"threshold": 0.2, "kl_threshold": 0.5},
    {"factor": 1.2},
    {"entropy_bound": 1.0},
    {"commit_schedule": "ratio", "steps": 3},
    {"commit_schedule": "ramp", "max_commits": 2},
    {"remdm": "rescale", "remdm_eta": 0.5, "steps": 6},
)


def watched(monkeypatch, predictor, logits):
    """Keeps the logits of every step of `predictor`."""
    original = predictor.predict

    def predict(self, active):
        logits.append(original(self, active))
        return logits[-1]

    monkeypatch.setattr(predictor, "predict", predict)


@pytest.fixture
def steps(monkeypatch):
    """The logits of every step, by predictor."""
    found = {"CachedBlocks": [], "WholeRows": [], "FrozenContext": []}
    for name, logits in found.items():
        watched(monkeypatch, getattr(prediction_nanollada, name), logits)
    return found


def random_case(number):
    """A model, ids and settings: padding, prompts no multiple of the block, masks inside them, GQA, YaRN, guidance."""
    draw = random.Random(number)
    block_length = draw.choice((1, 2, 3, 4, 6, 8))
    shape = {"block_length": block_length, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
    shape |= {"num_key_value_heads": draw.choice((1, 2, 4)), "rope_parameters": draw.choice((YARN, None))}
    if shape["rope_parameters"] is None:
        del shape["rope_parameters"]
    model = build(number, initializer_range=0.3, **shape)
    rows = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, 14))] for _ in range(draw.choice((1, 3)))]
    if draw.random() < 0.4:
        for row in rows:
            row[draw.randrange(len(row))] = MASK
    ids, mask = left_padded(rows)
    divisors = [size for size in range(1, block_length + 1) if block_length % size == 0]
    settings = {"max_new_tokens": draw.randrange(1, 21), "block_length": draw.choice(divisors)}
    settings |= draw.choice(RULES) | {"temperature": draw.choice((0.0, 1.0)), "cfg_scale": draw.choice((0.0, 0.7))}
    settings |= {"pad_token_id": PAD, "eos_token_id": draw.choice((EOS, [EOS, *range(40, 50)]))}
    settings |= {"eos_policy": draw.choice(("none", "forbid") if "remdm" in settings else ("none", "last", "forbid"))}
    return model, {"input_ids": ids, "attention_mask": mask}, settings


@pytest.mark.parametrize("number", range(200))
def test_cached_equals_uncached(steps, number):
    model, inputs, settings = random_case(number)
    static = {"cache_implementation": "static"} if number % 3 == 0 else {}
    run = dict(settings, return_dict_in_generate=True)
    plain = model.generate(**inputs, **run, generator=seeded(number), use_cache=False)
    cached = model.generate(**inputs, **run, generator=seeded(number), **static)
    assert torch.equal(plain.sequences, cached.sequences)
    assert torch.equal(plain.tokens_per_forward, cached.tokens_per_forward)
    assert len(steps["WholeRows"]) == len(steps["CachedBlocks"]) > 0
    for expected, found in zip(steps["WholeRows"], steps["CachedBlocks"], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def lengths(model, *args, **kwargs):
    """How many positions each forward pass read."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(*args, pad_token_id=PAD, **kwargs)
    handle.remove()
    return seen


def test_every_block_is_written_once():
    model = build(block_length=4)
    prompt = torch.arange(4, 14)[None]  # two blocks, and half of the third
    # the prompt's blocks with the first step, then each finished block with the next one's first
    assert lengths(model, prompt, max_new_tokens=10) == [12, 4, 8, 4, 4, 4, 8, 4, 4, 4]
    assert lengths(model, prompt, max_new_tokens=10, use_cache=False) == [12] * 2 + [16] * 4 + [20] * 4
    # a sub-block's window is the block of the model, whose first half must be seen with the second's masks
    assert lengths(model, prompt, max_new_tokens=6, block_length=2) == [12, 4, 8, 4, 4, 4]


def test_finished_rows_leave_the_cache(monkeypatch):
    model, sizes = build(block_length=2), []
    update = BlockCacheLayer.update

    def watched_update(self, keys, values, *args, **kwargs):
        sizes.append(len(keys))
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(BlockCacheLayer, "update", watched_update)
    ids = torch.randint(4, VOCABULARY, (4, 6), generator=seeded(1))
    out = model.generate(ids, max_new_tokens=12, eos_token_id=list(range(4, 20)), pad_token_id=PAD)
    ends = (out[:, 6:] != PAD).sum(1)
    assert ends.unique().numel() > 1, "the case needs rows of different lengths"
    assert sizes[0] == 4 and sizes[-1] < 4 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("capacity", [None, 12])
def test_the_layer_overwrites_what_is_not_kept(capacity):
    keys = torch.arange(1.0, 9)[None, None, :, None]  # [1, 1, 8, 1]
    cache = BlockCache(1, capacity)
    assert cache.layers[0].get_mask_sizes(8) == (capacity or 8, 0)
    found, _ = cache.update(keys, keys, 0)
    cache.keep(5)
    assert cache.get_seq_length() == 5
    found, values = cache.update(keys[:, :, :2] * 10, -keys[:, :, :2], 0)
    assert found[0, 0, :7, 0].tolist() == [1, 2, 3, 4, 5, 10, 20] and values[0, 0, 5:7, 0].tolist() == [-1, -2]
    assert found.shape[2] == (capacity or 7)
    cache.keep(2, 8)  # keys behind the window are seen, too
    found, _ = cache.update(keys[:, :, :1] * 100, keys[:, :, :1], 0)
    assert found[0, 0, :4, 0].tolist() == [1, 2, 100, 4] and found.shape[2] == (capacity or 8)
    assert cache.layers[0].get_max_length() == (capacity or -1)


def test_a_full_static_cache_says_so():
    with pytest.raises(ValueError, match="A static cache must hold all keys, got room for 4 and 5 keys"):
        BlockCache(1, 4).update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)


@pytest.mark.parametrize("name", ["prefix", "dual"])
def test_an_approximate_cache_starts_each_block_exactly(steps, name):
    model = build(num_hidden_layers=2)
    ids, mask = left_padded([[5, 6, 7], [8, 9, 10, 11, 12]])
    run = {"input_ids": ids, "attention_mask": mask, "pad_token_id": PAD, "max_new_tokens": 8, "block_length": 4}
    model.generate(**run)
    model.generate(**run, approximate_cache=name)
    whole, frozen = steps["WholeRows"], steps["FrozenContext"]
    torch.testing.assert_close(frozen[0], whole[0], atol=1e-10, rtol=0)
    assert not torch.allclose(frozen[1], whole[1]), "the second step should see frozen keys"
    # and so does every block: with one step per block nothing is frozen
    assert torch.equal(model.generate(**run, steps=1), model.generate(**run, steps=1, approximate_cache=name))


@pytest.mark.parametrize("name", ["prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_an_approximate_cache_freezes_what_it_says(steps, name, cfg_scale):
    """The plain way: one layer's keys depend on the embeddings alone, so that frozen ones are those of older ids."""
    model = build(num_hidden_layers=1)
    prompt = torch.tensor([[5, 6, 7, 8]])
    run = {"max_new_tokens": 8, "block_length": 4, "cfg_scale": cfg_scale, "eos_policy": "forbid"}
    model.generate(prompt, **run, approximate_cache=name)
    # one layer: outside the block nothing changed since its first step, so frozen equals fresh
    model.generate(prompt, **run)
    assert len(steps["FrozenContext"]) == 8
    for expected, found in zip(steps["WholeRows"], steps["FrozenContext"], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_approximate_reads(steps):
    model = build()
    prompt = torch.tensor([[5, 6, 7, 8]])
    run = {"max_new_tokens": 8, "block_length": 4, "steps": 3, "eos_token_id": EOS, "eos_policy": "forbid"}
    assert lengths(model, prompt, **run) == [12] * 6
    assert lengths(model, prompt, **run, approximate_cache="prefix") == [12, 8, 8, 12, 4, 4]
    assert lengths(model, prompt, **run, approximate_cache="dual") == [12, 4, 4, 12, 4, 4]
    assert lengths(model, prompt, **run, approximate_cache="dual", cache_implementation="static") == [12, 4, 4] * 2


def test_growing_rows():
    """Without masks behind the block, each block is what a shorter canvas would have given."""
    model = build(3, num_hidden_layers=2)
    prompt = torch.tensor([[5, 6, 7, 8]])
    grown = model.generate(prompt, max_new_tokens=8, block_length=4, grow_length=True)
    first = model.generate(prompt, max_new_tokens=4, block_length=4)
    assert torch.equal(grown[:, :8], first)
    assert torch.equal(grown, model.generate(first, max_new_tokens=4, block_length=4))
    assert not torch.equal(grown, model.generate(prompt, max_new_tokens=8, block_length=4))


@pytest.mark.parametrize(
    ("shape", "settings", "match"),
    [
        (
            {"block_length": 4},
            {"approximate_cache": "dual"},
            "`approximate_cache` is for models .* got 'dual'",
        ),
        (
            {},
            {"approximate_cache": "prefix", "use_cache": False},
            "`approximate_cache` needs .* and False",
        ),
        ({}, {"approximate_cache": "block"}, "`approximate_cache` must be one of .* got 'block'"),
    ],
)
def test_refusals(shape, settings, match):
    with pytest.raises(ValueError, match=match):
        build(**shape).generate(torch.tensor([[5, 6]]), max_new_tokens=4, **settings)
