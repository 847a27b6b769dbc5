"""Tokenizers: trained here (byte-level BPE, or one token per character), or given the mask token that they lack."""

import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanollada.trainers.data.formats import Example
from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_sources

logger = logging.getLogger(__name__)

# The order is the ids': `<|endoftext|>` = 0 pads, `<|im_start|>` = 1 begins and `<|im_end|>` = 2 ends a turn.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
BYTES = 256
SMALLEST = BYTES + len(SPECIAL_TOKENS)
DEFAULT_SIZE = 6400

# ChatML, and nothing that the rows do not say: no default system prompt. The end of a turn is part of the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass
class TokenizerArguments(SourceArguments):
    """What a tokenizer is trained on, and its kind."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the tokenizer. Required."})
    kind: Literal["bpe", "char"] = field(
        default="bpe", metadata={"help": "Byte-level BPE, or one token per character of the data."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": f"Entries of a BPE vocabulary, special tokens included; at least {SMALLEST}; default "
            f"{DEFAULT_SIZE}. The data decide the size of a character vocabulary."
        },
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Train on the first rows only, of all sources together."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace another tokenizer that `output_dir` holds."})

    def __post_init__(self):
        super().__post_init__()
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {self.max_rows}")


def ensure_mask_token(tokenizer) -> int:
    """
    Gives a tokenizer the mask token `<|mask|>` if it has none; a second call changes nothing.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place. The new token stands behind all others.

    Returns:
        `int`: How many tokens the vocabulary grew by (0 or 1): resize the model's embeddings if it is 1.
    """
    if tokenizer.mask_token is not None:
        return 0
    size = len(tokenizer)
    tokenizer.add_special_tokens(
        {"mask_token": SPECIAL_TOKENS[-1]}
    )  # returns 1 for a token that is merely made special, too
    return len(tokenizer) - size


def ensure_edit_tokens(tokenizer) -> tuple[int, int]:
    """
    Gives a tokenizer the tokens `<|delete|>` and `<|insert|>` if it lacks them; a second call changes nothing.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place. What is new stands behind all other tokens. Tokens of
            these names, which a tokenizer has set aside, are kept, and made special.

    Returns:
        `tuple[int, int]`: Their ids, `<|delete|>`'s first.
    """
    from tokenizers import AddedToken

    from nanollada.modeling_nanollada.loading_nanollada import EDIT_TOKENS

    if len(edit_tokens_of(tokenizer)) < len(EDIT_TOKENS):
        tokens = [AddedToken(name, special=True, normalized=False) for name in EDIT_TOKENS]
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    known = edit_tokens_of(tokenizer)
    return known[EDIT_TOKENS[0]], known[EDIT_TOKENS[1]]


def edit_tokens_of(tokenizer) -> dict[str, int]:
    """Which of `<|delete|>` and `<|insert|>` a tokenizer has as special tokens, with their ids."""
    from nanollada.modeling_nanollada.loading_nanollada import EDIT_TOKENS

    special = ((token.content, index) for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {name: index for name, index in special if name in EDIT_TOKENS}


def no_text(tokenizer, ids: Sequence[int]) -> tuple[str, str] | None:
    """What ids hold that no row may: ("mask" or "edit", the token), or `None`."""
    if tokenizer.mask_token_id in ids:  # which may be None
        return "mask", tokenizer.mask_token
    edits = [name for name, token in edit_tokens_of(tokenizer).items() if token in ids]
    return ("edit", edits[0]) if edits else None


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int | None = None,
    kind: Literal["bpe", "char"] = "bpe",
    show_progress: bool = False,
):
    """
    Trains a tokenizer from texts, which may be a stream.

    Both kinds decode to exactly the text that was encoded and add no tokens to it; `<|endoftext|>`, `<|im_start|>`,
    `<|im_end|>` and `<|mask|>` have the ids 0 to 3. BPE knows every byte, so it encodes every text, and splits numbers
    into digits. A character tokenizer refuses characters that it was not trained on: there is no unknown token.

    Args:
        texts (`Iterable[str]`): The corpus.
        vocab_size (`int`, *optional*): Entries of the BPE vocabulary, special tokens included; 6400 by default. A
            corpus too small for that gives fewer. Not for `kind="char"`, whose size the texts decide.
        kind (`str`, *optional*, defaults to `"bpe"`): "bpe" or "char".
        show_progress (`bool`, *optional*, defaults to `False`): Bars for the merges.

    Returns:
        `PreTrainedTokenizerFast`: With pad, bos, eos and mask tokens, and a ChatML template with generation spans.

    Raises:
        ValueError: At a bad size or kind, or without any text.
    """
    if kind not in ("bpe", "char"):
        raise ValueError(f"`kind` must be 'bpe' or 'char', got {kind!r}")
    if kind == "char" and vocab_size is not None:
        raise ValueError(f"`vocab_size` must not be given with `kind='char'`, got {vocab_size}: the data decide it")
    vocab_size = DEFAULT_SIZE if vocab_size is None else vocab_size
    if vocab_size < SMALLEST:
        raise ValueError(f"`vocab_size` must be at least {SMALLEST} (bytes and special tokens), got {vocab_size}")
    texts = _nonempty(texts)
    backend = _character_tokenizer(texts) if kind == "char" else _bpe_tokenizer(texts, vocab_size, show_progress)
    return _finished(backend, kind)


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("`texts` must hold some text, got none")


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning("the corpus gave %d of %d entries", tokenizer.get_vocab_size(), vocab_size)
    return tokenizer


def _character_tokenizer(texts: Iterable[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted({character for text in texts for character in set(text)})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    # No entry has the name of the unknown token, so that an unknown character is an error.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown character|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _finished(backend, kind: str):
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, mask = SPECIAL_TOKENS
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    unknown = {"unk_token": pad} if kind == "bpe" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        mask_token=mask,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **unknown,
    )


def read_texts(args: SourceArguments, max_rows: int | None = None) -> Iterator[str]:
    """
    The texts of all sources in order, with a progress bar. A chat gives one text per message, with its role before it,
    as the chat template writes it.

    Raises:
        DataError: At a broken row, unless `args.on_bad_rows` is "skip".
    """
    from tqdm.auto import tqdm

    if not args.data:
        raise ValueError("`data` must name at least one source, got none")
    policy = RowPolicy(args.on_bad_rows)
    examples = (ex for source in resolve_sources(args.data, args) for ex in read_examples(source, policy))
    bar = tqdm(examples, desc="Reading", unit=" rows", total=max_rows, disable=None, delay=1)
    for number, example in enumerate(bar, start=1):
        yield from _texts_of(example)
        if number == max_rows:
            break
    bar.close()
    if policy.counts:
        logger.warning("skipped %d broken rows: %s", policy.counts.total(), dict(policy.counts))


def _texts_of(example: Example) -> Iterator[str]:
    if example.messages is not None:
        for message in example.messages:
            calls = (json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ())
            yield "\n".join(text for text in (message["role"], message["content"], *calls) if text)
    elif example.text is not None:
        yield example.text
    else:
        yield example.prompt + example.completion


def save_tokenizer(tokenizer, folder: str | os.PathLike, overwrite: bool = False) -> bool:
    """
    Saves a tokenizer so that a killed process leaves none that is half new.

    Args:
        folder (`str` or `os.PathLike`): Other files in it stay.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace another tokenizer.

    Returns:
        `bool`: Whether anything was written: the same tokenizer is left as it is.

    Raises:
        `ValueError`: if the folder holds another tokenizer, and `overwrite` is not set. A model with its rows would
            read other tokens.
    """
    folder = Path(folder)
    partial = folder.absolute().with_name(f"{folder.absolute().name}.{uuid.uuid4().hex}.partial")
    try:
        tokenizer.save_pretrained(partial)
        last = "tokenizer.json"  # which makes a folder a tokenizer's
        names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == last, name))
        if (folder / last).exists():
            if all(_same_file(partial / name, folder / name) for name in names):
                return False
            if not overwrite:
                raise ValueError(
                    f"`output_dir` holds another tokenizer: choose another folder or set `overwrite`, got {folder}"
                )
        if not folder.exists():
            os.replace(partial, folder)
            return True
        for name in names:
            os.replace(partial / name, folder / name)
        return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def main(argv: list[str] | None = None) -> None:
    """Parses arguments (or `--config file.yaml`), trains, saves, and says what was made and what comes next."""
    from nanollada.trainers.commands.parser import Parser
    from nanollada.trainers.commands.programs import command_of

    (args,) = Parser(TokenizerArguments).parse_args_and_config(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.output_dir is None:
        raise ValueError("`output_dir` must be given, got None")
    texts, watched = read_texts(args, args.max_rows), sys.stderr.isatty()
    tokenizer = train_tokenizer(texts, args.vocab_size, args.kind, show_progress=watched)
    written = save_tokenizer(tokenizer, args.output_dir, args.overwrite)
    there = "" if written else " (unchanged: it was there)"
    print(f"{args.kind} tokenizer with {len(tokenizer):,} entries: {args.output_dir}{there}")
    words = ["--data", *args.data, "--tokenizer_name_or_path", args.output_dir]
    words += ["--output_dir", Path(args.output_dir).with_name("ar")]
    print(f"Next: {command_of('train-causal', *words)}")
