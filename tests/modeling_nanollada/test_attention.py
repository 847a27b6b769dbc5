"""Attention masks: documents and blocks, by what can and cannot be seen."""

import pytest
import torch

from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM

IDS = torch.randint(4, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def build(model_class=NanoLLaDAForMaskedLM, **overrides):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return model_class(NanoLLaDAConfig(num_attention_heads=2, **shape, **overrides)).double().eval()


def sees(model, **inputs):
    """`[L, L]` bool: whether the logits at q move when the token at k changes."""
    length = IDS.shape[1]
    base = model(IDS, **inputs).logits[0, :, 4:]
    rows = []
    for place in range(length):
        changed = IDS.clone()
        changed[0, place] = 4 + (changed[0, place] + 1) % 57
        rows.append((model(changed, **inputs).logits[0, :, 4:] - base).abs().amax(-1) > 0)
    return torch.stack(rows, 1)


def rule(causal=False, block_length=12, documents=(12,)):
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)])
    position = torch.cat([torch.arange(n) for n in documents])
    block = torch.arange(12) if causal else position // block_length
    return (document[:, None] == document) & (block[:, None] >= block)


@torch.no_grad()
@pytest.mark.parametrize("block_length", [1, 3, 5, 12, 100])
@pytest.mark.parametrize("documents", [(12,), (4, 8), (1, 6, 5)])
def test_block_causal_inside_documents(block_length, documents):
    inputs = {
        "document_ids": torch.cat([torch.full((n,), i) for i, n in enumerate(documents)])[None].expand(2, -1),
        "position_ids": torch.cat([torch.arange(n) for n in documents])[None].expand(2, -1),
    }
    expected = rule(block_length=block_length, documents=documents)
    assert torch.equal(sees(build(), block_length=block_length, **inputs), expected)
    assert torch.equal(sees(build(NanoLLaDAForCausalLM), **inputs), rule(causal=True, documents=documents))


@torch.no_grad()
def test_config_block_length_is_the_default():
    model = build(block_length=4)
    assert torch.equal(sees(model), rule(block_length=4))
    assert torch.equal(sees(model, block_length=12), rule())
    torch.testing.assert_close(model(IDS, block_length=4).logits, model(IDS).logits)


@torch.no_grad()
def test_blocks_of_a_left_padded_row_are_cut_by_position():
    model = build(block_length=4)
    padding = torch.ones_like(IDS)
    padding[0, :3] = 0
    torch.testing.assert_close(model(IDS, attention_mask=padding).logits[0, 3:], model(IDS[:1, 3:]).logits[0])


@torch.no_grad()
def test_packed_documents_equal_documents_alone():
    model = build()
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2)
    positions = torch.tensor([[*range(5), *range(7)]] * 2)
    packed = model(IDS, document_ids=documents, position_ids=positions).logits
    torch.testing.assert_close(packed[:, :5], model(IDS[:, :5]).logits)
    torch.testing.assert_close(packed[:, 5:], model(IDS[:, 5:]).logits)


@torch.no_grad()
def test_block_one_is_causal():
    masked, causal = build(), build(NanoLLaDAForCausalLM)
    torch.testing.assert_close(masked(IDS, block_length=1).logits[..., 4:], causal(IDS).logits[..., 4:])


@torch.no_grad()
def test_a_row_that_is_all_padding_gives_numbers():
    padding = torch.ones_like(IDS)
    padding[0] = 0
    documents = torch.where(padding == 1, 0, -1)
    logits = build()(IDS, attention_mask=padding, document_ids=documents).logits
    assert torch.isfinite(logits[..., 4:]).all()
