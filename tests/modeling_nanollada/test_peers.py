"""Inside other people's tools: lm-eval's `generate_until`, PEFT, a compiled backbone decode what `generate` does."""

import pytest
import torch
from generation_models import EOS, PAD, VOCABULARY, build, seeded
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from nanollada.modeling_nanollada import NanoLLaDAForMaskedLM
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [None, 4])
def test_lm_eval_generates_until(tokenizer, tmp_path, block_length):
    """Its `hf` model on a checkpoint, rows of different lengths: our own answers, cut where it cuts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    config = config_for(tokenizer, **SHAPE, block_length=block_length, initializer_range=0.3)
    NanoLLaDAForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["The cat sat on", "The dog", "今天天气"]
    wanted = {"until": ["a"], "max_gen_toks": 12, "do_sample": False, "threshold": 0.5}
    peer = HFLM(pretrained=str(tmp_path), trust_remote_code=True, device="cpu", batch_size=2)
    requests = [Instance("generate_until", {}, (text, dict(wanted)), 0) for text in prompts]
    answers = peer.generate_until(requests, disable_tqdm=True)

    model = NanoLLaDAForMaskedLM.from_pretrained(tmp_path).eval()
    own = AutoTokenizer.from_pretrained(tmp_path)
    for text, answer in zip(prompts, answers, strict=True):
        ids = own(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, max_new_tokens=12, threshold=0.5)[0, ids.shape[1] :]
        assert answer == own.decode(out, skip_special_tokens=True).split("a")[0]
    assert any(answers)


def test_peft_wrapped():
    """An adapter that changes nothing decodes the same; one that does decodes with its weights."""
    plain = build(1, num_hidden_layers=2, block_length=4)
    prompt = torch.randint(4, VOCABULARY, (2, 6), generator=seeded(0))
    run = {"max_new_tokens": 8, "threshold": 0.3, "eos_token_id": EOS, "pad_token_id": PAD}
    expected = plain.generate(input_ids=prompt, **run)
    wrapped = get_peft_model(plain, LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).eval()
    assert torch.equal(wrapped.generate(input_ids=prompt, **run), expected)
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=1.0, generator=seeded(2))
    changed = wrapped.generate(input_ids=prompt, **run)
    assert not torch.equal(changed, expected)
    assert torch.equal(wrapped.merge_and_unload().generate(input_ids=prompt, **run), changed)


@pytest.mark.slow
def test_a_compiled_backbone():
    """With a static cache the shapes are few: one graph for windows, one for windows behind a new block, one first."""
    import torch._dynamo

    torch._dynamo.reset()
    model = build(1, num_hidden_layers=2, block_length=4).float()
    prompt = torch.randint(4, VOCABULARY, (1, 6), generator=seeded(0))
    run = {"max_new_tokens": 30, "eos_token_id": EOS, "eos_policy": "forbid", "cache_implementation": "static"}
    expected = model.generate(prompt, **run)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.model.forward = torch.compile(model.model.forward)
    assert torch.equal(model.generate(prompt, **run), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert 1 <= graphs <= 4
    assert torch.equal(model.generate(prompt, **run), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == graphs
