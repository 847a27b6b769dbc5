"""What the kinds share that let a model write."""

from typing import ClassVar

from nanollada.scripts.decoding.checkpoint import prompt_ids
from nanollada.scripts.decoding.settings import DecodingArguments, draws, generation_settings, split_options
from nanollada.scripts.decoding.writing import DRAWN_TOGETHER, keyed_seed
from nanollada.scripts.evaluation.answers import answers_to, batches_of_prompts, shares_length
from nanollada.scripts.evaluation.bench import Bench, Row, Task, mapping, settings
from nanollada.trainers.data.formats import parse_row


@settings
class WrittenTask(Task):
    """A task that lets a model write: greedily, unless `decoding` says otherwise."""

    chat: bool | None = None  # a text is a user's message; by default as the row's format says
    decoding: dict = mapping()

    needs_data: ClassVar[bool] = False
    greedy: ClassVar[dict] = {"temperature": 0.0}

    def complete(self, given: dict, wrong) -> None:
        """As every task's, and decoding is checked before any model is loaded."""
        super().complete(given, wrong)
        self.check_decoding(wrong)

    def check_decoding(self, wrong, presets: dict[str, dict] | None = None) -> None:
        """Names and values of decoding, alone or as each preset changes them (by the name of its setting)."""
        from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig

        known = [name for name in DecodingArguments.__dataclass_fields__ if name != "max_new_tokens"]
        for place, part in {"decoding": self.decoding, **(presets or {})}.items():
            for name, value in part.items():
                if name == "max_new_tokens":
                    raise wrong(f"{place}.{name}", "left out: it is a setting of the task itself", value)
                if name not in known:
                    raise wrong(f"{place}.{name}", f"an option of decoding: {', '.join(known)}", value)
                if value is None:
                    raise wrong(f"{place}.{name}", "left out or set", value)
        for place, part in (presets or {"decoding": {}}).items():
            options = {**self.greedy, **self.decoding, **part}
            drawn = [name for name in ("top_k", "top_p") if options.get(name)]
            if options.get("temperature") == 0 and drawn:
                raise wrong(place, f"valid (`{drawn[0]}` needs a `temperature` above 0)", options)
            try:
                NanoLLaDAGenerationConfig(**options)
            except ValueError as error:
                raise wrong(place, f"valid ({error})", options) from error


def own_settings(bench: Bench, decoding: dict) -> dict:
    """The options that this kind of model has; those of diffusion go to diffusion models alone."""
    return split_options(decoding)["diffusion" if bench.is_diffusion else "ar"]


def write_answers(bench: Bench, task: Task, prompts: list[list[int]], decoding: dict) -> list[tuple[list[int], bool]]:
    """
    The new token ids of each prompt up to the first EOS, and whether there was one. Greedy answers come in batches of
    prompts of like length; drawn ones in fixed groups, in order where as many tokens follow every prompt, each with a
    seed of its own.
    """
    settings, drawn = generation_settings(bench.model, **decoding), draws(bench.model, **decoding)
    size = DRAWN_TOGETHER if drawn else bench.batch_size
    batches = batches_of_prompts(bench.model, prompts, size, settings)
    if drawn and shares_length(bench.model, settings):
        every = range(len(prompts))
        batches = (list(every[start : start + DRAWN_TOGETHER]) for start in every[::DRAWN_TOGETHER])
    said = {}
    for places in batches:
        seed = keyed_seed(bench.seed, task.name, len(said))
        answers = answers_to(bench.model, bench.tokenizer, [prompts[place] for place in places], seed, settings)
        said.update(zip(places, answers, strict=True))
        bench.progress(len(places))
    return [said[place] for place in range(len(prompts))]


def training_row(row: Row, task: Task, values: dict | None = None) -> dict:
    """A row with an answer in the training formats: `asked`, as the data room reads it, and the `answers`."""
    with row.faults():
        asked = parse_row(row.values if values is None else values)
    if "text" in asked:
        raise row.error("it must have an answer to compare with, got a plain `text`")
    answer = asked["messages"][-1]["content"] if "messages" in asked else asked["completion"]
    if "messages" in asked and asked["messages"][-1]["role"] != "assistant":
        raise row.error("`messages` must end with the answer of the assistant")
    if task.chat not in (None, "messages" in asked):
        kind = "messages" if "messages" in asked else "a `prompt` and `completion` of strings"
        raise row.error(f"`chat` of task {task.name} must be left out for {kind}, got {task.chat}")
    return {"asked": asked, "answers": [answer]}


def check_prompt(row: Row, task: Task) -> dict:
    """`prompt`: a text, or messages that end before the answer."""
    messages = row.values.get("messages", row.values.get("conversations"))
    prompt = row.values.get("prompt", row.values.get("text", messages))
    if isinstance(prompt, list):
        while prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
        training_row(row, task, {"messages": [*prompt, {"role": "assistant", "content": "."}]})
        return {"prompt": prompt}
    return {"prompt": row.string("prompt", prompt)}


def prompts_of(bench: Bench, task: Task, rows: list[Row]) -> list[list[int]]:
    """Token ids of the prompts, checked; with `chat` a text is a user's message."""
    prompts = []
    for row in rows:
        prompt = row.values["prompt"]
        prompt = [{"role": "user", "content": prompt}] if task.chat and isinstance(prompt, str) else prompt
        with row.faults():
            prompts.append(prompt_ids(bench.tokenizer, prompt))
        bench.require_room(row, len(prompts[-1]) + task.max_new_tokens, "prompt and text")
    return prompts
