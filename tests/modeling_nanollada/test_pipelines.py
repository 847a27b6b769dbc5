"""transformers' pipelines on checkpoints: text-generation for both models, fill-mask for the diffusion model.

What text-generation does with the diffusion model's settings is in `test_generation_conventions.py`.
"""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.trainers.models import config_for

CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM, "block": NanoLLaDAForMaskedLM}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, (name, model_class) in enumerate(CLASSES.items()):
        torch.manual_seed(seed)
        block_length = 4 if name == "block" else None
        config = config_for(tokenizer, **SHAPE, block_length=block_length, initializer_range=0.5)
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_text_generation(folder, name):
    """From a folder alone: the class is the checkpoint's, the tokens are `generate`'s, a batch is its rows."""
    pipe = pipeline("text-generation", model=str(folder / name), device="cpu")
    assert type(pipe.model) is CLASSES[name]
    prompts, run = ["The cat sat on", "The dog", "今天天气"], {"max_new_tokens": 8, "do_sample": False}
    texts = [pipe(prompt, **run)[0]["generated_text"] for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = pipe.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        out = pipe.model.generate(ids, attention_mask=torch.ones_like(ids), **run)[0]
        assert text.startswith(prompt) and text == pipe.tokenizer.decode(out, skip_special_tokens=True)
    pipe.tokenizer.padding_side = "left"
    assert [rows[0]["generated_text"] for rows in pipe(prompts, batch_size=3, **run)] == texts
    (new,) = pipe(prompts[0], return_full_text=False, **run)
    assert prompts[0] + new["generated_text"] == texts[0]
    chat = [{"role": "user", "content": "What is it?"}]
    ((answered,),) = [pipe(chat, **run)]
    assert [message["role"] for message in answered["generated_text"]] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["diffusion", "block"])
def test_fill_mask(folder, name):
    """The scores are the model's probabilities in the mask's place, among which the mask token never is."""
    pipe = pipeline("fill-mask", model=str(folder / name), device="cpu")
    assert type(pipe.model) is NanoLLaDAForMaskedLM and pipe.tokenizer.mask_token == "<|mask|>"
    text = "The <|mask|> sat on the mat."
    found = pipe(text, top_k=299)
    ids = AutoTokenizer.from_pretrained(folder / name)(text, return_tensors="pt").input_ids
    (place,) = (ids[0] == pipe.tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    with torch.no_grad():
        expected = pipe.model(ids).logits[0, place].softmax(-1)
    assert len({option["token"] for option in found}) == 299 == len(pipe.tokenizer) - 1
    for option in found:
        assert option["score"] == pytest.approx(expected[option["token"]].item(), rel=1e-4)
    assert pipe.tokenizer.mask_token_id not in {option["token"] for option in found}
    assert sum(option["score"] for option in found) == pytest.approx(1.0, abs=1e-4)
    assert found[0]["sequence"] == text.replace("<|mask|>", found[0]["token_str"])
    both = pipe("The <|mask|> sat on the <|mask|>.", top_k=2)
    assert [len(options) for options in both] == [2, 2]
    only = pipe(text, targets=["The", "at"])
    assert {option["token_str"] for option in only} == {"The", "at"}
