"""Writes text with an AR or a diffusion checkpoint: continues a prompt, fills its gaps, or chats."""

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

from nanollada.trainers.scoring.kind import is_diffusion


def _own_settings() -> dict:
    """`OWN_SETTINGS` of the models' package, which is not imported with them: help needs no torch."""
    package = sys.modules["_nanollada_rules"] = ModuleType("_nanollada_rules")
    package.__path__ = find_spec("nanollada.modeling_nanollada").submodule_search_locations
    return import_module("_nanollada_rules.rules_nanollada").OWN_SETTINGS


OWN_SETTINGS = _own_settings()
DIFFUSION_ONLY = tuple(OWN_SETTINGS)
DEFAULT_NEW_TOKENS = 128  # where neither the call nor the checkpoint says; transformers' 20 cuts most answers
TRACE_FORMATS = (".html", ".gif")
DRAWN_TOGETHER = 16  # rows of a task that share a generator where tokens are drawn, whatever the batch size


@dataclass
class CheckpointArguments:
    """Which model."""

    checkpoint: str = field(metadata={"help": "Folder of a checkpoint, or a model's name on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoint."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})


@dataclass
class _DecodingArguments:
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Tokens to write; {DEFAULT_NEW_TOKENS} where the checkpoint doesn't say."}
    )
    temperature: float | None = field(default=None, metadata={"help": "0: always the likeliest token."})
    top_k: int | None = field(default=None, metadata={"help": "Draw from the k likeliest tokens; 0: from all."})
    top_p: float | None = field(default=None, metadata={"help": "Draw from the likeliest tokens of this total mass."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1: less of what was said."})
    use_cache: bool | None = field(
        default=None, metadata={"help": "Keep keys and values where that is exact (default)."}
    )

    def given(self) -> dict:
        """The options that were set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _option(name: str, setting) -> tuple:
    kind = Literal[setting.allowed] if setting.type is str else setting.type
    return name, kind | None, field(default=None, metadata={"help": f"Diffusion: {setting.help}"})


DecodingArguments = make_dataclass(
    "DecodingArguments",
    [_option(name, setting) for name, setting in OWN_SETTINGS.items()],
    bases=(_DecodingArguments,),
    namespace={
        "__doc__": "How tokens are chosen. What is not given is the checkpoint's `generation_config.json`'s to say.",
        "__module__": __name__,
    },
)


@dataclass
class GenerateArguments(CheckpointArguments):
    """What to write."""

    prompt: str | None = field(default=None, metadata={"help": "Text to go on from. Without it you chat."})
    chat: bool = field(default=False, metadata={"help": "The prompt is a message, to be answered."})
    system: str | None = field(default=None, metadata={"help": "System message of a chat."})
    infill: bool = field(
        default=False,
        metadata={"help": "Diffusion: fill the <|mask|> tokens of the prompt; write more only with max_new_tokens."},
    )
    seed: int = field(default=0, metadata={"help": "Of whatever is drawn."})
    watch: bool = field(default=False, metadata={"help": "Show the text while it comes about."})
    watch_delay: float = field(default=0.05, metadata={"help": "Seconds to look at each step (terminals only)."})
    trace: str | None = field(default=None, metadata={"help": "An .html or .gif file for an animation of it."})

    def __post_init__(self):
        for name in ("trace", "infill"):
            if getattr(self, name) and self.prompt is None:
                raise ValueError(f"`{name}` needs a `prompt`, got {getattr(self, name)!r} without one")
        if self.trace is not None and Path(self.trace).suffix not in TRACE_FORMATS:
            raise ValueError(f"`trace` must be a file that ends in {' or '.join(TRACE_FORMATS)}, got {self.trace!r}")
        is_chat = self.chat or self.prompt is None
        if self.infill and is_chat:
            raise ValueError("`infill` fills plain text: it must not be set with `chat`, got True for both")
        if self.system is not None and not is_chat:
            raise ValueError(f"`system` is part of a chat: it needs `chat`, got {self.system!r} without it")
        if self.watch_delay < 0:
            raise ValueError(f"`watch_delay` must be >= 0, got {self.watch_delay}")


@dataclass
class Generated:
    """
    What one `generate` call gave.

    Attributes:
        text (`str`): The new text without special tokens; of an infilled prompt the whole text.
        tokens (`int`): Tokens decided and kept, the end of text included.
        finished (`bool`): Whether the model ended the text itself (EOS).
        seconds (`float`): Wall time of the call.
        first_token_seconds (`float`): Wall time until the first forward pass had decided something.
        tokens_per_forward (`float`): `tokens` by forward passes; 1.0 for AR.
    """

    text: str
    tokens: int
    finished: bool
    seconds: float
    first_token_seconds: float
    tokens_per_forward: float


def load_checkpoint(checkpoint: str, trust_remote_code: bool = False, device: str | None = None):
    """
    The model, AR or diffusion as its config says, in float32 and ready to evaluate; and its tokenizer.

    Raises:
        `ValueError`: if the checkpoint lacks tensors or has others, or the tokenizer is not the model's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import nanollada.modeling_nanollada  # noqa: F401, registers the classes
    from nanollada.trainers.data.encoding import check_tokenizer
    from nanollada.trainers.models import load_model

    model = load_model(AutoModelForCausalLM, checkpoint, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    check_tokenizer(model, tokenizer)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def prompt_ids(tokenizer, prompt: str | list[dict], infill: bool = False) -> list[int]:
    """
    Token ids of a prompt, as the model met such text in training: control tokens that somebody wrote out in it
    (`<|im_end|>`) are text, and those of the chat template are control.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompt (`str` or `list[dict]`): Plain text, or messages, which the chat template renders.
        infill (`bool`, defaults to `False`): Mask tokens in plain text are places to fill, not text.

    Raises:
        `ValueError`: for messages without a chat template or that it refuses, and for text that the vocabulary cannot
            spell.
    """
    from nanollada.trainers.data.chats import render_prompt
    from nanollada.trainers.data.encoding import encode_spans
    from nanollada.trainers.data.sources import BadRow

    # Pretraining rows begin every document with <|endoftext|> (the pad token), for both models: AR predicts the first
    # token from it, and diffusion saw it as visible context. SFT rows begin with the template's own first token.
    context = [tokenizer.pad_token_id] if isinstance(prompt, str) else []
    text, literal = prompt, None
    try:
        if not isinstance(prompt, str):
            if not tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template: a plain `prompt` must be given, got a chat")
            rendered = render_prompt(tokenizer, prompt)
            text, literal = rendered.text, rendered.literal
        elif infill:
            literal = _around(text, tokenizer.mask_token)
        return context + encode_spans(tokenizer, text, [(0, len(text))], literal)[0]
    except BadRow as error:
        rule = "be spelt by the tokenizer's vocabulary" if error.reason == "not in the vocabulary" else "be usable"
        raise ValueError(f"`prompt` must {rule}, got {error}") from error


def _around(text: str, token: str) -> list[tuple[int, int]]:
    """(start, end) of what stands around a token in a text."""
    places = [(match.start(), match.end()) for match in re.finditer(re.escape(token), text)]
    starts, ends = [0, *(end for _, end in places)], [*(start for start, _ in places), len(text)]
    return list(zip(starts, ends, strict=True))


def generation_settings(model, **given) -> dict:
    """
    What `model.generate` gets for the options that were given (`None`: not given); the rest is left to the checkpoint.

    An AR model gets `do_sample` to fit the temperature, and no truncation to 50 tokens (transformers' default for
    sampling) unless somebody asked for it: AR and diffusion shall draw from the same distribution.

    Raises:
        `ValueError`: for values out of range, options that an AR model has no use for, and `top_k` or `top_p` where
            nothing is drawn.
    """
    from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig

    settings = {name: value for name, value in given.items() if value is not None}
    NanoLLaDAGenerationConfig(**settings)  # checks the values, for AR models, too
    config = model.generation_config
    if is_diffusion(model):
        temperature = settings.get("temperature", config.get_temperature())
    else:
        for name in DIFFUSION_ONLY:
            if name in settings:
                raise ValueError(f"`{name}` is for diffusion models, got {settings[name]!r} for an autoregressive one")
        temperature = settings.pop("temperature", None)
        if temperature is None:
            temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0
        else:
            settings |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        if temperature and config.top_k is None:
            settings.setdefault("top_k", 0)
    for name in ("top_k", "top_p"):
        if given.get(name) and not temperature:
            raise ValueError(f"`{name}` needs a `temperature` above 0, got {given[name]} and a greedy choice")
    if config.max_new_tokens is None and config.max_length is None:
        settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    return settings


def effective_settings(model, **given) -> dict:
    """What decides the text, to be reported: the options that were given, and the checkpoint's own."""
    names = [item.name for item in fields(DecodingArguments) if item.name != "use_cache"]  # changes no text
    own = {name: getattr(model.generation_config, name, None) for name in names}
    settings = {**own, **generation_settings(model, **given)}
    return {name: value for name, value in settings.items() if value is not None}


def draws(model, **given) -> bool:
    """Whether what `generate` writes with these options depends on a seed."""
    from nanollada.modeling_nanollada.rules_nanollada import rule_of

    settings, config = generation_settings(model, **given), model.generation_config
    if not is_diffusion(model):
        return bool(settings.get("do_sample", config.do_sample))
    own = SimpleNamespace(**{name: settings.get(name, getattr(config, name, None)) for name in OWN_SETTINGS})
    random = own.remasking == "random" or rule_of(own).draws
    return bool(settings.get("temperature", config.get_temperature()) or random)


@contextlib.contextmanager
def default_decoding(model):
    """Within it `model.generate` knows the special tokens of the checkpoint's generation config, and nothing else."""
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    plain = type(own)(**{name: getattr(own, name) for name in names})
    if not is_diffusion(model):  # one that samples excludes the mask by itself
        plain.suppress_tokens = [model.config.mask_token_id]
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own


def keyed_seed(*key) -> int:
    """A generator's seed that belongs to the key: numbers, texts, `None`."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generate(model, input_ids, attention_mask, seed: int, **settings):
    """`model.generate` whose draws depend on `seed` alone; the global random state stays as it is."""
    import torch

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict_in_generate": False}
    if is_diffusion(model):
        return model.generate(**inputs, generator=torch.Generator().manual_seed(seed), **settings)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return model.generate(**inputs, **settings)


def eos_ids(model) -> set[int]:
    """Token ids that end a text."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def refuse_masks(model, tokenizer, ids: list[int]) -> None:
    """Raises a ValueError for mask tokens in the prompt of an AR model."""
    if tokenizer.mask_token_id in ids and not is_diffusion(model):
        raise ValueError(f"`prompt` must not hold {tokenizer.mask_token} for an autoregressive model, got it")


def generate(model, tokenizer, ids: list[int], *, seed: int = 0, recorder=None, **given) -> Generated:
    """
    Generates from one prompt.

    Args:
        model, tokenizer: Of `load_checkpoint`.
        ids (`list[int]`): The prompt, of `prompt_ids`.
        seed (`int`, defaults to 0): Of whatever is drawn.
        recorder ([`~scripts.trace.StepRecorder`], *optional*): To keep or show the steps; made right before the call.
        given: Options, see `generation_settings`.

    Raises:
        `ValueError`: as `generation_settings` and `model.generate`; for mask tokens in the prompt of an AR model.
    """
    import time

    import torch

    from nanollada.scripts.tracing.recorder import StepRecorder

    infill = tokenizer.mask_token_id in ids
    refuse_masks(model, tokenizer, ids)
    settings = generation_settings(model, **given)
    input_ids = torch.tensor([ids], device=model.device)
    # Without a mask, transformers would take the leading <|endoftext|> for padding.
    attention_mask = torch.ones_like(input_ids)
    started = time.perf_counter()
    recorder = StepRecorder(tokenizer) if recorder is None else recorder
    output = seeded_generate(model, input_ids, attention_mask, seed, streamer=recorder, **settings)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    row = output[0].tolist()
    start = 0 if infill else len(ids)
    return Generated(
        text=tokenizer.decode(row[start:], skip_special_tokens=True),
        tokens=recorder.decided,
        finished=not eos_ids(model).isdisjoint(row[len(ids) :]),
        seconds=seconds,
        first_token_seconds=recorder.seconds[0],
        tokens_per_forward=recorder.tokens_per_forward,
    )


def chat(
    answer: Callable[[list[dict], int], str],
    *,
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> list[dict]:
    """
    Talks until `/quit` or the end of the input. The whole history goes to the model each turn.

    Args:
        answer (`Callable`): From the messages so far and the turn's number to the answer, which it has also shown.
        system (`str`, *optional*): First message.
        read, write (`Callable`): Where messages come from, and where notes to the user go.

    Returns:
        `list[dict]`: The history.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    messages, turn = list(first), 0
    write("/reset forgets the conversation, /quit ends it.")
    while True:
        try:
            text = read("> ").strip()
        except EOFError:
            return messages
        if text == "/quit":
            return messages
        if text == "/reset":
            messages = list(first)
            write("Forgotten.")
        elif text.startswith("/"):
            write(f"There are /reset and /quit, and no {text.split()[0]}.")
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer(messages, turn)})
            turn += 1


def _recorder(args: GenerateArguments, tokenizer):
    from nanollada.scripts.tracing.recorder import StepRecorder, TerminalWatcher, TraceRecorder

    if args.watch:
        return TerminalWatcher(tokenizer, delay=args.watch_delay)
    return StepRecorder(tokenizer) if args.trace is None else TraceRecorder(tokenizer)


def _write_and_show(args, model, tokenizer, ids, seed, **options) -> tuple[Generated, object]:
    """Generates and prints the text, and counts on the error stream."""
    recorder = _recorder(args, tokenizer)
    try:
        made = generate(model, tokenizer, ids, seed=seed, recorder=recorder, **options)
    finally:
        if args.watch:
            recorder.close()
    if recorder.is_diffusion or not args.watch:  # a watched AR text stands there already
        print(made.text)
    end = "" if made.finished or args.infill else ", cut off at `max_new_tokens`"
    print(
        f"[{made.tokens} tokens in {made.seconds:.2f} s, {made.tokens_per_forward:.2f} per forward pass{end}]",
        file=sys.stderr,
    )
    return made, recorder


def run(args: GenerateArguments, decoding: DecodingArguments) -> None:
    """
    One prompt or a chat, as the arguments say.

    Raises:
        `ValueError`: as `generate`; if `infill` and the prompt's mask tokens don't go together.
    """
    model, tokenizer = load_checkpoint(args.checkpoint, args.trust_remote_code, args.device)
    options = decoding.given()
    generation_settings(model, **options)  # before anybody types a word
    if args.prompt is None:
        prompt_ids(tokenizer, [{"role": "user", "content": "?"}])

        def answer(messages, turn):
            ids = _checked_prompt(args, model, tokenizer, messages)
            return _write_and_show(args, model, tokenizer, ids, args.seed + turn, **options)[0].text

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, line editing for `input`, where Python has it
        chat(answer, system=args.system, read=input)
        return
    prompt = args.prompt
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompt = [*system, {"role": "user", "content": args.prompt}]
    ids = _checked_prompt(args, model, tokenizer, prompt)
    if args.infill:
        options.setdefault("max_new_tokens", 0)
    _, recorder = _write_and_show(args, model, tokenizer, ids, args.seed, **options)
    if args.trace is not None:
        settings = {"model": args.checkpoint, "seed": args.seed, **effective_settings(model, **options)}
        _write_trace(recorder, Path(args.trace), args.prompt, settings)


def _write_trace(recorder, path: Path, title: str, settings: dict) -> None:
    from nanollada.scripts.tracing.gif import write_gif
    from nanollada.scripts.tracing.recorder import trace_page

    if path.suffix == ".gif":
        write_gif(recorder, path)
    else:
        path.write_text(trace_page(recorder, title, settings), encoding="utf-8")
    print(f"[{path}]", file=sys.stderr)


def _checked_prompt(args, model, tokenizer, prompt) -> list[int]:
    if args.infill and not is_diffusion(model):
        raise ValueError(f"`infill` needs a diffusion model, got {type(model).__name__}")
    ids = prompt_ids(tokenizer, prompt, infill=True)
    if (tokenizer.mask_token_id in ids) != args.infill:
        raise ValueError(
            f"`infill` must be set for a `prompt` with {tokenizer.mask_token}, and only then, got {args.infill}"
        )
    return ids


def main(argv: list[str] | None = None) -> None:
    """Parses arguments (or `--config file.yaml`) and generates."""
    from trl import TrlParser

    run(*TrlParser((GenerateArguments, DecodingArguments)).parse_args_and_config(argv))
