"""The noisy and the clean half in one forward: equal to a loop over blocks, and nothing leaks."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import masking_utils

from nanollada.modeling_nanollada import (
    NanoLLaDAConfig,
    NanoLLaDAForCausalLM,
    NanoLLaDAForMaskedLM,
    attention_nanollada,
)
from nanollada.trainers.noise.adaptation import noisy_embeddings

LENGTH, MASK = 20, 3
GENERATOR = torch.Generator().manual_seed(0)
CLEAN = torch.randint(4, 61, (2, LENGTH), generator=GENERATOR)
NOISY = CLEAN.masked_fill(torch.rand(2, LENGTH, generator=GENERATOR) < 0.5, MASK)
DOCUMENTS = [(20,), (6, 14), (1, 8, 11)]


def build(model_class=NanoLLaDAForMaskedLM, **overrides):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return model_class(NanoLLaDAConfig(**{**shape, **overrides})).double().eval()


def packing(documents):
    """Model inputs of rows that pack documents of these lengths."""
    if len(documents) == 1:
        return {}
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)])
    position_ids = torch.cat([torch.arange(n) for n in documents])
    return {"document_ids": document_ids.expand(2, -1), "position_ids": position_ids.expand(2, -1)}


def block_loop(model, block_length, documents):
    """Logits of each noisy block behind the clean prefix of its own document, nothing else in the row."""
    logits, start = [], 0
    for length in documents:
        clean, noisy = CLEAN[:, start : start + length], NOISY[:, start : start + length]
        for begin in range(0, length, block_length):
            row = torch.cat((clean[:, :begin], noisy[:, begin : begin + block_length]), 1)
            logits.append(model(row, block_length=block_length).logits[:, begin:, 4:])
        start += length
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
@pytest.mark.parametrize("block_length", [1, 4, 7, LENGTH])
def test_one_forward_equals_the_loop_over_blocks(block_length, documents):
    """7 divides nothing here: a document's last block is shorter."""
    model = build()
    inputs = packing(documents)
    logits = model(NOISY, clean_input_ids=CLEAN, block_length=block_length, **inputs).logits[..., 4:]
    assert (logits - block_loop(model, block_length, documents)).abs().max() <= 1e-10


@torch.no_grad()
def test_a_token_causal_clean_half_is_something_else(monkeypatch):
    def token_causal(block_ids):
        rows, length = block_ids.shape

        def rule(batch, head, query, key):
            row = batch % rows
            query_block, key_block = block_ids[row, query % length], block_ids[row, key % length]
            inside = (query < length) & (key < length) & (key_block == query_block)
            before = (query < length) & (key >= length) & (key_block < query_block)
            return inside | before | ((query >= length) & (key >= length) & (key <= query))

        return rule

    model = build()
    monkeypatch.setattr(attention_nanollada, "_noisy_and_clean", token_causal)
    logits = model(NOISY, clean_input_ids=CLEAN, block_length=4).logits[..., 4:]
    assert (logits - block_loop(model, 4, (20,))).abs().max() > 1e-4
    logits = model(NOISY, clean_input_ids=CLEAN, block_length=1).logits[..., 4:]
    assert (logits - block_loop(model, 1, (20,))).abs().max() <= 1e-10  # blocks of one token are token-causal


@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
def test_gradients_reach_the_own_block_and_the_clean_ones_before(documents):
    model, block_length = build(), 4
    embedded = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(NOISY, clean_input_ids=CLEAN, block_length=block_length, **packing(documents)).logits
    hook.remove()
    positions = torch.cat([torch.arange(n) for n in documents])
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)])
    block = positions // block_length
    for place in range(LENGTH):
        (both,) = torch.autograd.grad(logits[0, place, 4:].square().sum(), embedded, retain_graph=True)
        noisy, clean = both.chunk(2, dim=1)
        same = document == document[place]
        reached = noisy[0].norm(dim=-1) > 0
        assert torch.equal(reached, same & (block == block[place]))
        assert torch.equal(clean[0].norm(dim=-1) > 0, same & (block < block[place]))


@torch.no_grad()
@pytest.mark.parametrize("block_length", [1, 4, 7])
def test_documents_do_not_see_each_other(block_length):
    model, inputs = build(), packing((6, 14))
    clean, noisy = CLEAN.clone(), NOISY.clone()
    clean[:, :6], noisy[:, :6] = 4 + (clean[:, :6] + 1) % 57, MASK
    one = model(NOISY, clean_input_ids=CLEAN, block_length=block_length, **inputs).logits[:, 6:]
    other = model(noisy, clean_input_ids=clean, block_length=block_length, **inputs).logits[:, 6:]
    assert torch.equal(one, other)


@torch.no_grad()
def test_a_cut_on_the_packed_row_needs_no_positions():
    """Positions that run over the row move the blocks; documents still stay apart."""
    model, inputs = build(), packing((6, 14))
    inputs.pop("position_ids")
    logits = model(NOISY, clean_input_ids=CLEAN, block_length=4, **inputs).logits[:, 6:, 4:]
    positions = torch.arange(6, 20)[None]
    alone = {"position_ids": positions, "clean_input_ids": CLEAN[:, 6:], "block_length": 4}
    torch.testing.assert_close(logits, model(NOISY[:, 6:], **alone).logits[..., 4:])
    clean, noisy = CLEAN.clone(), NOISY.clone()
    clean[:, :6], noisy[:, :6] = 4 + (clean[:, :6] + 1) % 57, MASK
    assert torch.equal(model(noisy, clean_input_ids=clean, block_length=4, **inputs).logits[:, 6:, 4:], logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, padding = build(), 3
    tokens = slice(padding, None) if side == "left" else slice(None, -padding)
    attention_mask = torch.zeros_like(CLEAN)
    attention_mask[:, tokens] = 1
    padded = model(NOISY, clean_input_ids=CLEAN, block_length=4, attention_mask=attention_mask).logits[:, tokens, 4:]
    alone = model(NOISY[:, tokens], clean_input_ids=CLEAN[:, tokens], block_length=4).logits[..., 4:]
    torch.testing.assert_close(padded, alone)


@torch.no_grad()
@pytest.mark.parametrize("block_length", [1, 4, 7])
def test_without_noise_it_is_the_block_causal_forward(block_length):
    model = build()
    halves = model(CLEAN, clean_input_ids=CLEAN, block_length=block_length).logits
    torch.testing.assert_close(halves, model(CLEAN, block_length=block_length).logits)


@torch.no_grad()
@pytest.mark.parametrize("block_length", [0, LENGTH, 100])
def test_a_block_that_covers_the_row_has_no_clean_half(block_length, monkeypatch):
    model = build(block_length=4)  # what the call says counts
    lengths = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    logits = model(NOISY, clean_input_ids=CLEAN, block_length=block_length).logits
    assert lengths == [LENGTH]
    assert torch.equal(logits, model(NOISY, block_length=0).logits)
    torch.testing.assert_close(logits, build()(NOISY).logits)


@torch.no_grad()
@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
def test_eager_attention_agrees(documents):
    model = build().float()
    inputs = {"clean_input_ids": CLEAN, "block_length": 4, **packing(documents)}
    expected = model(NOISY, **inputs).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(NOISY, **inputs).logits, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
def test_flex_mask_is_the_dense_one(documents, padded, monkeypatch):
    """The mask alone, not compiled: torch's CPU compiler fails on the mask of packed rows."""
    create = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **kw: create(**{**kw, "_compile": False}))
    config, inputs = build().config, packing(documents)
    inputs |= {"is_causal": False, "block_length": 4, "clean_half": True}
    if padded:
        inputs["attention_mask"] = (torch.arange(LENGTH) < 17).long().expand(2, -1)
    embeds = torch.zeros(2, 2 * LENGTH, 32)
    dense = attention_nanollada.create_attention_mask(config, embeds, **inputs)
    config._attn_implementation = "flex_attention"
    block_mask = attention_nanollada.create_attention_mask(config, embeds, **inputs)
    flex = create_mask(block_mask.mask_mod, 2, 1, 2 * LENGTH, 2 * LENGTH, "cpu")
    queries = torch.ones(2 * LENGTH, dtype=torch.bool)
    if padded:  # what a padded query sees is nobody's business
        queries = torch.arange(2 * LENGTH) % LENGTH < 17
    assert torch.equal(flex[:, :, queries], dense[:, :, queries])


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_agrees():
    model = build(head_dim=16).float()
    inputs = {"clean_input_ids": CLEAN, "block_length": 4}
    expected = model(NOISY, **inputs).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(NOISY, **inputs).logits, expected, atol=2e-6, rtol=1e-5)


def test_flash_attention_is_refused(monkeypatch):
    config = build().config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="must be 'sdpa', 'eager' or 'flex_attention'.*got 'flash_attention_2'"):
        attention_nanollada.create_attention_mask(
            config, torch.zeros(1, 2 * LENGTH, 32), is_causal=False, block_length=4, clean_half=True
        )


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="`clean_input_ids` are for block diffusion.*got an AR"):
        build(NanoLLaDAForCausalLM).model(NOISY, clean_input_ids=CLEAN)
    with pytest.raises(ValueError, match=r"must have the shape of the noisy ids, got \(2, 19\) and \(2, 20\)"):
        build()(NOISY, clean_input_ids=CLEAN[:, 1:], block_length=4)
    with pytest.raises(ValueError, match="must come without a cache, got one"):
        build()(NOISY, clean_input_ids=CLEAN, block_length=4, use_cache=True)


@pytest.mark.parametrize("block_length", [0, 4])
@pytest.mark.parametrize("num_items", [None, 17])
def test_weighted_loss_is_that_of_the_logits(block_length, num_items):
    model = build()
    weights = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) * (NOISY == MASK)
    labels = CLEAN.masked_fill(torch.arange(LENGTH) < 3, -100)
    inputs = {"clean_input_ids": CLEAN, "block_length": block_length}
    output = model(NOISY, labels=labels, loss_weights=weights, num_items_in_batch=num_items, **inputs)
    assert output.logits is None
    losses = torch.nn.functional.cross_entropy(
        model(NOISY, **inputs).logits.transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    expected = (losses * weights)[:, 3:].sum() / (num_items or 2 * (LENGTH - 3))
    torch.testing.assert_close(output.loss, expected)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    for one, other in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other)


def test_causal_weighted_loss_shifts_its_labels():
    model = build(NanoLLaDAForCausalLM)
    weights = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)).double()
    output = model(CLEAN, labels=CLEAN, loss_weights=weights, num_items_in_batch=7)
    losses = torch.nn.functional.cross_entropy(
        model(CLEAN).logits[:, :-1].transpose(1, 2), CLEAN[:, 1:], reduction="none"
    )
    torch.testing.assert_close(output.loss, (losses * weights[:, 1:]).sum() / 7)
    plain = model(CLEAN, labels=CLEAN, loss_weights=torch.ones_like(weights), num_items_in_batch=38).loss
    torch.testing.assert_close(plain, model(CLEAN, labels=CLEAN).loss.double())


def test_an_adapted_head_is_not_bypassed():
    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.scale = base, torch.nn.Parameter(torch.full((), 2.0).double())

        def forward(self, hidden_states):
            return self.base(hidden_states) * self.scale

    model = build()
    labels, weights = CLEAN, (NOISY == MASK).double()
    plain = model(NOISY, labels=labels, loss_weights=weights).loss
    model.lm_head = Adapted(model.lm_head)
    adapted = model(NOISY, labels=labels, loss_weights=weights).loss
    assert (adapted - plain).abs() > 1e-3
    adapted.backward()
    assert model.lm_head.scale.grad.abs() > 0


def test_loss_weights_need_labels():
    for model in (build(), build(NanoLLaDAForCausalLM)):
        with pytest.raises(ValueError, match="`loss_weights` weigh `labels`, which must be given, got None"):
            model(NOISY, loss_weights=torch.ones(2, LENGTH))


@torch.no_grad()
def test_embedding_noise_moves_the_noisy_half_alone():
    model = build()
    noise = torch.zeros(2, LENGTH, 32).double()
    inputs = {"clean_input_ids": CLEAN, "block_length": 4}
    plain = model(NOISY, **inputs).logits
    with noisy_embeddings(model, noise):
        assert torch.equal(model(NOISY, **inputs).logits, plain)
        noise[:, 5] = 1.0
        moved = (model(NOISY, **inputs).logits - plain)[..., 4:].abs().amax(-1) > 0
    assert torch.equal(moved, (torch.arange(LENGTH) // 4 == 1).expand(2, -1))
    assert torch.equal(model(NOISY, **inputs).logits, plain)  # and nothing stays behind


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_taken_as_it_is():
    """Here one that hides nothing, so that the clean half sees the noisy one; it need not have a row per query."""
    model = build().float()
    inputs = {"clean_input_ids": CLEAN, "block_length": 4}
    visible = torch.ones(1, 1, 1, 2 * LENGTH, dtype=torch.bool)
    logits = model(NOISY, attention_mask=visible, **inputs).logits
    model.set_attn_implementation("eager")
    expected = model(NOISY, attention_mask=torch.zeros(1, 1, 1, 2 * LENGTH), **inputs).logits
    torch.testing.assert_close(logits, expected, atol=2e-6, rtol=1e-5)
