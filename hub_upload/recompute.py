"""Greedy decoding again, written without `generate`: what verify.py compares it with, and golden tokens are made of.
And the model under an adapter: its name, its folder, and a process without a network that finds it by that name.

Every exported folder carries this file beside verify.py. Above its functions it imports the standard library only.
"""

import hashlib
import itertools
import json
import math
import os
import re
import warnings
from pathlib import Path

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
GOLDEN = "golden.json"
TIE = 1e-3  # nats: between choices that lie closer, rounding may decide, and what comes after is another text
NEW_TOKENS = 16  # of each run
TOLERANCE = 1e-5
EDITS = ("delete", "insert")
SUPPRESSED = -1e4  # a logit below is a token that can't be, be it −∞ or a finite floor


def runs_to_check(config) -> list[dict]:
    """
    Prompts (ids of text, of three lengths, over the borders of blocks) under each of the settings that are recomputed:
    for diffusion one token a step, three steps a block, and thresholds for models of weak and of strong opinions.
    """
    never = {config.pad_token_id, *never_left(config), *_eos_ids(config)}
    tokens = [token for token in range(config.vocab_size) if token not in never]
    grid, limit = config.block_length, config.max_position_embeddings
    new, size = min(NEW_TOKENS, limit // 2), min(grid or 4, 64)
    lengths = [min(length, limit - new) for length in (3, size + 5, max(2 * size - 4, 2))]
    kinds = [{}]
    if "MaskedLM" in config.architectures[0]:
        block = {} if grid or new % 2 else {"block_length": new // 2}
        kinds = [block, {**block, "steps": 3}, {**block, "threshold": 0.1}, {**block, "threshold": 0.8}]
    starts = list(itertools.accumulate(lengths, initial=1))
    prompts = [
        [tokens[(13 + 7919 * place) % len(tokens)] for place in range(start, start + length)]
        for start, length in zip(starts, lengths, strict=False)
    ]
    return [{"prompt": prompt, "settings": {"new_tokens": new, **kind}} for kind in kinds for prompt in prompts]


def never_left(config) -> list[int]:
    """The mask token, `<|delete|>` and `<|insert|>`: what a generated row must not hold."""
    ids = [getattr(config, f"{kind}_token_id", None) for kind in ("mask", *EDITS)]
    return [token for token in ids if token is not None]


def check_tokenizer(config, tokenizer) -> None:
    """
    Raises:
        `ValueError`: for a tokenizer of another size, or with other special tokens, than the config names.
    """
    name = "vocab_size" if getattr(config, "tokenizer_length", None) is None else "tokenizer_length"
    added, numbers = tokenizer.get_added_vocab(), {name: len(tokenizer)}
    numbers |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "eos", "mask")}
    if getattr(config, "delete_token_id", None) is not None:
        numbers |= {f"{kind}_token_id": added.get(f"<|{kind}|>") for kind in EDITS}
    for name, theirs in numbers.items():
        if (ours := getattr(config, name)) != theirs:
            raise ValueError(f"`{name}` must be the tokenizer's {theirs}, got {ours}")


def _eos_ids(config) -> list[int]:
    eos = config.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]


def recompute(model, prompt: list[int], *, new_tokens: int, block_length=None, steps=None, threshold=None) -> dict:
    """
    Greedy decoding in plain loops over `model(input_ids=row)`: no cache, no batch, no padding, nothing of `generate`.

    An autoregressive model appends its likeliest token. A diffusion model gets masks, and block by block, left to
    right, commits the positions whose likeliest token is most probable: equal shares of the block's masks in `steps`
    (default: one a step), and all above `threshold` (LLaDA, arXiv 2502.09992). Mask token and EOS are never chosen.

    Returns:
        `dict`: the new `tokens`; `steps`, the forward that decided each; `margins`, by how many nats each forward's
            choices beat the next best ones.
    """
    import torch

    config, grid = model.config, model.config.block_length
    never = [config.mask_token_id, *_eos_ids(config), *(model.generation_config.suppress_tokens or [])]

    def read(row):  # the two best log-probabilities of each position, and the best tokens
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].float()  # [L, V]
        logits[:, never] = -torch.inf
        best = logits.log_softmax(-1).topk(2)
        return best.values.tolist(), best.indices[:, 0].tolist()

    row, start, decided, margins = list(prompt), len(prompt), {}, []
    if not model.is_diffusion:
        for step in range(new_tokens):
            scores, tokens = read(row)
            row.append(tokens[-1])
            margins.append(scores[-1][0] - scores[-1][1])
            decided[start + step] = step
        return {"tokens": row[start:], "steps": list(decided.values()), "margins": margins}
    end, size = start + new_tokens, block_length or grid or new_tokens
    width = end if grid is None else -(-end // grid) * grid  # the last block is seen whole, as in training
    row += [config.mask_token_id] * (width - start)
    for _, block in itertools.groupby(range(start, end), lambda place: (place - (0 if grid else start)) // size):
        left = list(block)
        masks, number = len(left), min(steps or len(left), len(left))
        for step in itertools.count():
            if not left:
                break
            scores, tokens = read(row)
            chosen, margin = _choose(left, scores, masks // number + (step < masks % number), threshold)
            for place in chosen:
                row[place], decided[place] = tokens[place], len(margins)
                left.remove(place)
            margins.append(margin)
    return {"tokens": row[start:end], "steps": [decided[place] for place in range(start, end)], "margins": margins}


def _choose(
    left: list[int], scores: list[list[float]], quota: int, threshold: float | None
) -> tuple[list[int], float]:
    """The positions to commit, and how clear that and their tokens are, in nats."""
    ranked = sorted(left, key=lambda place: (-scores[place][0], place))
    cut = math.inf if threshold is None else math.log(threshold)
    count = max(quota, sum(scores[place][0] > cut for place in left))
    clear = [scores[place][0] - scores[place][1] for place in ranked[:count]]
    clear += [abs(scores[place][0] - cut) for place in ranked[quota:]]
    if count == quota < len(ranked):
        clear.append(scores[ranked[quota - 1]][0] - scores[ranked[quota]][0])
    return ranked[:count], min(clear)


def compare_tokens(expected: dict, tokens: list[int], what: str) -> int:
    """
    Compares new tokens with a recomputation, up to its first tie.

    Returns:
        `int`: How many were compared: all where all agree, else those decided before the tie that parts the texts.

    Raises:
        `ValueError`: naming the first token that differs.
    """
    if tokens == expected["tokens"]:
        return len(tokens)
    if len(tokens) != len(expected["tokens"]):
        raise ValueError(f"{what}, got {len(tokens)} for {len(expected['tokens'])} tokens")
    tie = next((step for step, margin in enumerate(expected["margins"]) if margin < TIE), math.inf)
    compared = [place for place, step in enumerate(expected["steps"]) if step < tie]
    for place in compared:
        mine, other = tokens[place], expected["tokens"][place]
        if mine != other:
            raise ValueError(f"{what}, got {mine} for {other} as new token {place + 1} of {len(tokens)}")
    return len(compared)


def read_golden(folder: Path) -> dict | None:
    """
    The golden tokens: `runs`, each a `prompt`, its `settings` and what `recompute` gave; the `versions` that made
    them; and `sha256` of the weights. `None` in a folder that has none, as those exported by older versions.

    Raises:
        `ValueError`: for a file that can't be read, that holds no runs, or that is of other weights.
    """
    path = folder / GOLDEN
    if not path.is_file():
        return None
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        digests, runs = dict(golden["sha256"]), golden["runs"]
        complete = bool(runs) and all(len(run["tokens"]) == len(run["steps"]) > 0 and run["margins"] for run in runs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{GOLDEN} must hold `sha256` and `runs`, got {type(error).__name__}: {error}") from error
    if not complete:
        raise ValueError(f"{GOLDEN} must hold `runs` with `tokens`, `steps` and `margins`, got {len(runs)} runs")
    there = {}
    for weights in folder.glob("*.safetensors"):
        with open(weights, "rb") as stream:
            there[weights.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if odd := sorted(name for name in {**digests, **there} if digests.get(name) != there.get(name)):
        others = ", ".join(odd)
        raise ValueError(f"{GOLDEN} must be of the weights beside it, got those of another {others} (export again)")
    return golden


def generate(model, prompts: list[list[int]], use_cache: bool, *, new_tokens: int, **settings) -> list[list[int]]:
    """The new tokens of `model.generate`, greedy, without an EOS, for prompts padded on the left to one length."""
    import torch

    shipped, width = model.generation_config, max(map(len, prompts))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
    model.generation_config = type(shipped)(**{name: getattr(shipped, name, None) for name in names})
    no_eos = {"eos_policy": "forbid"} if model.is_diffusion else {"min_new_tokens": new_tokens}
    ids = [[model.config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(visible)}
    options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": use_cache, **no_eos, **settings}
    try:
        return model.generate(**tensors, **options)[:, width:].tolist()
    finally:
        model.generation_config = shipped


class Recomputation:
    """
    The checks of one model, in float32 on the CPU. `versions` (`str`) is what their messages name.

    Both return `[compared, all]`, numbers of tokens, and raise `ValueError` as `compare_tokens`.
    """

    def __init__(self, model, versions: str):
        self.model, self.versions, self.known = model, versions, {}

    def of(self, prompt: list[int], settings: dict) -> dict:
        key = json.dumps([prompt, settings], sort_keys=True)
        if key not in self.known:
            self.known[key] = recompute(self.model, prompt, **settings)
        return self.known[key]

    def check_generate(self) -> list[int]:
        """`generate` with its cache, of each prompt alone and of all together, and once without."""
        counts = [0, 0]
        for settings, runs in itertools.groupby(runs_to_check(self.model.config), lambda run: run["settings"]):
            prompts = [run["prompt"] for run in runs]
            for batch, use_cache in (*(([prompt], True) for prompt in prompts), (prompts, True), (prompts, False)):
                found = self._check_batch(batch, use_cache, settings)
                counts = [counts[0] + found, counts[1] + len(batch) * settings["new_tokens"]]
        return counts

    def _check_batch(self, prompts: list[list[int]], use_cache: bool, settings: dict) -> int:
        what = "`generate` must give the tokens of a recomputation without cache"
        what += f" ({len(prompts)} prompts, use_cache={use_cache}, {settings}, {self.versions})"
        try:
            rows = generate(self.model, prompts, use_cache, **settings)
        except Exception as error:  # whatever this transformers does
            raise ValueError(f"{what}, got {type(error).__name__}: {error}") from error
        return sum(
            compare_tokens(self.of(prompt, settings), row, what) for prompt, row in zip(prompts, rows, strict=True)
        )

    def check_golden(self, golden: dict) -> list[int]:
        """The folder's golden tokens."""
        counts = [0, 0]
        what = f"the recomputation must give the golden tokens ({self.versions}, made by {golden.get('versions')})"
        for run in golden["runs"]:
            tokens = self.of(run["prompt"], run["settings"])["tokens"]
            counts = [counts[0] + compare_tokens(run, tokens, what), counts[1] + len(tokens)]
        return counts


# ---- logits


def probe(model):
    """Logits on fixed ids; a diffusion model also sees mask tokens."""
    import torch

    config = model.config
    length = min(24, config.max_position_embeddings)
    ids = (torch.arange(2 * length).view(2, length) * 7919 + 13) % config.vocab_size  # [2, L]
    ids[ids == config.mask_token_id] = (config.mask_token_id + 1) % config.vocab_size
    if model.is_diffusion:
        ids[:, ::3] = config.mask_token_id
    with torch.no_grad():
        return model(input_ids=ids).logits.float().cpu()


def compare_logits(logits, reference) -> float:
    """
    Largest difference of logits; what is suppressed must be so in the same places, whatever its floor.

    Raises:
        `ValueError`: for other shapes and places, for NaN, and for a difference above `TOLERANCE`.
    """
    import torch

    shape, expected = tuple(logits.shape), tuple(reference.shape)
    if shape != expected:
        raise ValueError(f"logits: the shapes must agree, got {shape} in the clean process and {expected}")
    out, nan = logits < SUPPRESSED, logits.isnan() | reference.isnan()
    if not torch.equal(out, reference < SUPPRESSED) or nan.any():
        raise ValueError(
            "logits: the clean process and the local classes must suppress the same tokens, and never give NaN"
        )
    difference = (logits - reference)[~out].abs().max().item()
    if not difference <= TOLERANCE:
        rule = f"logits: the clean process must agree with the local classes within {TOLERANCE}"
        raise ValueError(f"{rule}, got {difference:.3g}")
    return difference


# ---- the model under an adapter


def read_adapter(folder: Path) -> dict | None:
    """adapter_config.json, or `None` for a folder that holds a whole model."""
    path = Path(folder) / ADAPTER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_adapter(folder: Path) -> None:
    """
    What can be seen of an exported adapter: it holds no model, and names one that others can find.

    Raises:
        `ValueError`: naming what is missing or wrong.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"`folder` must hold {WEIGHTS}, got none in {folder.name}")
    if (folder / "config.json").is_file():
        raise ValueError(f"`folder` must hold a model or an adapter, got {ADAPTER} and config.json in {folder.name}")
    name = read_adapter(folder).get("base_model_name_or_path")
    if not HUB_NAME.fullmatch(name or ""):
        raise ValueError(f"{ADAPTER} must name a model on the Hub, got {name!r}")


def base_folder(folder: Path, base_model: str | os.PathLike | None = None) -> Path:
    """
    Where the model under an adapter is on this machine: in the given folder, in the one that the adapter names, or in
    the cache of downloads under the name on the Hub. Nothing is downloaded.

    Raises:
        `ValueError`: if it isn't there.
    """
    config = read_adapter(folder)
    name = os.fspath(base_model or config["base_model_name_or_path"] or "")
    place = Path(name)
    if base_model is None and not place.is_dir() and HUB_NAME.fullmatch(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            place = Path(snapshot_download(name, revision=config.get("revision"), local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"`base_model` must be the folder of {name}, which {Path(folder).name} adapts and which is not here "
                f"(hf download {name})"
            ) from error
    if not (place / "config.json").is_file():
        raise ValueError(f"`base_model` must be a folder with config.json, got {name or None}")
    return place.resolve()


def put_into_cache(folder: Path, base: Path, home: Path) -> None:
    """Makes the model findable by its name on the Hub for a process whose HF_HOME is `home`."""
    config, commit = read_adapter(folder), "0" * 40
    repository = home / "hub" / f"models--{config['base_model_name_or_path'].replace('/', '--')}"
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / (config.get("revision") or "main")).write_text(commit)
    (repository / "snapshots" / commit).symlink_to(base, target_is_directory=True)


def load(folder: Path, base: str | os.PathLike | None = None, **kwargs):
    """
    The adapted model, as the card's snippet loads it: `base` (default: what the adapter names) by transformers' Auto
    class, the adapter's generation settings, and the adapter by PEFT. `kwargs` are those of `from_pretrained`.

    Raises:
        `ValueError`: for tensors that the adapter lacks.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = read_adapter(folder)
    if base is None:
        base, kwargs = config["base_model_name_or_path"], {"revision": config.get("revision"), **kwargs}
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    model.generation_config = type(model.generation_config).from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(folder))
        except UserWarning as warning:
            raise ValueError(f"{WEIGHTS} must hold the adapter's tensors, got none of some: {warning}") from warning


def load_in_each_way(folder: Path, **kwargs) -> dict:
    """The adapted model by each way that its users have, by the name of the class."""
    from peft import AutoPeftModelForCausalLM

    other = AutoPeftModelForCausalLM.from_pretrained(str(folder), **kwargs)
    return {"PeftModel": load(folder, **kwargs), "AutoPeftModelForCausalLM": other}
