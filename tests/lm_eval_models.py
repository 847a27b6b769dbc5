"""What the tests of the model for lm-eval share: small checkpoints, and the numbers that key their masks."""

import torch
from generation_models import reference_greedy
from lm_eval.api.instance import Instance

from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
from nanollada.scripts.evaluation.lm_eval_model import NanoLLaDALM
from nanollada.trainers.models import config_for

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSES = {"ar": NanoLLaDAForCausalLM, "diffusion": NanoLLaDAForMaskedLM, "block": NanoLLaDAForMaskedLM}
TEXTS = ["The cat sat on the mat. The dog sat on the log.", "", "今天天气很好,我们去公园散步。", "print(add(1, 2))\n"]


def save_checkpoints(tokenizer, folder):
    """A checkpoint of each kind, random weights with opinions."""
    for seed, (name, model_class) in enumerate(CLASSES.items()):
        torch.manual_seed(seed)
        block_length = 4 if name == "block" else None
        config = config_for(
            tokenizer, **SHAPE, block_length=block_length, max_position_embeddings=64, initializer_range=0.5
        )
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def load(folder, name, **options):
    return NanoLLaDALM(str(folder / name), **{"dtype": "float64", "device": "cpu", "samples": 64, **options})


def requests(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def number(row, choice=0, part=0):
    """What keys the masks of a task's row: the same whatever else is asked, and in whatever order."""
    return (row * 2**16 + choice) * 2**16 + part


def written(model, context, count):
    """The continuation that a plain loop decodes, in token ids."""
    if isinstance(model, NanoLLaDAForMaskedLM):
        return reference_greedy(model, context, count)[len(context) :]
    ids = list(context)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]
