"""Turns a checkpoint into a folder for the Hub: flat code, safetensors, tokenizer, generation settings, card, and
golden tokens with the program that verifies them. Of an adapter's folder a repository of the adapter alone.

python hub_upload/export.py CHECKPOINT OUTPUT --license apache-2.0 --language en
python hub_upload/export.py ADAPTER OUTPUT --base_model user/its-model --license apache-2.0 --language en

The folder is made by `save_pretrained`, never by copying source files:
`modeling_nanollada/configuration_nanollada.py` is a bridge that only works inside the package.
"""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from nanollada.hub_upload import recompute, verify
from nanollada.hub_upload.card_facts import Facts, read_facts
from nanollada.hub_upload.card_use import choose_example
from nanollada.hub_upload.evaluation_file import config_digest, file_digest, model_digests, weights_digest
from nanollada.hub_upload.model_card import build_card
from nanollada.hub_upload.recompute import ADAPTER, GOLDEN, HUB_NAME, WEIGHTS, base_folder, read_adapter
from nanollada.hub_upload.verify import check_files, check_results
from nanollada.trainers.commands.ending import run_program
from nanollada.trainers.commands.programs import command_of

ABOUT = (
    "Greedy tokens of these weights, by a plain loop without generate and without a cache, in float32 on a CPU: "
    "python verify.py compares. steps: the forward that decided each token; margins: how clear each forward's choices "
    "were, in nats."
)
PICTURES = {"png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF8"}  # how the files begin


def export(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    evaluation: str | os.PathLike | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    repo_id: str | None = None,
    model_name: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    prompt: str | None = None,
    twin: str | None = None,
    picture: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Exports a checkpoint of either model, or an adapter of one.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder with model and tokenizer: a run's, or one of its `checkpoint-N`.
        output (`str` or `os.PathLike`): Folder to make. Appears only when it is complete.
        evaluation (`str` or `os.PathLike`, *optional*): evaluation.json. Defaults to the checkpoint's.
        license (`str`, *optional*): Licence of the weights, as the Hub spells it ("apache-2.0").
        language (`str` or `list[str]`, *optional*): ISO 639 codes.
        repo_id (`str`, *optional*): What the card's snippets load. Defaults to the folder's name; uploading sets it.
        model_name (`str`, *optional*): Title of the card. Defaults to the last part of `repo_id`, else of `output`.
        datasets (`list[str]`, *optional*): Hub names of the training data.
        base_model (`str`, *optional*): Hub name of the model that this one comes from. Of an adapter: of the model
            that it adapts, needed if that is a folder here; of a merged adapter it defaults to that model's name.
        prompt (`str`, *optional*): Prompt of the card's snippets, whose answer the card shows. Defaults to the first
            that the evaluation asked (`examples` of evaluation.json).
        twin (`str`, *optional*): Hub name of the model of the other kind, which the card links to. Without an owner
            it is a repository of this one's.
        picture (`str` or `os.PathLike`, *optional*): A PNG or GIF of how the model writes; becomes part of the card.
        overwrite (`bool`, defaults to `False`): Whether to replace an earlier export.

    Returns:
        `Path`: `output`. Facts that the card has to leave out are printed to stderr.

    Raises:
        `ValueError`: if `output` is not empty, or is not an export and would be overwritten; if the checkpoint is not
            nanollada's, lacks or has too many tensors; for an adapter without a name of its model; if tokenizer and
            model don't agree; if `picture` is no PNG or GIF; as `read_facts` and `build_card`.
    """
    from nanollada.modeling_nanollada.loading_nanollada import check_tokenizer

    checkpoint, output = Path(checkpoint), Path(output)
    _check_output(checkpoint, output, overwrite)
    shown = None if picture is None else _picture_name(Path(picture))
    facts = read_facts(checkpoint, evaluation)
    base_model = _base_model(checkpoint, facts, base_model)
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    check_tokenizer(model, tokenizer)
    there = output.resolve()
    metadata = {"license": license, "language": language, "datasets": datasets, "base_model": base_model}
    name = model_name or (repo_id or there.name).split("/")[-1]
    repo_id = repo_id or there.name
    options = {"repo_id": repo_id, "prompt": prompt, "twin": twin, "picture": shown}
    card = build_card(model, tokenizer, facts, model_name=name, **options, **metadata)
    partial = there.with_name(f".{there.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if read_adapter(checkpoint) is None:
            model.save_pretrained(partial)
        else:
            _write_adapter(partial, checkpoint, base_model, model)
        _write(partial, tokenizer, card, facts, choose_example(tokenizer, facts, prompt))
        write_golden(partial, None if read_adapter(checkpoint) is None else base_folder(checkpoint))
        if shown is not None:
            shutil.copy(picture, partial / shown)
        check_files(partial)
        check_results(partial)
        _put_in_place(partial, there)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    needed = ("license", "language", *(["base_model"] if (facts.run or {}).get("merged") else []))
    gaps = [f"{name}: --{name} is not given" for name in needed if not metadata[name]]
    for gap in (*facts.missing, *gaps):
        print(f"README.md leaves out {gap}", file=sys.stderr)
    return output


def _base_model(checkpoint: Path, facts: Facts, base_model: str | None) -> str | None:
    """The name on the Hub of the model under an adapter, or under one that was merged."""
    adapter, merged = read_adapter(checkpoint), (facts.run or {}).get("merged") or {}
    name = merged.get("base_model") if adapter is None else adapter["base_model_name_or_path"]
    if base_model is None and name and HUB_NAME.fullmatch(name) and not Path(name).exists() and "/" in name:
        base_model = name
    if adapter is not None and base_model is None:
        raise ValueError(f"`base_model` must be the Hub name of the model under the adapter, got none for {name}")
    return base_model


def load_model(checkpoint: Path):
    """
    The model with the local classes, in the dtype it was saved in; of an adapter's folder with the adapter on it.

    Raises:
        `ValueError`: for another kind of model, for tensors that are NaN or infinite, and as
            [`~modeling_nanollada.loading_nanollada.load_model`].
    """
    from transformers import AutoModelForCausalLM

    from nanollada.modeling_nanollada import loading_nanollada

    adapter = read_adapter(checkpoint)
    folder = checkpoint if adapter is None else base_folder(checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`checkpoint` must be a folder with config.json, got {checkpoint}")
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "nanollada":
        raise ValueError(f"`checkpoint` must hold a nanollada model, got the model type {model_type}")
    if adapter is None:
        model = loading_nanollada.load_model(AutoModelForCausalLM, checkpoint, "checkpoint", dtype="auto")
    else:
        model = loading_nanollada.load_adapted(checkpoint, "checkpoint", folder, dtype="auto")
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise ValueError(f"`checkpoint` must hold finite weights, got NaN or infinity in {', '.join(broken)}")
    return model.eval()


def load_tokenizer(checkpoint: Path):
    """The checkpoint's tokenizer, without what loading notes down about this machine."""
    from transformers import AutoTokenizer

    if not (checkpoint / "tokenizer_config.json").is_file():
        raise ValueError(f"`checkpoint` must hold its tokenizer, got no tokenizer_config.json in {checkpoint}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _check_output(checkpoint: Path, output: Path, overwrite: bool) -> None:
    here, there = checkpoint.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"`output` must lie outside `checkpoint`, got {output} and {checkpoint}")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"`output` must be new or empty (or give --overwrite), got {output}")
    is_export = any((output / name).is_file() for name in ("config.json", ADAPTER))
    if not (is_export and (output / "README.md").is_file()):
        raise ValueError(f"`output` must be an earlier export to be overwritten, got {output} without config and card")


def _picture_name(picture: Path) -> str:
    """What a picture is called beside the card."""
    start = picture.read_bytes()[:8] if picture.is_file() else b""
    kind = next((kind for kind, sign in PICTURES.items() if start.startswith(sign)), None)
    if kind is None:
        raise ValueError(f"`picture` must be a PNG or GIF file, got {picture}")
    return f"denoising.{kind}"


def _write_adapter(folder: Path, checkpoint: Path, base_model: str, model) -> None:
    """The adapter's own bytes, so that what was measured of them stays true, and the name of its model on the Hub."""
    shutil.copy(checkpoint / WEIGHTS, folder)
    config = read_adapter(checkpoint)
    if config["base_model_name_or_path"] != base_model:  # else the revision that it names is one on the Hub
        config |= {"base_model_name_or_path": base_model, "revision": None}
    (folder / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)


def _write(folder: Path, tokenizer, card, facts: Facts, example: tuple) -> None:
    tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")
    evaluation = facts.evaluation
    if evaluation is not None:  # of this model, as `read_facts` saw, in the files it is in now
        results = [_published(result, example) for result in evaluation["results"]]
        evaluation = {**evaluation, "results": results, **_digests(folder, evaluation)}
    records = {"run.json": facts.run, "evaluation.json": evaluation}
    for name, record in records.items():
        if record is not None:
            (folder / name).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for module in (verify, recompute):  # so that whoever downloads the folder can check it
        shutil.copy(module.__file__, folder)


def _digests(folder: Path, evaluation: dict) -> dict:
    """Of the files as they are now; of the model under an adapter as they were, under its name on the Hub."""
    adapter = read_adapter(folder)
    if adapter is None:
        return model_digests(folder)
    base = {**evaluation["base"], "name": adapter["base_model_name_or_path"]}
    return {"weights_sha256": weights_digest(folder), "config_sha256": config_digest(folder), "base": base}


def _published(result: dict, example: tuple) -> dict:
    """A result without held-out rows but the one that the card shows: what is on the Hub was seen on the card."""
    kept = [row for row in result.get("examples") or [] if (row["prompt"], row["answer"]) == example]
    rest = {name: value for name, value in result.items() if name != "examples"}
    return {**rest, "examples": kept} if kept else rest


def write_golden(folder: Path, base: Path | None = None) -> None:
    """Writes golden.json into an exported folder: what its weights decode, in float32 on the CPU, a line per run."""
    import torch
    from transformers import AutoModelForCausalLM

    if base is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        model = recompute.load(folder, base, dtype=torch.float32).eval()
    runs = []
    for run in recompute.runs_to_check(model.config):
        decoded = recompute.recompute(model, run["prompt"], **run["settings"])
        runs.append({**run, **decoded, "margins": [round(margin, 6) for margin in decoded["margins"]]})
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}
    digests = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    head = json.dumps({"about": ABOUT, "versions": versions, "sha256": digests}, indent=2).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
    (folder / GOLDEN).write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _put_in_place(partial: Path, output: Path) -> None:
    """Renames; an earlier export stays until the new one is complete."""
    old = partial.with_name(partial.name + ".old")
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """Parses arguments and exports."""
    from nanollada.trainers.commands.parser import PlainParser

    parser = PlainParser(description="Export a checkpoint to a folder for the Hub.")
    parser.add_argument("checkpoint", type=Path, help="Folder with model and tokenizer.")
    parser.add_argument("output", type=Path, help="Folder to make.")
    parser.add_argument("--evaluation", type=Path, help="evaluation.json (default: the checkpoint's).")
    parser.add_argument("--license", help="Licence of the weights, as the Hub spells it, e.g. apache-2.0.")
    parser.add_argument("--language", nargs="+", help="ISO codes, e.g. en zh.")
    parser.add_argument("--repo_id", help="Hub id that the card's snippets load (default: the folder's name).")
    parser.add_argument("--model_name", help="Title of the card (default: the last part of the id).")
    parser.add_argument("--datasets", nargs="+", help="Hub names of the training data.")
    parser.add_argument("--base_model", help="Hub name of the model that this one comes from, or adapts.")
    parser.add_argument("--prompt", help="Prompt of the card's snippets (default: the first that was evaluated).")
    parser.add_argument("--twin", help="Hub name of the model of the other kind; without an owner, of this one's.")
    parser.add_argument("--picture", type=Path, help="PNG or GIF of how the model writes, shown on the card.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export.")
    output = export(**vars(parser.parse_args(argv)))
    print(f"{output}: check it with {command_of('verify', output)}")


if __name__ == "__main__":
    run_program(main)
