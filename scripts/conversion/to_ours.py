"""Brings foreign checkpoints to nanollada, and autoregressive nanollada checkpoints to Qwen3, Llama or Qwen2."""

import json
import os
import shutil
from pathlib import Path

from nanollada.scripts.conversion.arguments import OURS, RECORD, ConvertArguments
from nanollada.scripts.conversion.families.family import Source
from nanollada.scripts.conversion.source import read_source
from nanollada.scripts.conversion.tokenizers import compare_tokenizers, fit_tokenizer
from nanollada.trainers.records import command


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
        record["command"] = command()
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
    from nanollada.scripts.conversion.compare import verify_written
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
    if settings is not None and not model_class.is_diffusion:  # diffusion decodes by other settings
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
    from nanollada.trainers.commands.parser import Parser

    (args,) = Parser(ConvertArguments).parse_args_and_config(argv)
    record = convert(args)
    print(summary(record, args.output))
    return record
