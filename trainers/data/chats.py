"""Chats: from messages to the template's text, where its answers stand in it, and which of its parts are content."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nanollada.trainers.data.files import BadRow
from nanollada.trainers.data.formats import tool_name

LAST_PRIVATE = 0x10FFFC  # near the end of Unicode's last private area, which no text uses
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = "a chat template with `{% generation %}` marks around each answer"
WAYS_OUT = f"ways out: `--assistant_turns last`, which needs the beginning of the last answer alone, or {MARKS}"


@dataclass(frozen=True)
class RenderedChat:
    """
    A chat as the template writes it, up to the end of its last answer.

    Attributes:
        text (`str`): The text.
        spans (`tuple[tuple[int, int]]`): (start, end) of the characters that the model says, in order.
        literal (`tuple[tuple[int, int]]`): (start, end) of the control tokens that are content: somebody wrote them
            out in a message, and they are text. All others are the template's own.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    literal: tuple[tuple[int, int], ...] = ()


class Placeholders:
    """
    One private character for each special token of a tokenizer, to stand in for it where a message spells it, so that
    what the template writes itself can be told apart. A template sees the character: it can't cut it in two.

    Tokens that are merely added (Qwen3's `<think>`, `<tool_call>`) are none of these: answers are made of them.

    Args:
        tokens (`Iterable[str]`): The special tokens.
    """

    def __init__(self, tokens: Iterable[str]):
        tokens = sorted((token for token in tokens if not token.isspace()), key=lambda token: (-len(token), token))
        self.character = {token: chr(LAST_PRIVATE - number) for number, token in enumerate(tokens)}
        self.token = {character: token for token, character in self.character.items()}
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        # As the templates' filters write them: `tojson` with ASCII only, and the strings inside of a printed dict.
        for character, token in list(self.token.items()):
            self.token |= {json.dumps(character)[1:-1]: token, repr(character)[1:-1]: token}
        self._characters = re.compile("|".join(map(re.escape, self.token)) or "(?!)")

    def hide(self, value: Any) -> Any:
        """
        A copy of a message, or of any part of one, with its control tokens replaced.

        Raises:
            BadRow: If it holds one of the private characters.
        """
        if isinstance(value, str):
            if clash := self._characters.search(value):
                raise BadRow("reserved character", f"{clash[0]!a} is private and stands for a control token")
            return self._tokens.sub(lambda match: self.character[match[0]], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(part) for part in value]
        return value

    def show(self, text: str, spans: Sequence[tuple[int, int]] = ()) -> RenderedChat:
        """The text with the tokens back in their places, where they are, and the spans moved with it."""
        pieces, literal, shifts, end, length = [], [], [], 0, 0
        for match in self._characters.finditer(text):
            token = self.token[match[0]]
            pieces += [text[end : match.start()], token]
            length += len(pieces[-2]) + len(token)
            literal.append((length - len(token), length))
            end = match.end()
            shifts.append((end, length - end))
        moved = [tuple(place + _shift(shifts, place) for place in span) for span in spans]
        return RenderedChat("".join([*pieces, text[end:]]), tuple(moved), tuple(literal))


def _shift(shifts: list[tuple[int, int]], place: int) -> int:
    return next((shift for end, shift in reversed(shifts) if end <= place), 0)


def placeholders(tokenizer) -> Placeholders:
    """Those of a tokenizer's special tokens."""
    return _placeholders(tuple(special_tokens(tokenizer).values()))


_placeholders = lru_cache(Placeholders)


def special_tokens(tokenizer) -> dict[int, str]:
    """The special tokens by their ids: the control tokens, which no text is made of."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def render_prompt(tokenizer, messages: Sequence[dict]) -> RenderedChat:
    """
    Renders messages up to where the model's answer begins. Control tokens in a message are text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Must have a chat template.
        messages (`Sequence[dict]`): With `role` and `content`.

    Raises:
        BadRow: If the template refuses the messages.
        ValueError: If the tokenizer has no usable template.
    """
    return placeholders(tokenizer).show(render_hidden(tokenizer, messages, add_generation_prompt=True))


def render_hidden(tokenizer, messages: Sequence[dict], **kwargs) -> str:
    """
    The template's text, in which [`Placeholders`] stand for the control tokens of the messages. Raises as
    `render_prompt`; `kwargs` are the template's and those of `render_jinja_template`.
    """
    return _render(tokenizer, chat_template(tokenizer), placeholders(tokenizer).hide(messages), **kwargs)[0]


@dataclass(frozen=True)
class _WithTools:
    """A tokenizer whose chats begin with what the model may call."""

    tokenizer: Any
    tools: list[dict]

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def render_chat(
    tokenizer, messages: Sequence[dict], num_context: int = 0, turns: str = "all", tools: Sequence[dict] | None = None
) -> RenderedChat:
    """
    Renders a chat up to its last answer, and finds the answers.

    A template's own `{% generation %}` marks say what an answer is. Without them it is what a message adds to the
    prompt before it, the rendering of the messages so far with the beginning of an answer, up to its closing special
    token; each prompt must be the beginning of the whole rendering. Templates that are not so, as they rewrite earlier
    turns (Qwen3's forgets what was thought), are replaced by TRL's training template for the same family. With
    `turns="last"` only the last prompt must be such a beginning, and the template's own rendering is kept.

    The `arguments` of tool calls may be an object or its JSON: the template gets the object, or the JSON if it can do
    nothing with that.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Must have a chat template.
        messages (`Sequence[dict]`): With `role` and `content`, and `tool_calls` of an assistant. Those behind the last
            answer are left out.
        num_context (`int`, *optional*, defaults to 0): How many leading messages are never targets.
        turns (`str`, *optional*, defaults to `"all"`): "all" or "last": which answers the spans are.
        tools (`Sequence[dict]`, *optional*): What the model may call; the template must write their names.

    Raises:
        BadRow: If the template refuses the messages, leaves out a part of them, or hides where the answers are.
        ValueError: If the tokenizer has no usable template.
    """
    template, hidden = chat_template(tokenizer), placeholders(tokenizer)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    targets = answers[-1:] if turns == "last" else [number for number in answers if number >= num_context]
    messages = hidden.hide(messages[: answers[-1] + 1])
    if tools:
        tokenizer = _WithTools(tokenizer, hidden.hide(tools))
    faults = []
    for spelt in _spellings(messages):
        for find, used in _methods(template, last=turns == "last"):
            try:
                text, spans = find(tokenizer, used, spelt, targets)
            except BadRow as error:
                faults.append((0, error))
                continue
            try:
                _check_written(text, spelt, targets, spans, getattr(tokenizer, "tools", ()))
            except BadRow as error:
                faults.append((1, error))
                continue
            return hidden.show(text, [span for part in spans for span in part])
    raise max(faults, key=lambda fault: fault[0])[1]  # of the way that went furthest


def chat_template(tokenizer) -> str:
    """
    The template of a tokenizer, which can be read.

    Raises:
        ValueError: If it has none, or one with an error of syntax.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which chat rows need: set `tokenizer.chat_template`")
    template = tokenizer.get_chat_template()
    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template cannot be read: {error} (line {error.lineno})") from error
    return template


@lru_cache
def training_template(template: str) -> str | None:
    """TRL's training template for the family whose template this is: prefixes stay, answers are marked. Or `None`."""
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    class Known:
        """All that TRL's comparison needs. Whether tools are rendered, which it would try out, is no matter here."""

        chat_template = template

        def apply_chat_template(self, *args, **kwargs):
            raise TemplateError

    try:
        return get_training_chat_template(Known())
    except ValueError:  # no such family
        return None


def _methods(template: str, last: bool) -> list[tuple]:
    """(how to find the answers, with which template), the best first."""
    if GENERATION.search(template):
        return [(_marked, template)]
    known = training_template(template)
    return [(_by_prefixes, template), *([(_trained, known)] if known else [])]


def _spellings(messages: list[dict]) -> Iterator[list[dict]]:
    """The messages with the arguments of tool calls as objects, which most templates want, and then as JSON."""
    if not any(message.get("tool_calls") for message in messages):
        yield messages
        return
    for spell in (_as_object, _as_json):
        yield [
            {key: _spelt(part, spell) if key == "tool_calls" else part for key, part in m.items()} for m in messages
        ]


def _as_object(given: str | dict) -> dict:
    return json.loads(given) if isinstance(given, str) else given


def _as_json(given: str | dict) -> str:
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _spelt(calls: list[dict], spell) -> list[dict]:
    respelt = []
    for call in calls:
        function = call.get("function", call)
        function = {**function, "arguments": spell(function["arguments"])}
        respelt.append({**call, "function": function} if "function" in call else function)
    return respelt


def _render(tokenizer, template: str, messages: list[dict], **kwargs) -> tuple[str, list]:
    # What `apply_chat_template` calls. That would turn the marked spans into whole tokens, also those that begin
    # before the answer; `encode_spans` needs the characters.
    from transformers.utils.chat_template_utils import render_jinja_template

    if GENERATION.search(template):
        kwargs["return_assistant_tokens_mask"] = True
    try:
        kwargs |= {"tools": getattr(tokenizer, "tools", None), **tokenizer.special_tokens_map}
        texts, spans = render_jinja_template([messages], chat_template=template, **kwargs)
    except Exception as error:  # a template can do what Python can
        raise BadRow("chat template", f"the template refuses the messages: {type(error).__name__}: {error}") from error
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _marked(tokenizer, template: str, messages: list[dict], targets: list[int]) -> tuple[str, list]:
    """The spans of the template's marks, as many for an answer as it has."""
    text, spans = _render(tokenizer, template, messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    counts = list(range(1, len(answers) + 1))
    if len(spans) != len(answers):  # those of an answer are what its message adds
        earlier = (_render(tokenizer, template, messages[: number + 1])[1] for number in answers[:-1])
        counts = [*(_common(part, spans) for part in earlier), len(spans)]
    owned = {
        number: [span for span in spans[start:end] if span[0] < span[1]]
        for number, start, end in zip(answers, [0, *counts], counts, strict=False)
    }
    if not all(owned.values()):
        raise BadRow(
            "chat template",
            f"the template must mark every assistant message, got {len(spans)} marks for {len(answers)}",
        )
    return text, [owned[number] for number in targets]


def _common(one: Sequence, other: Sequence) -> int:
    """How many elements two sequences have in common, from the first on."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _trained(tokenizer, template: str, messages: list[dict], targets: list[int]) -> tuple[str, list]:
    """The marks of TRL's templates, from where a prompt ends (some mark that too) to the closing special token."""
    text, spans = _marked(tokenizer, template, messages, targets)
    for number, part in zip(targets, spans, strict=True):
        start, end = part[0]
        prompt = _render(tokenizer, template, messages[:number], add_generation_prompt=True)[0] if number else ""
        if number and text.startswith(prompt):
            start = max(start, len(prompt))
        else:
            start = _behind(tokenizer, _opening(tokenizer, template, messages), text, start)
        part[0] = (start, end)
        start, end = part[-1]
        part[-1] = (start, _end(tokenizer, text[:end], start))
    return text, spans


def _behind(tokenizer, opening: str, text: str, start: int) -> int:
    """Where what a prompt adds to a chat, or its first special tokens, ends in a text, at `start` or behind it."""
    tokens = [token for token in special_tokens(tokenizer).values() if token.strip()]
    ends = [len(opening), *(match.end() for token in tokens for match in re.finditer(re.escape(token), opening))]
    places = [start + k for end in ends for k in range(1, end + 1) if text[: start + k].endswith(opening[:end])]
    return max(places, default=start)


def _by_prefixes(tokenizer, template: str, messages: list[dict], targets: list[int]) -> tuple[str, list]:
    """The span of each answer: what its message adds to its prompt, up to its closing special token."""
    text, spans = _render(tokenizer, template, messages)[0], []
    for number in targets:
        upto = text if number + 1 == len(messages) else _render(tokenizer, template, messages[: number + 1])[0]
        prompt = _prompt(tokenizer, template, messages, number, text)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise BadRow(
                "chat template",
                f"the template's rendering of the first {number + 1} messages, or of the prompt before them, is not "
                f"the beginning of its rendering of all {len(messages)}: the answer cannot be found; "
                + (WAYS_OUT if number + 1 < len(messages) else f"way out: {MARKS}"),
            )
        spans.append([(len(prompt), _end(tokenizer, upto, len(prompt)))])
    return text, spans


def _prompt(tokenizer, template: str, messages: list[dict], number: int, text: str) -> str:
    """What the model sees before it says a message."""
    if number:
        return _render(tokenizer, template, messages[:number], add_generation_prompt=True)[0]
    opening = _opening(tokenizer, template, messages)  # no template renders an empty chat
    if not opening or opening not in text:
        raise BadRow("chat template", f"the beginning of the first message, an answer, cannot be found; {WAYS_OUT}")
    return text[: text.index(opening) + len(opening)]


def _opening(tokenizer, template: str, messages: list[dict]) -> str:
    """What a prompt adds to a chat: the beginning of an answer."""
    plain = _render(tokenizer, template, messages[:2])[0]
    begun = _render(tokenizer, template, messages[:2], add_generation_prompt=True)[0]
    start = _common(begun, plain)
    for token in special_tokens(tokenizer).values():  # two may begin alike
        found = begun.rfind(token, 0, start + len(token))
        if found < start < found + len(token) and found >= 0:
            start = found
    return begun[start:]


def _end(tokenizer, text: str, start: int) -> int:
    """Behind the answer's EOS, else behind the special token that closes the text, else at its end."""
    eos = text.rfind(tokenizer.eos_token, start) if tokenizer.eos_token else -1
    if eos >= 0:
        return eos + len(tokenizer.eos_token)
    shown = text.rstrip()
    closed = any(shown.endswith(token, start) for token in special_tokens(tokenizer).values() if token.strip())
    return len(shown) if closed else len(text)


def _check_written(text: str, messages: list[dict], targets: list[int], spans: list, tools: Sequence[dict]) -> None:
    """Raises a BadRow for a part of the messages that is left out, an answer outside of its span, or others within."""
    said = {
        number: _squeezed("".join(text[start:end] for start, end in part))
        for number, part in zip(targets, spans, strict=True)
    }
    cuts = [0, *(cut for part in spans for span in part for cut in span), len(text)]
    given = _squeezed(" ".join(text[start:end] for start, end in zip(cuts[::2], cuts[1::2], strict=True)))
    for number, tool in enumerate(tools):
        if _squeezed(tool_name(tool)) not in given:
            raise BadRow("chat template", f"the template does not write `tools[{number}]`: {tool_name(tool)!r}")
    for number, message in enumerate(messages):
        place, where = said.get(number, given), f"`messages[{number}]"
        # Thoughts may be left out of earlier turns, or be moved.
        content = (message.get("content") or "").rpartition("</think>")[2]
        if not any(_squeezed(spelt) in place for spelt in (content, json.dumps(content, ensure_ascii=False)[1:-1])):
            raise BadRow("chat template", f"the template does not write {where}.content` ({message['role']})")
        for key in THOUGHTS if number in said else ():
            if message.get(key) and _squeezed(str(message[key])) not in place:
                raise BadRow("chat template", f"the template does not write {where}.{key}` (assistant)")
        for call_number, call in enumerate(message.get("tool_calls") or ()):
            _check_call(call.get("function", call), place, f"{where}.tool_calls[{call_number}]`")


def _check_call(function: dict, place: str, where: str) -> None:
    given = function["arguments"]
    if isinstance(given, str) and _squeezed(json.dumps(given, ensure_ascii=False)) in place:
        raise BadRow("chat template", f"the template writes the arguments of {where} as a string within a string")
    names = [function["name"], *_as_object(given)]
    if missing := [name for name in names if _squeezed(name) not in place]:
        raise BadRow("chat template", f"the template does not write {where}: {', '.join(map(repr, missing))}")


def _squeezed(text: str) -> str:
    """Without the white space, which templates cut and add."""
    return re.sub(r"\s+|\\n|\\t|\\r", "", text)
