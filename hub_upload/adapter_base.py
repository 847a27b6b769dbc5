"""The model under an adapter: its name, its folder, and a process without a network that finds it by that name.

Every exported adapter carries this file beside verify.py. Above its functions it imports the standard library only.
"""

import json
import os
import re
import warnings
from pathlib import Path

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
    missing = [name for name in (WEIGHTS, Path(__file__).name) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"`folder` must hold {WEIGHTS} and {Path(__file__).name}, got none of {missing}")
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
