"""One process of `benchmark.py generate`: a model, a way of decoding it, and what that took or was worth."""

import itertools
import json
import time

from nanollada.scripts.benchmarks.machine import device_name, peak_memory, synchronize
from nanollada.scripts.benchmarks.training_run import SIZES

DECODERS = {
    "llada": None,
    "llada/2": None,
    "ar": None,
    "quota": {},
    "quota, no cache": {"use_cache": False},
    "2 a step": {"tokens_per_step": 2},
    "4 a step": {"tokens_per_step": 4},
    "8 a step": {"tokens_per_step": 8},
    "threshold 0.5": {"threshold": 0.5},
    "threshold 0.7": {"threshold": 0.7},
    "threshold 0.9": {"threshold": 0.9},
    "hierarchical": {"threshold": 0.9, "low_threshold": 0.4},
    "klass": {"threshold": 0.9, "kl_threshold": 0.01},
    "factor 1": {"factor": 1.0},
    "entropy bound 0.5": {"entropy_bound": 0.5},
    "prefix": {"approximate_cache": "prefix"},
    "dual": {"approximate_cache": "dual"},
    "dual, threshold 0.9": {"approximate_cache": "dual", "threshold": 0.9},
}
PLAIN = ("llada", "llada/2", "ar")


def decoder_settings(name: str) -> dict | None:
    """The settings of a decoder: a name of `DECODERS`, or JSON. `None` for the plain ones."""
    if name in DECODERS:
        return DECODERS[name]
    try:
        settings = json.loads(name)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"`decoders` must be among {', '.join(DECODERS)}, or settings as JSON, got {name!r}")
    return settings


def load(model: str | None, size: str, block_length: int, seed: int, causal: bool):
    """A checkpoint with its tokenizer, or random weights without one."""
    import torch

    from nanollada.modeling_nanollada import NanoLLaDAConfig, NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
    from nanollada.scripts.decoding.checkpoint import load_checkpoint

    if model is not None:
        return load_checkpoint(model)
    torch.manual_seed(seed)
    config = NanoLLaDAConfig(**SIZES[size], block_length=None if causal else block_length or None)
    built = (NanoLLaDAForCausalLM if causal else NanoLLaDAForMaskedLM)(config)
    return built.to(device_name()).eval(), None


def prompts(tokenizer, data: str | None, rows: int, length: int, vocab_size: int, seed: int):
    """`input_ids` and `attention_mask`, left-padded: questions, or texts of `length` tokens."""
    import torch

    if tokenizer is None or data is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(8, vocab_size, (rows, length or 16), generator=generator)
        return ids, torch.ones_like(ids)
    texts = [list(question) + list(answer) * bool(length) for question, answer in questions(tokenizer, data)]
    if length:
        stream = list(itertools.chain.from_iterable(texts))
        stream *= -(-(rows * length) // len(stream))
        texts = [stream[row * length : (row + 1) * length] for row in range(rows)]
    texts = [texts[row % len(texts)] for row in range(rows)]
    width = max(map(len, texts))
    ids = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in texts]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in texts])


def questions(tokenizer, data: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids of the rows."""
    from nanollada.scripts.evaluation.answers import questions_of

    return questions_of(tokenizer, _rows(data))


def _rows(data: str):
    from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_source

    return read_examples(resolve_source(data, SourceArguments()), RowPolicy("stop"))


def measure(
    decoder: str,
    model: str | None,
    *,
    size: str,
    model_block_length: int,
    data: str | None,
    prompt_length: int,
    new_tokens: int,
    batch_size: int,
    block_length: int | None,
    calls: int,
    threads: int | None,
    seed: int,
) -> dict:
    """
    Decodes `calls` times after one warm-up call.

    Returns:
        `dict`: `seconds` of each call, `tokens` (new ones, all rows), `tokens_per_forward`, `peak_bytes`,
            `prompt_tokens`, and `parameters` (those of layers and head) with the shape, for the FLOPs.
    """
    import torch

    from nanollada.scripts.decoding.settings import default_decoding

    if threads:
        torch.set_num_threads(threads)
    device = device_name()
    network, tokenizer = load(model, size, model_block_length, seed, decoder == "ar")
    config = network.config
    ids, mask = prompts(tokenizer, data, batch_size, prompt_length, config.vocab_size, seed)
    ids, mask = ids.to(device), mask.to(device)
    with default_decoding(network):  # a decoder is what its settings say, whatever the checkpoint's own are
        decode = decoder_of(decoder, network, new_tokens, block_length)
        decoded, seconds = decode(ids, mask), []
        for _ in range(calls):
            synchronize(device)
            start = time.perf_counter()
            decoded = decode(ids, mask)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    layers = sum(value.numel() for name, value in network.named_parameters() if "embed_tokens" not in name)
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return {
        "seconds": seconds,
        "tokens": new_tokens * batch_size,
        "tokens_per_forward": decoded[1],
        "peak_bytes": peak_memory(device),
        "prompt_tokens": ids.shape[1],
        "parameters": layers + tied,
        "attention_width": width,
        "block_length": config.block_length,
    }


def decoder_of(name: str, network, new_tokens: int, block_length: int | None):
    """A function of ids and mask that returns the whole rows and the new tokens per forward pass."""
    if name == "ar":
        return lambda ids, mask: (ar_tokens(network, ids, mask, new_tokens), 1.0)
    if name in PLAIN:
        per_step = 2 if name == "llada/2" else 1
        return lambda ids, mask: (plain_llada(network, ids, mask, new_tokens, block_length, per_step), float(per_step))
    settings = generate_settings(decoder_settings(name), network.config, new_tokens, block_length)

    def decode(ids, mask):
        output = network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            temperature=0.0,
            eos_policy="forbid",
            return_dict_in_generate=True,
            **no_eos(network),
            **settings,
        )
        return output.sequences, float(output.tokens_per_forward.mean())

    return decode


def generate_settings(settings: dict, config, new_tokens: int, block_length: int | None) -> dict:
    """A decoder's settings for `generate`; `tokens_per_step` becomes `steps` of a block."""
    settings = dict(settings)
    if block_length is not None:
        settings.setdefault("block_length", block_length)
    per_step = settings.pop("tokens_per_step", None)
    if per_step is not None:
        size = settings.get("block_length") or config.block_length or new_tokens
        settings["steps"] = -(-size // per_step)
    return settings


def no_eos(network) -> dict:
    """An EOS to forbid and a pad token, for models whose generation config has none."""
    own = network.generation_config
    eos = network.config.vocab_size - 1 if own.eos_token_id is None else own.eos_token_id
    return {"eos_token_id": eos, "pad_token_id": own.pad_token_id or 0}


def ar_tokens(network, ids, mask, new_tokens: int):
    """transformers' greedy `generate` with its cache; it can't stop early."""
    return network.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **no_eos(network),
    )


def plain_llada(network, ids, mask, new_tokens: int, block_length: int | None, per_step: int):
    """
    LLaDA's sampler at temperature 0 (arXiv 2502.09992, appendix B.4), as its authors publish it: the whole canvas and
    all logits in every step, block by block, the most certain tokens first. EOS is forbidden.
    """
    import torch

    mask_id, size = network.config.mask_token_id, block_length or network.config.block_length or new_tokens
    never = torch.tensor(no_eos(network)["eos_token_id"], device=ids.device).flatten()
    canvas = torch.nn.functional.pad(ids, (0, new_tokens), value=mask_id)  # [B, L]
    visible = torch.nn.functional.pad(mask, (0, new_tokens), value=1)
    with torch.no_grad():
        for begin in range(ids.shape[1], canvas.shape[1], size):
            end = min(begin + size, canvas.shape[1])
            while bool((canvas[:, begin:end] == mask_id).any()):
                logits = network(canvas, attention_mask=visible).logits.float()  # [B, L, V]
                logits[..., never] = -torch.inf
                confidence, tokens = logits.softmax(-1, dtype=torch.double).max(-1)
                confidence[canvas != mask_id] = -torch.inf
                confidence[:, end:] = -torch.inf
                count = min(per_step, int((canvas[0, begin:end] == mask_id).sum()))
                chosen = confidence.topk(count, dim=1).indices
                canvas.scatter_(1, chosen, tokens.gather(1, chosen))
    return canvas


def score(
    decoder: str,
    model: str,
    *,
    data: str,
    rows: int,
    batch_size: int,
    block_length: int | None,
    threads: int | None,
    new_tokens: int = 0,
) -> dict:
    """
    Exact match with the normal EOS: `value`, `standard_error`, `interval`, `rows`, `truncated`, and the answers'
    `new_tokens` (0: as many as the longest needs). LLaDA's loops decode as a quota does.
    """
    import torch

    from nanollada.scripts.decoding.checkpoint import load_checkpoint
    from nanollada.scripts.decoding.settings import default_decoding
    from nanollada.scripts.evaluation.answers import exact_match

    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = load_checkpoint(model)
    settings = {"llada": {"use_cache": False}, "llada/2": {"use_cache": False, "tokens_per_step": 2}, "ar": {}}
    settings = settings[decoder] if decoder in PLAIN else decoder_settings(decoder)
    answers = [answer for _, answer in itertools.islice(questions(tokenizer, data), rows)]
    new_tokens = new_tokens or max(map(len, answers))
    if decoder != "ar":
        settings = generate_settings(settings, network.config, new_tokens, block_length)
    settings["max_new_tokens"] = new_tokens
    asked = list(itertools.islice(_rows(data), rows))
    with default_decoding(network):
        record = exact_match(network, tokenizer, asked, batch_size=batch_size, **settings)
    kept = {name: record[name] for name in ("value", "standard_error", "interval", "rows", "truncated")}
    return {**kept, "new_tokens": record["settings"]["max_new_tokens"]}
