"""Brings foreign checkpoints to nanollada, and autoregressive nanollada checkpoints to Qwen3, Llama or Qwen2."""

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from nanollada.scripts.conversion.formats import RECORD, SHAPE, Source, load_tokenizer, read_source

OURS = ("causal", "masked")
THEIRS = ("qwen3", "llama", "qwen2")


@dataclass
class ConvertArguments:
    """
    What is converted to what.

    Raises:
        `ValueError`: for an unknown target, an output that is not empty, and a shape or tokenizer for the way back.
    """

    source: str = field(
        metadata={
            "help": "Folder (Qwen3, Llama, Qwen2, Mistral, minimind, nanollada), or a .pt, .pth or .safetensors file."
        }
    )
    to: str = field(metadata={"help": "causal or masked (nanollada's AR and diffusion model), qwen3, llama or qwen2."})
    output: str = field(metadata={"help": "New folder."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder with the tokenizer. Default: the source's. Gains <|mask|> if needed."}
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={"help": "Query heads: this and the next five are for weights that come without a config."},
    )
    hidden_act: str | None = field(default=None, metadata={"help": "Activation of the MLP, e.g. silu."})
    rms_norm_eps: float | None = field(default=None, metadata={"help": "Epsilon of the norms, e.g. 1e-5."})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "Longest sequence, e.g. 32768."})
    rope_parameters: dict | str | None = field(
        default=None, metadata={"help": 'RoPE as JSON, e.g. {"rope_theta": 1e6}, with the keys that transformers has.'}
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "Whose forward pass it is, for tensors alone: qwen3, llama, qwen2, mistral or minimind."},
    )
    verify: bool = field(
        default=True, metadata={"help": "Load the output, and compare its logits with the source's on random ids."}
    )

    def __post_init__(self):
        if isinstance(self.rope_parameters, str):
            self.rope_parameters = json.loads(self.rope_parameters)
        if self.to not in (*OURS, *THEIRS):
            raise ValueError(f"`to` must be one of {', '.join((*OURS, *THEIRS))}, got {self.to!r}")
        output = Path(self.output)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"`output` must be new or empty, got {self.output}")
        if self.to in THEIRS and (self.shape() or self.tokenizer):
            name = next(iter(self.shape()), "tokenizer")
            raise ValueError(f"`{name}` is the nanollada checkpoint's own with `to` {self.to!r}, got one")

    def shape(self) -> dict:
        """What was said of the shape, and whose it is."""
        return {name: getattr(self, name) for name in (*SHAPE, "architecture") if getattr(self, name) is not None}


def convert(args: ConvertArguments) -> dict:
    """
    Converts. The output folder appears only when it is complete and, unless `args.verify` is off, verified.

    Returns:
        `dict`: what was done, as `conversion.json` has it.

    Raises:
        `ValueError`: for whatever is not understood, naming the key of the config or the tensor; for a tokenizer that
            does not fit; and if what was written does not compute what the source computes.
    """
    output = Path(args.output).resolve()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if args.to in OURS:
            record = to_nanollada(args, partial)
        else:
            from nanollada.scripts.conversion.to_theirs import to_foreign

            record = to_foreign(args.source, args.to, partial, args.verify)
        record["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (partial / RECORD).write_text(text + "\n", encoding="utf-8")
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


# ---- to nanollada


def to_nanollada(args: ConvertArguments, folder: Path) -> dict:
    """Writes a foreign checkpoint as one of nanollada's, with its tokenizer; returns the record."""
    from nanollada.configuration_nanollada import NanoLLaDAConfig
    from nanollada.modeling_nanollada import NanoLLaDAForCausalLM, NanoLLaDAForMaskedLM
    from nanollada.scripts.conversion.compare import compare_tokenizers, verify_written
    from nanollada.scripts.conversion.tensors import fit_weights

    source = read_source(args.source, args.shape(), args.to)
    tokenizer, vocabulary = fit_tokenizer(args.tokenizer or source.folder, source)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask")}
    model_class = NanoLLaDAForCausalLM if args.to == "causal" else NanoLLaDAForMaskedLM
    # The embedding is fitted before it grows; the mask's id may lie behind it until then, so no id is stated here.
    plain = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    tensors, left_out = fit_weights(
        source.tensors, NanoLLaDAConfig(**source.shape, **plain, mask_token_id=0), model_class
    )
    rows = source.shape["vocab_size"]
    if vocabulary["mask"] == "new row":
        tensors = with_mask_row(tensors)
    shape = {**source.shape, "vocab_size": rows + (vocabulary["mask"] == "new row")}
    if vocabulary["unused_rows"]:
        shape["tokenizer_length"] = vocabulary["tokens"]
    config = NanoLLaDAConfig(**shape, **ids)
    settings = generation_settings_of(source)
    _write_ours(folder, model_class, config, tensors, tokenizer, settings)
    record = {
        "source": {"name": Path(args.source).resolve().name, "kind": source.kind, "sha256": source.files},
        "to": args.to,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "vocabulary": vocabulary,
        "config": source.config,
        "generation_config": settings,
        "left_out": left_out,
        "notes": [*source.notes, *_note_on_ends(settings, ids["eos_token_id"])],
    }
    if args.verify:
        compare_tokenizers(folder, tokenizer)
        record["verified"] = verify_written(folder, model_class, tensors, source, Path(args.source), vocabulary)
    return record


def fit_tokenizer(path: str | Path | None, source: Source):
    """
    The tokenizer with the mask, pad and eos tokens that nanollada's trainers ask for.

    A mask token that is new takes the id behind the last token. Where the embedding is padded (Qwen's has hundreds of
    rows that no token uses) that id has a row, which stays as it is, so that every tensor keeps its bits; elsewhere
    the embedding grows by one row. Without a pad token, pad is eos, as transformers users have it.

    Returns:
        `tuple`: the tokenizer, and the facts: `rows` of the source's embedding, `tokens`, `unused_rows`, `mask`
            ("own", "unused row" or "new row"), `mask_token_id`, and the `pad_token` that it had.

    Raises:
        `ValueError`: without a tokenizer or an eos token, for one that is not fast, and if it has more ids than the
            embedding has rows.
    """
    from nanollada.trainers.data.encoding import ensure_mask_token

    if path is None or not (Path(path) / "tokenizer_config.json").is_file():
        raise ValueError(f"`tokenizer` must be a folder with tokenizer_config.json, got {path}")
    tokenizer = load_tokenizer(path, source.kind)
    rows, pad = source.shape["vocab_size"], tokenizer.pad_token
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ValueError(f"`tokenizer` must not have more ids than the embedding has rows, got id {last} and {rows}")
    if not tokenizer.is_fast:
        raise ValueError(f"`tokenizer` must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"`tokenizer` must have an eos token, which ends every document, got none in {path}")
    added = ensure_mask_token(tokenizer)
    mask = tokenizer.mask_token_id
    kind = "own"
    if added:
        kind = "new row" if mask >= rows else "unused row"
    if mask > rows:
        raise ValueError(f"the mask token's id must be {rows} at most (the embedding's rows), got {mask}")
    if kind == "unused row" and source.kind == "nano-llada" and mask == last + 1:
        kind = "own"  # Nano-LLaDA adds it at run time, behind its tokenizer's last token, and trains it
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    unused = max(rows, mask + 1) - len(tokenizer)
    facts = {"rows": rows, "tokens": len(tokenizer), "unused_rows": unused, "mask": kind, "mask_token_id": mask}
    return tokenizer, {**facts, "pad_token": pad}


def with_mask_row(tensors: dict) -> dict:
    """One row more in the embedding and in a head of its own, the mean of the others (transformers' way to resize)."""
    import torch

    tensors = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            mean = tensors[name].double().mean(0, keepdim=True)
            tensors[name] = torch.cat((tensors[name], mean.to(tensors[name].dtype)))
    return tensors


def generation_settings_of(source: Source) -> dict | None:
    """generation_config.json of the source; without one its config's ids, which transformers takes then."""
    from nanollada.trainers.records import read_json

    path = source.folder / "generation_config.json" if source.folder else None
    if path is not None and path.is_file():
        return read_json(path)
    ids = {name: source.config.get(name) for name in ("bos_token_id", "eos_token_id")}
    return {name: value for name, value in ids.items() if value is not None} or None


def _note_on_ends(settings: dict | None, eos: int) -> list[str]:
    ends = (settings or {}).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if ends == [None] or eos in ends:
        return []
    return [f"generation ends at the source's {ends}, but its tokenizer ends texts with {eos}"]


def _write_ours(folder: Path, model_class, config, tensors: dict, tokenizer, settings: dict | None) -> None:
    from nanollada.scripts.conversion.tensors import filled, meta_model, our_generation_config

    model = filled(meta_model(config, model_class), tensors)
    if settings is not None and model_class.__name__ == "NanoLLaDAForCausalLM":  # diffusion decodes by other settings
        model.generation_config = our_generation_config(settings, config)
    elif settings is not None and settings.get("eos_token_id") is not None:
        model.generation_config.eos_token_id = settings["eos_token_id"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the table


def summary(record: dict, output: str) -> str:
    """What was done, in a few lines."""
    vocabulary, verified = record["vocabulary"], record.get("verified")
    rows = [
        ("source", f"{record['source']['name']} ({record['source']['kind']})"),
        ("output", f"{output} ({record['to']}), {record['parameters']:,} parameters, {record['dtype']}"),
        ("vocabulary", f"{vocabulary['tokens']:,} tokens, {vocabulary['unused_rows']:,} rows that no token uses"),
        ("mask", f"id {vocabulary['mask_token_id']}, {vocabulary['mask']}"),
    ]
    if vocabulary.get("pad_token", "") is None:
        rows.append(("pad", "is eos: the tokenizer had none"))
    rows += [("left out", name) for name in record.get("left_out", [])]
    rows += [("note", note) for note in record.get("notes", [])]
    rows.append(("verified", "no" if verified is None else verified["says"]))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def main(argv: list[str] | None = None) -> dict:
    """Parses arguments (or `--config file.yaml`), converts, verifies, and says what was done."""
    from trl import TrlParser

    (args,) = TrlParser(ConvertArguments).parse_args_and_config(argv)
    record = convert(args)
    print(summary(record, args.output))
    return record
