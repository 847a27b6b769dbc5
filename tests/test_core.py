"""Decoding with a cache equals recomputation: what must hold with every version (the rest: interpreters.CORE)."""

import pytest
import torch
from generation_models import EOS, MASK, PAD, SHAPE, VOCABULARY, build, left_padded, reference_greedy

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM

ROWS = [[4, 5, 6, 7, 8, 9, 10], [20, 21, 22], [33]]
NEW = 12
RUN = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD}
LAYERS = {"num_hidden_layers": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def ar():
    torch.manual_seed(0)
    config = NanoLLaDAConfig(vocab_size=VOCABULARY, initializer_range=0.6, **{**SHAPE, **LAYERS})
    return NanoLLaDAForCausalLM(config).eval().double()


@torch.no_grad()
def recomputed(model, row):
    """The plain loop: one row, all of it read anew for each token. Its tokens, and the logits of each."""
    row, steps = list(row), []
    for _ in range(NEW):
        logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
        logits[MASK] = -torch.inf
        steps.append(logits)
        row.append(int(logits.argmax()))
    return row, torch.stack(steps)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_autoregressive_decoding_is_that_of_the_plain_loop(ar, cache):
    """Rows of unequal length, alone and padded to the left. A step that has lost its past differs by far more."""
    settings = {**RUN, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    ids, mask = left_padded(ROWS)
    batch = ar.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
    for index, row in enumerate(ROWS):
        tokens, logits = recomputed(ar, row)
        alone = ar.generate(torch.tensor([row]), cache_implementation=cache, **settings)
        for output, place in ((batch, index), (alone, 0)):
            assert output.sequences[place, -len(tokens) :].tolist() == tokens
            scores = torch.stack(output.scores)[:, place]  # which transformers keeps in float32
            torch.testing.assert_close(scores, logits.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3}], ids=["sampled", "beams"])
def test_autoregressive_decoding_with_a_cache_changes_no_token(ar, settings):
    ids, mask = left_padded(ROWS)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(ar.generate(ids, attention_mask=mask, use_cache=use_cache, **RUN, **settings))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, {"steps": 6}),
        ({}, {"block_length": 4, "cfg_scale": 0.5}),
        ({"block_length": 4}, {}),
        ({"block_length": 4}, {"block_length": 2, "steps": 1}),
        ({"block_length": 4}, {"cfg_scale": 0.5, "repetition_penalty": 1.3}),
    ],
    ids=str,
)
def test_denoising_is_that_of_the_plain_loop(shape, settings):
    """Of block models, whose finished blocks are cached, and of models that see whole rows."""
    model = build(**shape, **LAYERS)
    ids, mask = left_padded(ROWS)
    outputs = [
        model.generate(ids, attention_mask=mask, **{**RUN, "eos_token_id": EOS}, **settings, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)
    for index, row in enumerate(ROWS):
        assert outputs[0][index, -len(row) - NEW :].tolist() == reference_greedy(model, row, NEW, **settings)
