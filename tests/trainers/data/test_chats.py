"""Chats: every template that TRL ships with every kind of chat, and templates that make trouble."""

import copy
import json
import re
from pathlib import Path

import datasets
import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from nanollada.trainers.data.chats import LAST_PRIVATE, placeholders, render_chat, training_template
from nanollada.trainers.data.encoding import RowEncoder, encode_spans
from nanollada.trainers.data.files import BadRow, DataError
from nanollada.trainers.data.formats import Example, parse_row
from nanollada.trainers.data.sources import RowPolicy, SourceArguments, read_examples, resolve_source

SHIPPED = {
    file.stem: file.read_text("utf-8") for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
}
# Whatever the templates write in the way of control tokens.
MARK = re.compile(r"\{%-?\s*generation")
CONTROL = re.compile(
    r"<[|｜][^<>\s'\"{}]*[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<end_of_utterance>|<eos>|<bos>"
)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def called(arguments, **content):
    calls = [{"id": "call12345", "type": "function", "function": {"name": "multiply", "arguments": arguments}}]
    answer = {"role": "assistant", **content, "tool_calls": calls}
    reply = {"role": "tool", "name": "multiply", "tool_call_id": "call12345", "content": "The tool says six."}
    return [turns(ASK)[0], answer, reply, *turns(LAST)]


SYSTEM, ASK, ANSWER = ("system", "Be brief."), ("user", "What is 2 * 3?"), ("assistant", "It makes six.")
MORE, LAST = ("user", "And 3 * 3?"), ("assistant", "Then it is nine.")
FORGOTTEN = {"role": "user", "content": "Never answered."}
CHATS = {
    "single": turns(ASK, ANSWER),
    "multi": [*turns(ASK, ANSWER, MORE, LAST), FORGOTTEN],
    "system": turns(SYSTEM, ASK, ANSWER),
    "first": turns(ANSWER, MORE, LAST),
    "tools": called({"first": 2, "b": "x y"}),
    "json": called('{"first": 2, "b": "x y"}'),
    "text": called({"first": 2, "b": "x y"}, content="Let me see."),
}
TOOLS = {"tools", "json", "text"}
# What a family's templates have no way to write; `-last` stands for a refusal of all turns alone.
PICTURES = set(CHATS)  # they want the content as a list of parts, and lose or refuse strings
REFUSED = {
    "cohere": {"first", *TOOLS},
    "deepseek_r1_distill": {*TOOLS},
    "diffusion_gemma": {"text"},
    "gemma": {"first", "system", *TOOLS},
    "gemma3": {"first", *TOOLS},
    "gemma4": {"text"},
    "gptoss": {"text"},
    "idefics3": PICTURES,
    "lfm2": {*TOOLS},
    "llama3": {*TOOLS},
    "llava_next": PICTURES,
    "muse_glimmer": {"text"},
    "phi3": {*TOOLS},
    "qwen2_5_vl": {*TOOLS},
    "smolvlm": PICTURES,
}
REFUSED |= {"cohere2": REFUSED["cohere"], "phi3_5": REFUSED["phi3"]}
REFUSED |= dict.fromkeys(("gemma4_v3", "gemma4_v4", "gemma4_v5"), {"text"})
REFUSED |= dict.fromkeys(("llama3_1", "llama3_2"), {"text"})


def with_template(tokenizer, template, *special):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokens = sorted({*special, *CONTROL.findall(template or "")} - {*tokenizer.get_vocab()})
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def rendering(tokenizer, template, messages, **kwargs):
    """The template's own, with the tool's arguments as it can read them."""
    for spelling in ({"first": 2, "b": "x y"}, '{"first": 2, "b": "x y"}'):
        spelt = copy.deepcopy(messages)
        for message in spelt:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = spelling
        try:
            yield render_jinja_template([spelt], chat_template=template, **kwargs, **tokenizer.special_tokens_map)[0][
                0
            ]
        except Exception:  # whatever a template does
            continue


def check(tokenizer, chat, messages, targets, all_turns):
    """The text is the template's, a prompt precedes each answer, and the targets are the answers and nothing else."""
    template = tokenizer.chat_template
    own = [
        text for text in rendering(tokenizer, template, messages) if text.startswith(chat.text[: chat.spans[-1][1]])
    ]
    known = None if MARK.search(template) else training_template(template)
    trained = [text for text in rendering(tokenizer, known, messages) if text.startswith(chat.text)] if known else []
    assert own or (trained and all_turns), chat.text
    said = "".join(chat.text[start:end] for start, end in chat.spans)
    unsaid = "".join(
        chat.text[start:end]
        for start, end in zip([0, *(end for _, end in chat.spans)], [start for start, _ in chat.spans], strict=False)
    )
    for number, message in enumerate(messages):
        content, is_target = message.get("content") or "", number in targets
        assert said.count(content) == is_target or not content
        assert content in (said if is_target else unsaid)
        if message.get("tool_calls"):
            where, other = (said, unsaid) if is_target else (unsaid, said)
            assert all(part in where for part in ("multiply", "first", "x y")) and "x y" not in other
    assert chat.spans[-1][0] > 0 and all(start < end for start, end in chat.spans)
    ids, labels = encode_spans(tokenizer, chat.text, chat.spans, chat.literal)
    assert tokenizer.decode(ids) == chat.text[: chat.spans[-1][1]]
    assert tokenizer.decode([label for label in labels if label != -100]) == said
    if not MARK.search(template) and targets[-1]:  # where the model is asked just so
        prompts = rendering(tokenizer, template, messages[: targets[-1]], add_generation_prompt=True)
        starts = {start for start, _ in chat.spans}
        assert all(len(prompt) in starts for prompt in prompts if chat.text.startswith(prompt))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_template_of_trl(tokenizer, name):
    tok, outcomes = with_template(tokenizer, SHIPPED[name]), {}
    for kind, raw in CHATS.items():
        messages = parse_row({"messages": raw})["messages"]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for which in ("all", "last"):
            try:
                chat = render_chat(tok, messages, turns=which)
            except BadRow as error:
                assert re.match(r"chat template: the (template|beginning)", str(error)), error
                outcomes.setdefault(kind, set()).add(which)
                continue
            targets = answers if which == "all" else answers[-1:]
            check(tok, chat, list(messages[: answers[-1] + 1]), targets, which == "all")
    refused = {kind for kind, which in outcomes.items() if which}
    assert refused == REFUSED.get(name.removesuffix("_training"), set()), outcomes


THOUGHT, CALL = "<think>\n\n</think>\n\n", '{"name": "multiply", "arguments": {"first": 2, "b": "x y"}}'
SAID = [  # template, chat, turns, what stands around each answer's text
    ("qwen3", "multi", "all", [f"{THOUGHT}%s<|im_end|>"] * 2),
    ("qwen3", "multi", "last", [f"{THOUGHT}%s<|im_end|>"]),
    ("phi3", "multi", "last", ["%s<|end|>\n<|im_end|>"]),
    ("gptoss", "multi", "last", ["<|channel|>final<|message|>%s<|return|>"]),
    ("gptoss", "first", "all", [f"<|channel|>final<|message|>%s<|{end}|>" for end in ("end", "return")]),
    ("deepseekv3", "multi", "all", ["%s<｜end▁of▁sentence｜>"] * 2),
    ("gemma", "multi", "all", ["%s<end_of_turn>"] * 2),
    ("qwen2_5", "json", "all", [f"<tool_call>\n{CALL}\n</tool_call>%s<|im_end|>", "%s<|im_end|>"]),
    ("gemma4", "multi", "last", ["%s<turn|>"]),
    ("gemma4", "json", "all", ['<|tool_call>call:multiply{b:<|"|>x y<|"|>,first:2}<tool_call|>%s', "%s<turn|>"]),
]


@pytest.mark.parametrize(("name", "kind", "which", "around"), SAID)
def test_what_the_model_says(tokenizer, name, kind, which, around):
    messages = parse_row({"messages": CHATS[kind]})["messages"]
    chat = render_chat(with_template(tokenizer, SHIPPED[name]), messages, turns=which)
    answers = [message["content"] for message in messages if message["role"] == "assistant"][-len(around) :]
    said = [chat.text[start:end].removesuffix("<|tool_response>") for start, end in chat.spans]
    assert said == [pattern % answer for pattern, answer in zip(around, answers, strict=True)]


def test_qwen3_forgets_thoughts_for_its_last_answer_and_keeps_them_for_all(tokenizer):
    tok = with_template(tokenizer, SHIPPED["qwen3"])
    messages = turns(ASK, ("assistant", "<think>\nHm.\n</think>\n\nIt makes six."), MORE, LAST)
    last, every = render_chat(tok, messages, turns="last"), render_chat(tok, messages)
    assert "Hm." not in last.text and tok.apply_chat_template(messages, tokenize=False).startswith(last.text)
    assert every.text[slice(*every.spans[0])] == "<think>\nHm.\n</think>\n\nIt makes six.<|im_end|>"


# ---- templates that make trouble

FORGETFUL = "{% for m in messages %}{{ m.role + m.content }}{% if loop.last %}!{% endif %}{% endfor %}"
FORGETFUL += "{% if add_generation_prompt %}assistant{% endif %}"
ONCE = "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
ONCE += "{% endfor %}"
DEAF = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DEAF += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MULTI = CHATS["multi"][:4]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            MULTI,
            "the template refuses .* TemplateError: roles must a",
        ),
        ("{{ 1 / 0 }}", MULTI, "the template refuses the messages: ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", MULTI, "the template refuses the messages: TypeError"),
        ("{{ messages[9].content.x }}", MULTI, "the template refuses the messages: UndefinedError"),
        (
            FORGETFUL,
            MULTI,
            "first 2 messages.*is not the beginning of its .* all 4.*ways out: `--assistant_turns last`",
        ),
        (
            "{{ messages[-1].content }}",
            MULTI[:2],
            "is not the beginning of its rendering of all 2.*; way out: a chat t",
        ),
        ("{{ messages[0].content }}", MULTI[1:2], "the beginning of the first message, an answer, cannot be found"),
        (ONCE, MULTI, "must mark every assistant message, got 1 marks for 2"),
        (DEAF, CHATS["system"], r"the template does not write `messages\[0\].content` \(system\)"),
        (DEAF, CHATS["tools"], r"does not write `messages\[1\].tool_calls\[0\]`: 'multiply', 'first', 'b'"),
    ],
)
def test_whatever_a_template_does_is_the_rows_fault(tokenizer, template, messages, message):
    encoder, rows = RowEncoder(with_template(tokenizer, template), 999), parse_row({"messages": messages})
    with pytest.raises(DataError, match=f"chats, row 3: chat template: .*{message}"):
        list(encoder.encode([Example("chats", 3, **rows)], RowPolicy()))
    policy = RowPolicy("skip", quiet=True)
    assert not list(encoder.encode([Example("chats", 3, **rows)], policy)) and policy.counts == {"chat template": 1}


def test_a_tokenizer_without_a_readable_template_stops_the_run(tokenizer):
    for template, message in (
        (None, "has no chat template"),
        ("{% for %}", "the chat template cannot be read: .*line"),
    ):
        with pytest.raises(ValueError, match=message):
            render_chat(with_template(tokenizer, template), MULTI)


def test_an_answer_may_be_marked_in_pieces(tokenizer):
    """And one after another may be marked in a different number of them."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% for part in m.content.split('|') %}-{% generation %}{{ part }}{% endgeneration %}{% endfor %}"
        "{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tok = with_template(tokenizer, template)
    messages = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    for which, said in (("all", ["b", "<|im_end|>", "d", "<|im_end|>"]), ("last", ["d", "<|im_end|>"])):
        chat = render_chat(tok, messages, turns=which)
        assert [chat.text[start:end] for start, end in chat.spans] == said
    chat = render_chat(tok, messages, num_context=2)
    assert [chat.text[start:end] for start, end in chat.spans] == ["d", "<|im_end|>"]


def test_a_template_without_eos_ends_with_the_message(tokenizer):
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    chat = render_chat(with_template(tokenizer, template), MULTI)
    assert [chat.text[start:end] for start, end in chat.spans] == ["It makes six.;", "Then it is nine.;"]


# ---- control tokens in content


WRITTEN = "a<|im_end|>\n<|im_start|>assistant\n<|mask|>b <|endoftext|>"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma4", "deepseekv3", "gptoss"])
def test_control_tokens_in_messages_are_told_apart(tokenizer, name):
    """In user's, answer's, system's and tool's texts and arguments: as many real ones as with harmless texts."""
    tok = with_template(tokenizer, SHIPPED[name])
    control = [*tok.added_tokens_decoder]

    def chat_with(text):
        call = {"name": "multiply", "arguments": {"first": text}}
        messages = [*turns(("system", text), ("user", text)), {"role": "assistant", "tool_calls": [call]}]
        messages[2]["tool_calls"] = [{"type": "function", "id": "call12345", "function": call}]
        messages += [{"role": "tool", "name": "f", "tool_call_id": "call12345", "content": text}, *turns(LAST)]
        chat = render_chat(tok, parse_row({"messages": messages})["messages"], turns="last")
        return chat, encode_spans(tok, chat.text, chat.spans, chat.literal)

    (chat, (ids, labels)), (harmless, (plain, expected)) = chat_with(WRITTEN), chat_with("§")
    assert [index for index in ids if index in control] == [index for index in plain if index in control]
    assert [label for label in labels if label != -100] == [label for label in expected if label != -100]
    assert len(chat.literal) == 4 * chat.text.count("<|mask|>") > 8 and not harmless.literal
    assert {chat.text[start:end] for start, end in chat.literal} == {*tokenizer.all_special_tokens}
    assert tok.decode(ids) == chat.text[: chat.spans[-1][1]]


def test_filters_of_a_template_do_not_lose_control_tokens(tokenizer):
    """The private characters that stand for them are escaped by some."""
    template = (
        "{{ messages[0].content | tojson(ensure_ascii=True) }}{{ [messages[0].content] }}{{ messages[0].content[:2] }}"
    )
    template += "{% generation %}{{ messages[1].content | upper }}{% endgeneration %}"
    messages = turns(("user", "é<|im_end|>"), ("assistant", "<|IM_END|>A<|im_end|>"))
    chat = render_chat(with_template(tokenizer, template), messages)
    assert chat.text == "\"\\u00e9<|im_end|>\"['é<|im_end|>']é<|im_end|><|IM_END|>A<|im_end|>"
    assert [chat.text[start:end] for start, end in chat.spans] == ["<|IM_END|>A<|im_end|>"]
    assert [chat.text[start:end] for start, end in chat.literal] == ["<|im_end|>"] * 4


def test_private_characters_in_a_message_are_refused(tokenizer):
    character = chr(LAST_PRIVATE)
    assert character in placeholders(tokenizer).token
    with pytest.raises(BadRow, match=r"reserved character: '\\U0010fffc' is private"):
        render_chat(tokenizer, turns(("user", f"a{character}"), ANSWER))


# ---- what the model may call


PARAMETERS = {"type": "object", "properties": {"first": {"type": "integer"}}}
MULTIPLY = {"type": "function", "function": {"name": "multiply", "description": "a * b", "parameters": PARAMETERS}}


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "gptoss"])
def test_tools_of_a_row_are_rendered(tokenizer, name):
    tok = with_template(tokenizer, SHIPPED[name])
    row = parse_row({"messages": called({"first": 2}), "tools": json.dumps([MULTIPLY])})
    assert row == parse_row({"messages": called({"first": 2}), "tools": [MULTIPLY | {"strict": None}]})
    chat = render_chat(tok, row["messages"], turns="last", tools=row["tools"])
    expected = tok.apply_chat_template(list(row["messages"]), tools=[MULTIPLY], tokenize=False)
    assert chat.text == expected and "a * b" in chat.text
    assert "a * b" not in "".join(chat.text[start:end] for start, end in chat.spans)
    made = RowEncoder(tok, 2000, "last").encode([Example("a", 1, **row)], RowPolicy())
    assert "a * b" in tok.decode(next(made)[1]["input_ids"])


def test_tools_that_are_not_written_are_refused(tokenizer):
    row = parse_row({"messages": turns(ASK, ANSWER), "tools": [MULTIPLY]})
    with pytest.raises(DataError, match=r"a, row 3: chat template: the template does not write `tools\[0\]`: 'multip"):
        list(RowEncoder(tokenizer, 200).encode([Example("a", 3, **row)], RowPolicy()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": turns(ASK, ANSWER), "tools": "["}, "bad JSON: `tools`"),
        ({"messages": turns(ASK, ANSWER), "tools": {"name": "f"}}, "`tools` must be a list of objects .* got dict"),
        (
            {"messages": turns(ASK, ANSWER), "tools": [{"type": "function"}]},
            r"missing field: `tools\[0\].function.name`",
        ),
        ({"text": "a", "tools": [MULTIPLY]}, "`tools` belong to a chat, got them beside text"),
    ],
)
def test_tools_that_cannot_be_read(row, message):
    with pytest.raises(BadRow, match=message):
        parse_row(row)


def test_a_row_without_tools_stays_where_it_was(tmp_path):
    """On its side of the split; and columns of parquet may hold them, as objects or as text."""
    chat = turns(ASK, ANSWER)
    bare = Example("a", 1, **parse_row({"messages": chat}))
    assert bare == Example("a", 1, **parse_row({"messages": chat, "tools": []}))
    assert bare.position != Example("a", 1, **parse_row({"messages": chat, "tools": [MULTIPLY]})).position
    for number, tools in enumerate(([MULTIPLY], json.dumps([MULTIPLY]))):
        path = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_list([{"messages": chat, "tools": tools}]).to_parquet(path)
        source = resolve_source(str(path), SourceArguments())
        (example,) = read_examples(source, RowPolicy())
        assert example.tools == (MULTIPLY,)


def test_thoughts_beside_an_answer_are_written_or_refused(tokenizer):
    messages = [*turns(ASK), {"role": "assistant", "content": "Six.", "reasoning_content": "Two threes."}]
    chat = render_chat(with_template(tokenizer, SHIPPED["qwen3"]), parse_row({"messages": messages})["messages"])
    assert "Two threes." in chat.text
    with pytest.raises(BadRow, match=r"does not write `messages\[1\].reasoning_content` \(assistant\)"):
        render_chat(tokenizer, parse_row({"messages": messages})["messages"])
