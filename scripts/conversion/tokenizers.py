"""Tokenizers on the way: loaded as their files say, with the tokens that training needs, compared, taken back."""

import json
from pathlib import Path

from nanollada.scripts.conversion.families.family import Source
from nanollada.scripts.conversion.families.registry import FAMILIES
from nanollada.trainers.records import read_json

TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")


def load_tokenizer(path: str | Path, plain: bool = False):
    """A tokenizer, without what loading notes down about this machine; `plain` where AutoTokenizer knows no class."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(path)
    if altered_part(
        path, tokenizer
    ):  # transformers 5 rebuilds a qwen2 folder's, and some classes', from the vocabulary
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if part := altered_part(path, tokenizer):
            raise ValueError(f"the tokenizer must load as {path}/tokenizer.json has it, got another `{part}`")
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def altered_part(path: str | Path, tokenizer) -> str | None:
    """The first part of a folder's tokenizer.json that the loaded tokenizer has otherwise; a part makes token ids."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    ours, theirs = (json.loads(one.to_str()) for one in (tokenizer.backend_tokenizer, Tokenizer.from_file(str(file))))
    return next((part for part in TOKENIZER_PARTS if ours[part] != theirs[part]), None)


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
    from nanollada.trainers.data.tokenizers import ensure_mask_token

    if path is None or not (Path(path) / "tokenizer_config.json").is_file():
        raise ValueError(f"`tokenizer` must be a folder with tokenizer_config.json, got {path}")
    family = FAMILIES.get(source.kind)
    tokenizer = load_tokenizer(path, family is not None and family.plain_tokenizer)
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
    if kind == "unused row" and family is not None and family.adds_mask and mask == last + 1:
        kind = "own"  # its code adds the token at run time, and trains it
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    unused = max(rows, mask + 1) - len(tokenizer)
    facts = {"rows": rows, "tokens": len(tokenizer), "unused_rows": unused, "mask": kind, "mask_token_id": mask}
    return tokenizer, {**facts, "pad_token": pad}


def compare_tokenizers(folder: Path, tokenizer) -> None:
    """
    Whether AutoTokenizer makes the same tokens of a text in the folder that was written. (transformers 5 rebuilds the
    tokenizer of every `qwen2` folder as Qwen2's own, whatever the files say.)

    Raises:
        `ValueError`: naming the part that differs.
    """
    from transformers import AutoTokenizer

    found, expected = (
        json.loads(one.backend_tokenizer.to_str()) for one in (AutoTokenizer.from_pretrained(folder), tokenizer)
    )
    for part in TOKENIZER_PARTS:
        if found[part] != expected[part]:
            raise ValueError(
                f"AutoTokenizer must load the output's tokenizer as it is, got another `{part}`: transformers takes "
                "it for the target's own, so that texts become other tokens (`--verify false` writes it all the same)"
            )


def drop_mask_token(folder: Path, mask_token: str, pad_token: str | None) -> None:
    """
    Takes a mask token, and a pad token that was none, out of saved tokenizer files.

    Raises:
        `ValueError`: if the token is not an added one behind all others.
    """
    path = folder / "tokenizer.json"
    content = read_json(path)
    kept = [token for token in content["added_tokens"] if token["content"] != mask_token]
    if len(kept) + 1 != len(content["added_tokens"]) or mask_token in content["model"]["vocab"]:
        raise ValueError(f"{path.name} must hold the mask token among its added tokens, got {mask_token} elsewhere")
    content["added_tokens"] = kept
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    settings.pop("mask_token", None)
    decoder = settings.get("added_tokens_decoder", {})
    for index in [index for index, token in decoder.items() if token["content"] == mask_token]:
        del decoder[index]
    if pad_token is None:
        settings.pop("pad_token", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
