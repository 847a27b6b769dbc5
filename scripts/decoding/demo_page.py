"""The demo's page: one prompt, a diffusion model and an AR model beside it, and a slider over their steps."""

import contextlib
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

from nanollada.scripts.decoding.checkpoint import load_pair, prompt_ids, refuse_masks
from nanollada.scripts.decoding.examples import answers_chats, example_prompts
from nanollada.scripts.decoding.settings import (
    DEFAULT_NEW_TOKENS,
    OWN_SETTINGS,
    PRESETS,
    effective_settings,
    split_options,
)
from nanollada.scripts.decoding.writing import generate

TITLES = {"diffusion": "Diffusion", "ar": "Autoregressive"}  # in the order in which they write and stand
LARGEST_SEED = 2**63 - 1  # torch's
FIELDS = {
    "max_new_tokens": f"Tokens to write at most. Empty: the checkpoint's, or {DEFAULT_NEW_TOKENS}",
    "temperature": "0 or empty: the likeliest token",
    "steps": "Diffusion: per block. Empty: a token per step",
    "block_length": "Diffusion: tokens per block. Empty: the model's, or all",
    "threshold": "Diffusion: decide all that is surer than this",
    "edit_threshold": "Diffusion: then edit what another token is likelier for. 0: whenever. Empty: no edits",
    "edit_margin": "Diffusion: by how much likelier, in nats. Empty: 0.7",
    "edit_rule": "Diffusion: replace tokens as they stand, or mask each first (needs no training)",
    "preset": "Diffusion: a publication's way of decoding, with edits",
    "seed": "Of whatever is drawn",
}
CHOICES = {"edit_rule": OWN_SETTINGS["edit_rule"].allowed, "preset": tuple(PRESETS)}  # of the fields that are menus
TOKEN = "◆"  # in place of a special token's name
INTRODUCTION = f"""# nanollada

{{what}} Type or choose a prompt, press Enter, and watch the text come about.

Then move the slider back through the steps: a token's colour is the step that decided it, a block is undecided yet,
and {TOKEN} is a token without text, such as the end of a message. A token that replaced another is pink.
"""
WHAT = {
    True: "A diffusion model fills in its text in any order, an autoregressive model beside it writes left to right.",
    False: "A diffusion model fills in its text in any order.",
}
COLOURS = {  # neutral grays that can be read on the blocks of either scheme, and white on orange
    **dict.fromkeys(("block_info_text_color", "body_text_color_subdued", "block_title_text_color"), "*neutral_600"),
    **dict.fromkeys(("block_label_text_color", "input_placeholder_color"), "*neutral_600"),
    **dict.fromkeys(("block_info_text_color_dark", "body_text_color_subdued_dark"), "*neutral_300"),
    **dict.fromkeys(("block_title_text_color_dark", "block_label_text_color_dark"), "*neutral_200"),
    "input_placeholder_color_dark": "*neutral_400",
    **dict.fromkeys(("button_primary_background_fill", "button_primary_background_fill_dark"), "*primary_700"),
    **dict.fromkeys(
        ("button_primary_background_fill_hover", "button_primary_background_fill_hover_dark"), "*primary_800"
    ),
}
STYLE = """
#views > * { flex: 1 1 0; min-width: 0; }
@media (max-width: 700px) { #views { flex-direction: column; } #views > * { flex: none; width: 100%; } }
"""


@dataclass
class DemoArguments:
    """Which models, and where the page is."""

    diffusion: str = field(metadata={"help": "Folder or Hub name of the diffusion checkpoint."})
    ar: str | None = field(default=None, metadata={"help": "Folder or Hub name of an autoregressive checkpoint."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoints."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda if there is one, else cpu."})
    server_name: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: all."})
    server_port: int = field(default=7860, metadata={"help": "Port to listen on."})

    def __post_init__(self):
        if not 1 <= self.server_port <= 65535:
            raise ValueError(f"`server_port` must be between 1 and 65535, got {self.server_port}")


class Writing(NamedTuple):
    """
    A text of one model, in the making or done.

    Attributes:
        title (`str`): Its heading.
        settings (`dict`): What decides the text, to be shown.
        recorder ([`~scripts.tracing.live.LiveRecorder`]): Its steps so far.
        write (`Callable`): The `generate` call.
    """

    title: str
    settings: dict
    recorder: object
    write: Callable

    def show(self, step: int | None = None) -> str:
        """HTML of a step, by default the newest; of the last one if there are fewer."""
        from nanollada.scripts.tracing.page import trace_view

        last = len(self.recorder.steps)
        step = last if step is None else min(step, last)
        return trace_view(self.recorder, self.title, self.settings, step, special=TOKEN)


def read_fields(**values: str) -> dict:
    """
    Numbers and names out of a page's fields; empty ones are left out.

    Raises:
        `ValueError`: for what is no number, and for a seed that is none. All else is `generation_settings`' to judge.
    """
    given = {name: text for name, text in values.items() if text.strip()}
    given |= {name: _number(name, text) for name, text in given.items() if name not in CHOICES}
    seed = given.get("seed")
    if not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"`seed` must be an integer between 0 and {LARGEST_SEED}, got {seed}")
    return given


def _number(name: str, text: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise ValueError(f"`{name}` must be a number or empty, got {text!r}")


def prepare(pair: dict, names: dict, prompt: str, is_chat: bool, seed: int, **given) -> dict[str, Writing]:
    """
    What each model is about to write, all settings checked that can be before it begins.

    Args:
        pair (`dict`): Models and tokenizers, of `load_pair`.
        names (`dict`): What the models are called on the page.
        prompt (`str`): Text to go on from, or a message to answer.
        is_chat (`bool`): Which of them.
        seed (`int`): Of whatever is drawn.
        given: Options of `generate`; those that only diffusion knows go to the diffusion model alone.

    Raises:
        `ValueError`: as `prompt_ids` and `generation_settings`; for mask tokens in the prompt of an AR model.
    """
    from nanollada.scripts.tracing.live import LiveRecorder

    options, writings = split_options(given), {}
    for name in TITLES:
        if name not in pair:
            continue
        model, tokenizer = pair[name]
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if is_chat else prompt, infill=True)
        refuse_masks(model, tokenizer, ids)
        settings = {"model": names[name], "seed": seed, **effective_settings(model, **options[name])}
        recorder = LiveRecorder(tokenizer)

        def write(model=model, tokenizer=tokenizer, ids=ids, recorder=recorder, own=options[name]):
            recorder.restart()
            return generate(model, tokenizer, ids, seed=seed, recorder=recorder, **own)

        writings[name] = Writing(TITLES[name], settings, recorder, write)
    return writings


def write_all(writings: dict[str, Writing]) -> Iterator[dict[str, str]]:
    """
    Lets the models write, one after the other, so that neither slows the other down.

    Yields:
        `dict[str, str]`: The HTML that is new, by model; at last, with the texts' ends, that of all.
    """
    from nanollada.scripts.tracing.live import follow

    for name, writing in writings.items():
        for step in follow(writing.recorder, writing.write):
            yield {name: writing.show(step)}
        yield {name: writing.show()}


def count_steps(writings: dict[str, Writing]) -> int:
    """The most forward passes that a model has made."""
    return max((len(writing.recorder.steps) for writing in writings.values()), default=0)


def first_values(pair: dict) -> dict[str, str]:
    """What the fields start with: the diffusion checkpoint's own settings, and the seed 0."""
    settings = {"seed": 0, **effective_settings(pair["diffusion"][0])}
    return {name: str(settings.get(name, "")) for name in FIELDS}


def build_page(pair: dict, names: dict):
    """
    The page, as `gradio.Blocks`. It starts as the diffusion checkpoint says: with chat on for one that answers
    messages, its own decoding settings, and prompts of the kind that it knows.

    Args:
        pair (`dict`): Models and tokenizers, of `load_pair`.
        names (`dict`): What they are called on the page.
    """
    import gradio as gr

    shown = [name for name in TITLES if name in pair]
    tokenizer, start = pair["diffusion"][1], first_values(pair)
    chats = answers_chats(names["diffusion"], tokenizer)
    prompts = example_prompts(names["diffusion"], tokenizer, chats)

    def write(prompt, is_chat, *values):
        try:
            options = read_fields(**dict(zip(FIELDS, values, strict=True)))
            writings = prepare(pair, names, prompt, is_chat, **options)
            views = dict.fromkeys(shown, "")
            yield [writings, gr.Slider(interactive=False), *views.values()]
            for new in write_all(writings):
                views |= new
                yield [writings, gr.skip(), *views.values()]
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        yield [writings, open_slider(writings), *views.values()]

    def open_slider(writings):
        count = count_steps(writings)
        return gr.Slider(maximum=max(count, 1), value=count, interactive=count > 0)

    def look(step, writings):
        views = [writings[name].show(step) if writings[name].recorder.steps else "" for name in shown]
        return views if len(views) > 1 else views[0]

    with gr.Blocks(title="nanollada", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(INTRODUCTION.format(what=WHAT["ar" in pair]), elem_id="introduction")
        prompt = gr.Textbox(label="Prompt", max_lines=8, info="Enter writes.", elem_id="prompt")
        gr.Examples([[text] for text in prompts], [prompt], elem_id="examples")
        is_chat = gr.Checkbox(chats, label="Chat: the prompt is a message to answer", elem_id="chat")
        fields = []
        with gr.Row():  # of text, for an empty number field would count as 0
            for name, info in FIELDS.items():
                words = {"value": start[name], "label": name, "info": info, "elem_id": name}
                menu = [("none", ""), *CHOICES.get(name, ())]
                fields.append(gr.Dropdown(menu, **words) if name in CHOICES else gr.Textbox(**words))
        with gr.Row():
            go = gr.Button("Write", variant="primary", elem_id="write")
            stop = gr.Button("Stop", elem_id="stop")
        info = "The texts after so many forward passes of each model"
        slider = gr.Slider(0, 1, 0, step=1, label="Step", info=info, interactive=False, elem_id="step")
        with gr.Row(elem_id="views"):
            views = [gr.HTML(elem_id=name) for name in shown]
        writings = gr.State({})
        inputs, outputs = [prompt, is_chat, *fields], [writings, slider, *views]
        hidden = {"show_progress": "hidden"}
        writing = gr.on([go.click, prompt.submit], write, inputs, outputs, **hidden)
        stop.click(open_slider, writings, slider, cancels=[writing], **hidden)
        slider.input(look, [slider, writings], views, trigger_mode="always_last", **hidden)
    return page


def gradio_theme():
    """gradio's own look, with helper texts and buttons that can be read."""
    import gradio as gr

    return gr.themes.Default().set(**COLOURS)


def open_page(args: DemoArguments):
    """
    Loads the models and builds the page, which `launch()` then serves.

    Raises:
        `ValueError`: without gradio, and as `load_pair`.
    """
    if find_spec("gradio") is None:
        raise ValueError("the demo needs the package gradio (pip install 'nanollada[demo]'), which is not installed")
    pair = load_pair(args.ar, args.diffusion, args.trust_remote_code, args.device)
    return build_page(pair, {"ar": args.ar, "diffusion": args.diffusion})


def main(argv: list[str] | None = None) -> None:
    """Parses arguments (or `--config file.yaml`), loads the models and serves the page."""
    from nanollada.trainers.commands.parser import Parser

    (args,) = Parser((DemoArguments,)).parse_args_and_config(argv)
    address = {"server_name": args.server_name, "server_port": args.server_port}
    page = open_page(args)
    looks = {"theme": gradio_theme(), "css": STYLE, "footer_links": []}
    page.launch(**address, **looks, share=False, ssr_mode=False)
