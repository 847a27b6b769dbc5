"""Loading that skips nothing, and whether a tokenizer fits a model. It does not ship with a checkpoint."""

import json
import os
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers.utils import logging

ADAPTER_CONFIG = "adapter_config.json"
# A model that edits structurally predicts them where a token is too many, and where one is missing.
EDIT_TOKENS = ("<|delete|>", "<|insert|>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(model_class, path: str | os.PathLike, argument: str = "model_name_or_path", **kwargs):
    """
    `model_class.from_pretrained`, strictly, and in float32 unless `dtype` says otherwise.

    Args:
        model_class: A model's class, or one of transformers' Auto classes.
        path (`str` or `os.PathLike`): A checkpoint's folder, or a model's name on the Hub.
        argument (`str`, *optional*, defaults to `"model_name_or_path"`): What the caller calls `path`, for errors.
        kwargs: Those of `from_pretrained`.

    Raises:
        `ValueError`: naming broken files, and missing, unexpected and mis-shaped tensors. Nothing is skipped. And as
            `check_place`.
    """
    check_place(path, argument)
    check_files(path)
    if Path(path).is_dir() and not any(Path(path).glob("*config.json")):  # PEFT's is adapter_config.json
        inside = "".join(f"; one is {config.parent}" for config in sorted(Path(path).glob("*/config.json"))[:1])
        raise ValueError(f"`{argument}` must be a folder with config.json, got {path}{inside}")
    kwargs = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    with without_bars() if Path(path).is_dir() else nullcontext():  # a download keeps its bar
        model, report = model_class.from_pretrained(path, **kwargs)
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "shape": "mismatched_keys"}
    faults = [f"{kind}: {', '.join(sorted(map(str, report[key])))}" for kind, key in kinds.items() if report[key]]
    if faults:
        raise ValueError(f"`{argument}` must hold exactly the tensors of {type(model).__name__}, got {faults}")
    return model


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def load_adapted(path: str | os.PathLike, argument: str = "checkpoint", base=None, **kwargs):
    """
    The model that an adapter's folder names, strictly loaded, with the adapter on it.

    Args:
        path (`str` or `os.PathLike`): A folder with `adapter_config.json`.
        argument (`str`, *optional*, defaults to `"checkpoint"`): What the caller calls it, for errors.
        base (`str` or `os.PathLike`, *optional*): Where the model is, if not where the folder says.
        kwargs: Those of `from_pretrained` for the model.

    Returns:
        `peft.PeftModel`: with the folder's `generation_config.json`, for which the adapter was trained.

    Raises:
        `ValueError`: naming a model that is not there, tensors that the adapter lacks, and as `load_model`.
    """
    import peft
    from transformers import AutoModelForCausalLM

    check_files(path)
    config = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path") if base is None else os.fspath(base)
    if not name or (os.path.isabs(name) and not os.path.isdir(name)):
        raise ValueError(f"`{argument}` must be an adapter whose model is there, got {path}, which adapts {name!r}")
    if base is None and config.get("revision"):
        kwargs = {"revision": config["revision"], **kwargs}
    model = load_model(AutoModelForCausalLM, name, argument, **kwargs)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(path)
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"`{argument}` must be a folder with {file.name}, got {path}")
    with warnings.catch_warnings():  # PEFT warns of missing tensors, and passes over those that it doesn't know
        warnings.filterwarnings("ignore", message="Found missing adapter keys|.*Already found a `peft_config`")
        try:
            model = peft.PeftModel.from_pretrained(model, str(path))
        except (RuntimeError, TypeError) as error:  # of another shape; a setting that this PEFT doesn't know
            reason = " ".join(str(error).split())
            raise ValueError(f"`{argument}` must hold an adapter of {name}, got {path}: {reason}") from error
    _check_adapter(model, file, argument)
    return model


def _check_adapter(model, file: Path, argument: str) -> None:
    """A file's tensors must be the adapter's; one of the embedding may bring that, too."""
    import peft
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        there = set(stored.keys())
    needed = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    odd = {"missing": needed - there, "unexpected": there - needed - model.state_dict().keys()}
    if faults := [f"{kind}: {', '.join(sorted(names))}" for kind, names in odd.items() if names]:
        raise ValueError(f"`{argument}` must hold exactly the tensors of its adapter, got {faults} in {file.parent}")


def load_tokenizer(path: str | os.PathLike, argument: str = "tokenizer_name_or_path", **kwargs):
    """
    `AutoTokenizer.from_pretrained`, of a place that there is.

    Raises:
        `ValueError`: naming a broken file, and a folder without a tokenizer; and as `check_place`.
    """
    from transformers import AutoTokenizer

    check_place(path, argument)
    check_files(path)
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(f"`{argument}` must be a folder with a tokenizer, got {path}, which has none")
    return AutoTokenizer.from_pretrained(path, **kwargs)


def usable_device(device: str | None) -> torch.device:
    """
    A device to put a model on; by default the GPU, if there is one.

    Raises:
        `ValueError`: for a name that is none, and for a device that isn't there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no error of its own for it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"`device` must be one that torch has here, got {device!r}: {reason}") from error


def check_place(path: str | os.PathLike, argument: str) -> None:
    """
    Whether there is such a folder, or such a model on the Hub: transformers asks the Hub for whatever is no folder
    here, again and again, and then says that it couldn't connect.

    A local path begins with `/`, a dot or `~`, has more than one slash, or begins with a folder that is here; only
    `name` and `owner/name` can be on the Hub. What lies in its cache is not asked for.

    Raises:
        `ValueError`: naming the argument, if there is neither, or a file in place of the folder.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    name = os.fspath(path)
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise ValueError(f"`{argument}` must be a folder or a model on the Hub, got {name}, which is a file")
    rule = f"`{argument}` must be a folder or a model on the Hub, got {name}"
    first, *others = Path(name).parts or (name,)
    if name[:1] in (".", "~", "/", "") or name.count("/") > 1 or "\\" in name or others and Path(first).is_dir():
        raise ValueError(f"{rule}: there is no such folder")
    try:
        if any(isinstance(try_to_load_from_cache(name, f"{part}config.json"), str) for part in ("", "tokenizer_")):
            return
        model_info(name, timeout=10)
    except HFValidationError as error:
        raise ValueError(f"{rule}: there is no such folder") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{rule}: there is no such folder, and no such model that you may see") from error
    except HfHubHTTPError:
        return  # the Hub answers, and will say to the download what is wrong
    except Exception as error:  # no connection, in the words of whichever HTTP library it is
        raise ValueError(f"{rule}: there is no such folder, and the Hub can't be reached ({error})") from error


@contextmanager
def without_bars():
    """transformers' bars over the tensors and files of a local folder stay away, for they stand between our lines."""
    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_files(path: str | os.PathLike) -> None:
    """
    Reads what a local checkpoint's files begin with, before transformers passes over a broken `generation_config.json`
    in silence. A name on the Hub is left alone.

    Raises:
        `ValueError`: naming the file that is no JSON, or no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(path).glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{file.name} of {path} must be JSON, got a broken file: {error}") from error
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file.name} of {path} must be a whole safetensors file: {error}") from error


def check_tokenizer(config_or_model, tokenizer) -> None:
    """
    Compares a tokenizer with the model it is used with.

    Args:
        config_or_model (`PreTrainedConfig` or `PreTrainedModel`): With a model, its embedding is checked as well.
        tokenizer (`PreTrainedTokenizerBase`): A missing chat template is no error here.

    Raises:
        ValueError: Naming every mismatch of vocabulary size and of the pad, eos, mask and edit tokens' ids.
    """
    config = getattr(config_or_model, "config", config_or_model)
    faults = []
    name = "vocab_size" if getattr(config, "tokenizer_length", None) is None else "tokenizer_length"
    if len(tokenizer) != getattr(config, name):
        faults.append(f"`{name}` must be {len(tokenizer)} (the tokenizer's length), got {getattr(config, name)}")
    if config is not config_or_model:
        rows = config_or_model.get_input_embeddings().weight.shape[0]
        if rows != config.vocab_size:
            faults.append(f"the model's embedding must have {config.vocab_size} rows (`vocab_size`), got {rows}")
    for name in ("pad_token_id", "eos_token_id", "mask_token_id"):
        expected, got = getattr(tokenizer, name), getattr(config, name, None)
        if expected is None:
            faults.append(f"the tokenizer must have a `{name}`, got None")
        elif expected != got:
            faults.append(f"`{name}` must be {expected} (the tokenizer's), got {got}")
    vocabulary = tokenizer.get_added_vocab()
    for name, token in zip(("delete_token_id", "insert_token_id"), EDIT_TOKENS, strict=True):
        got = getattr(config, name, None)
        if got is not None and got != vocabulary.get(token):
            faults.append(f"`{name}` must be {vocabulary.get(token)} (the tokenizer's {token}), got {got}")
    mask = tokenizer.mask_token_id
    if mask is not None and mask in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        faults.append(f"`mask_token_id` must differ from the pad and eos ids, got {mask}")
    if faults:
        raise ValueError("tokenizer and model do not fit: " + "; ".join(faults))
