"""A prompt or a chat, as `generate.py`'s arguments say."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanollada.scripts.decoding.checkpoint import CheckpointArguments, load_checkpoint, prompt_ids
from nanollada.scripts.decoding.settings import DecodingArguments, effective_settings
from nanollada.scripts.decoding.writing import Generated, generate
from nanollada.scripts.reporting.fonts import FONT_HELP, check_font
from nanollada.trainers.records import write_whole
from nanollada.trainers.scoring.kind import is_diffusion

TRACE_FORMATS = (".html", ".gif")


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
    font: str | None = field(default=None, metadata={"help": FONT_HELP})

    def __post_init__(self):
        for name in ("trace", "infill"):
            if getattr(self, name) and self.prompt is None:
                raise ValueError(f"`{name}` needs a `prompt`, got {getattr(self, name)!r} without one")
        if self.trace is not None and Path(self.trace).suffix not in TRACE_FORMATS:
            raise ValueError(f"`trace` must be a file that ends in {' or '.join(TRACE_FORMATS)}, got {self.trace!r}")
        check_font(self.font, "trace", self.trace)
        is_chat = self.chat or self.prompt is None
        if self.infill and is_chat:
            raise ValueError("`infill` fills plain text: it must not be set with `chat`, got True for both")
        if self.system is not None and not is_chat:
            raise ValueError(f"`system` is part of a chat: it needs `chat`, got {self.system!r} without it")
        if self.watch_delay < 0:
            raise ValueError(f"`watch_delay` must be >= 0, got {self.watch_delay}")


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


def run(args: GenerateArguments, decoding: DecodingArguments | None = None) -> Generated | list[dict]:
    """
    Writes and prints what the arguments say: the text that one prompt gives, or a chat with who sits there.

    Args:
        args ([`GenerateArguments`]): Checkpoint and prompt.
        decoding ([`DecodingArguments`], *optional*): What is not given is the checkpoint's to say.

    Returns:
        `Generated` or `list[dict]`: What was written, or the chat's messages.

    Raises:
        `ValueError`: as `generate`; if `infill` and the prompt's mask tokens don't go together.
    """
    model, tokenizer = load_checkpoint(args.checkpoint, args.trust_remote_code, args.device)
    options = {} if decoding is None else decoding.given()
    settings = {"model": args.checkpoint, "seed": args.seed, **effective_settings(model, **options)}  # or refuses them
    if args.prompt is None:
        prompt_ids(tokenizer, [{"role": "user", "content": "?"}])  # before anybody types a word

        def answer(messages, turn):
            ids = _checked_prompt(args, model, tokenizer, messages)
            return _write_and_show(args, model, tokenizer, ids, args.seed + turn, options)[0].text

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, line editing for `input`, where Python has it
        return chat(answer, system=args.system, read=input)
    prompt = args.prompt
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompt = [*system, {"role": "user", "content": args.prompt}]
    ids = _checked_prompt(args, model, tokenizer, prompt)
    if args.infill:
        options.setdefault("max_new_tokens", 0)
        settings.update(effective_settings(model, **options))
    written, recorder = _write_and_show(args, model, tokenizer, ids, args.seed, options)
    if args.trace is not None:
        _write_trace(recorder, Path(args.trace), args.prompt, settings, args.font)
    return written


def _checked_prompt(args, model, tokenizer, prompt) -> list[int]:
    if args.infill and not is_diffusion(model):
        raise ValueError(f"`infill` needs a diffusion model, got {type(model).__name__}")
    ids = prompt_ids(tokenizer, prompt, infill=True)
    if (tokenizer.mask_token_id in ids) != args.infill:
        raise ValueError(
            f"`infill` must be set for a `prompt` with {tokenizer.mask_token}, and only then, got {args.infill}"
        )
    return ids


def _write_and_show(args, model, tokenizer, ids, seed, options) -> tuple[Generated, object]:
    """Generates and prints the text, and counts on the error stream."""
    from nanollada.scripts.tracing.recorder import StepRecorder, TraceRecorder
    from nanollada.scripts.tracing.terminal import TerminalWatcher

    if args.watch:
        recorder = TerminalWatcher(tokenizer, delay=args.watch_delay)
    else:
        recorder = StepRecorder(tokenizer) if args.trace is None else TraceRecorder(tokenizer)
    try:
        written = generate(model, tokenizer, ids, seed=seed, recorder=recorder, **options)
    finally:
        if args.watch:
            recorder.close()
    if recorder.is_diffusion or not args.watch:  # a watched AR text stands there already
        print(written.text)
    end = "" if written.finished or args.infill else ", cut off at `max_new_tokens`"
    counts = f"{written.tokens} tokens in {written.seconds:.2f} s, {written.tokens_per_forward:.2f} per forward pass"
    edits = "".join(f", {count} {name}" for name, count in written.edits.items())
    print(f"[{counts}{edits}{end}]", file=sys.stderr)
    return written, recorder


def _write_trace(recorder, path: Path, title: str, settings: dict, font: str | None) -> None:
    from nanollada.scripts.tracing.gif import write_gif
    from nanollada.scripts.tracing.page import trace_page

    if path.suffix == ".gif":
        write_gif(recorder, path, font)
    else:
        write_whole(path, trace_page(recorder, title, settings))
    print(f"[{path}]", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Parses arguments (or `--config file.yaml`) and generates."""
    from nanollada.trainers.commands.parser import Parser

    run(*Parser((GenerateArguments, DecodingArguments)).parse_args_and_config(argv))
