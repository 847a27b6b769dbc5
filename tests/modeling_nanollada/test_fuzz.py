"""`generate` under random settings: no mask stays, no given token changes, nothing fails but as documented."""

import random

import pytest
import torch
from generation_models import EOS, MASK, PAD, VOCABULARY, build, left_padded, seeded

CALLS = 10_000


def models():
    """Tiny ones, from whole rows to blocks of one token."""
    shapes = [{"num_key_value_heads": heads, "block_length": size} for heads in (1, 2) for size in (None, 1, 3, 4, 8)]
    return [build(seed, initializer_range=0.4, **shape) for seed, shape in enumerate(shapes)]


def settings_of(draw, in_blocks):
    """Settings that `generate` must accept; a few draws are conflicts that it must name."""
    settings = {"max_new_tokens": draw.randrange(0, 13), "temperature": draw.choice((0.0, 0.7, 1.0))}
    rules = (
        {},
        {"steps": draw.choice((1, 2, 5))},
        {"threshold": draw.choice((0.0, 0.3, 0.9, 2.0)), "steps": draw.choice((None, 2))},
        {"threshold": 0.6, "low_threshold": draw.choice((0.0, 0.2))},
        {"threshold": 0.2, "kl_threshold": draw.choice((0.01, 1.0))},
        {"factor": draw.choice((0.3, 2.0))},
        {"entropy_bound": draw.choice((0.0, 0.5, 5.0))},
        {"commit_schedule": "ratio", "steps": draw.choice((1, 2, 5))},
        {"commit_schedule": "ramp", "ramp_start": draw.choice((0.05, 1.0))},
        {"remdm": draw.choice(("cap", "rescale")), "remdm_eta": draw.choice((0.0, 0.3, 1.0)), "steps": 7},
    )
    settings |= draw.choice(rules)
    conflict = 0.01  # what may contradict the rule or the model
    options = {
        "threshold": ((0.5,), conflict),
        "low_threshold": ((0.1,), conflict),
        "remasking": (("low_confidence", "random"), 0.1),
        "position_score": (("max_prob", "margin", "entropy", "sampled_prob"), 0.2),
        "max_commits": ((1, 3), 0.1),
        "block_length": ((1, 2, 4), 0.1),
        "approximate_cache": (("prefix", "dual"), conflict if in_blocks else 0.4),
        "cfg_scale": ((0.0, 1.5), 0.25),
        "eos_policy": (("none", "last", "forbid"), 0.5),
        "early_stop": ((True, False), 0.25),
        "grow_length": ((True, False), 0.25),
        "use_cache": ((True, False), 0.25),
        "cache_implementation": (("dynamic", "static"), 0.25),
        "repetition_penalty": ((0.8, 1.3), 0.1),
        "top_k": ((0, 3), 0.1),
        "top_p": ((0.5, 1.0), 0.1),
        "eos_token_id": ((EOS, [EOS, 40, 41]), 0.5),
    }
    for name, (values, chance) in options.items():
        if draw.random() < chance:
            settings[name] = draw.choice(values)
    return settings


DOCUMENTED = (
    "Only one of",
    "`threshold` and `factor` need probabilities",
    "`low_threshold`",
    "`kl_threshold`",
    "`remdm` decides itself",
    "`steps` must be unset",
    "`block_length` must divide",
    "`approximate_cache`",
    "`max_new_tokens` must be > 0 for a prompt without mask tokens",
    "`max_length` must exceed a prompt without mask tokens",
    "`top_",
    "`position_score` needs",
    "`remasking` needs",
    "`ramp_start` needs",
    "`remdm_eta` needs",
)


@pytest.mark.slow
def test_ten_thousand_calls():
    networks, refused = models(), 0
    for number in range(CALLS):
        draw = random.Random(number)
        model = draw.choice(networks)
        rows = [
            [MASK if draw.random() < 0.1 else draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, 12))]
            for _ in range(draw.choice((1, 1, 2, 4)))
        ]
        ids, mask = left_padded(rows)
        settings = settings_of(draw, model.config.block_length is not None)
        try:
            out = model.generate(ids, attention_mask=mask, pad_token_id=PAD, generator=seeded(number), **settings)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(DOCUMENTED), (number, settings, error)
            continue
        context = (number, settings, ids.tolist(), out.tolist())
        assert out.shape[1] == ids.shape[1] + settings["max_new_tokens"], context
        given = (ids != MASK) | ~mask.bool()
        assert torch.equal(out[:, : ids.shape[1]][given], ids[given]), context
        assert not (out[mask_of(out, mask)] == MASK).any(), context
        if settings.get("eos_policy") == "forbid":
            new = out[:, ids.shape[1] :]
            assert not torch.isin(new, torch.tensor(settings.get("eos_token_id", EOS))).any(), context
    assert refused < CALLS / 3, "most calls should decode"


def mask_of(out, mask):
    """What is no padding of the prompt."""
    return torch.nn.functional.pad(mask.bool(), (0, out.shape[1] - mask.shape[1]), value=True)
