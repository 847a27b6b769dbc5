"""What a suite's file may say: the kinds of tasks, each one's settings and their defaults, and what goes together."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanollada.scripts.decoding.writing import DecodingArguments

LANGUAGES = ("en", "zh")
VERIFIERS = ("exact", "qa", "arithmetic", "countdown", "sudoku")
PRESETS = {
    "cfg": {"off": {"cfg_scale": 0.0}, "on": {"cfg_scale": 1.5}},
    # LLaDA 1.0 decides one token a step in blocks; 2.0 all that is surer than a threshold (2512.15745, §3.5)
    "llada_styles": {"llada_1": {"block_length": 32}, "llada_2": {"block_length": 32, "threshold": 0.95}},
}
COUNT, TEXT, FLAG, SETTINGS, NAME = "a whole number from 1 on", "a string", "true or false", "a mapping", "one of "
PAIR = "a whole number from 2 on"  # a context token, and one that is scored
PATTERN, COLUMNS = "a regular expression", "a mapping of names to names"
TEMPLATE = "a string that asks the {question}, with the {context} or without, and has no other {name}"
SCORED = {"eval_block_length": (None, "a whole number from 0 on")}
ASKED = {
    "puzzle": (None, f"{NAME}arithmetic, countdown, sudoku"),
    "rows": (100, COUNT),
    "puzzle_options": ({}, SETTINGS),
    "verify": (None, NAME + ", ".join(VERIFIERS)),
    "chat": (None, FLAG),  # None: a text of a question is a user's message, else as the row's format says
    "template": (None, TEMPLATE),
    "max_new_tokens": (None, COUNT),
    "decoding": ({}, SETTINGS),
}
# Of each setting its default and its rule. A default of None means that nothing is set.
KINDS = {
    "text": {"max_length": (512, PAIR), "rolling_context": (None, COUNT), **SCORED},
    "choice": {"delimiter": (None, TEXT), "suffix": ("", TEXT), **SCORED},
    "cloze": {"delimiter": (None, TEXT), **SCORED},
    "pairs": {**SCORED},
    "generation": ASKED,
    "presets": {**ASKED, "presets": ("cfg", SETTINGS)},
    "statistics": {
        **{"rows": (32, COUNT), "max_new_tokens": (128, COUNT), "chat": (None, FLAG)},
        "decoding": ({"temperature": 1.0}, SETTINGS),
    },
    "speed": {
        **{"max_new_tokens": (128, COUNT), "repeats": (3, COUNT), "chat": (True, FLAG)},
        "decoding": ({}, SETTINGS),
    },
}
OF_DATA = {"data_split": TEXT, "data_config": TEXT, "columns": COLUMNS, "match": PATTERN}
COMMON = ("name", "kind", "language", "data", *OF_DATA, "limit")


def read_content(path: str | Path) -> dict:
    """
    The mapping of a YAML or JSON file with its list of `tasks`.

    Raises:
        `ValueError`: naming the file, if it is none, has no tasks or something else, or a key twice.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`suite` must be a YAML or JSON file, got {path}, which does not exist")
    try:
        text = path.read_text("utf-8")
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader), path)
        content = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`suite` must be a YAML or JSON file, got {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), list) or not content["tasks"]:
        raise ValueError(f"`suite` must hold a list of `tasks`, got none in {path}")
    if unknown := sorted(set(content) - {"description", "tasks"}, key=str):
        raise ValueError(f"`suite` must hold `description` and `tasks`, got `{unknown[0]}` in {path}")
    return content


def _refuse_repeated_keys(node: Any, path: Path) -> None:
    """Of a key that stands twice in a mapping, YAML would take the last value without a word."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            line = node.start_mark.line + 1
            raise ValueError(f"`{twice[0]}` must be there once, got it twice in the mapping of line {line} of {path}")
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_repeated_keys(part, path)


def checked_options(item: Any, place: str) -> dict:
    """
    The settings that a task's kind has, with its defaults, of a mapping that is checked as a whole.

    Raises:
        `ValueError`: naming `place`, task and setting, for what is missing, unknown, of another type, without effect,
            or contradicts something else.
    """

    def wrong(name: str, rule: str, value: Any) -> ValueError:
        return ValueError(f"{place}: `{name}` must be {rule}, got {value!r}")

    if not isinstance(item, dict):
        raise ValueError(f"{place}: must be a mapping, got {type(item).__name__}")
    name, kind = item.get("name"), item.get("kind")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name, re.A):
        raise wrong("name", "of letters, digits, _, - and .", name)
    place = f"{place} ({name})"
    if not isinstance(kind, str) or kind not in KINDS:
        raise wrong("kind", f"one of {', '.join(KINDS)}", kind)
    if unknown := [key for key in item if key not in KINDS[kind] and key not in COMMON]:
        raise wrong(unknown[0], f"no setting of a {kind} task: its own are {', '.join(KINDS[kind])}", item[unknown[0]])
    rules = {"data": TEXT, **OF_DATA, "limit": COUNT, "language": f"{NAME}{', '.join(LANGUAGES)}"}
    rules |= {key: rule for key, (_, rule) in KINDS[kind].items()}
    for key, rule in rules.items():
        if key in item and not _fits(item[key], rule) and not (key == "presets" and item[key] in list(PRESETS)):
            raise wrong(key, rule, item[key])
    options = {key: item.get(key, default) for key, (default, _) in KINDS[kind].items()}
    if "puzzle" in options:
        _complete_questions(options, item, wrong)
    if item.get("data") is None:
        _refuse_idle(kind, item, wrong)
    elif kind == "statistics":
        if "rows" in item:
            raise wrong("rows", "left out where `data` has the prompts", item["rows"])
        options.update(rows=None)
    if "presets" in options:
        _complete_presets(options, wrong)
    if "decoding" in options:
        _check_decoding(kind, options, wrong)
    return options


def _fits(value: Any, rule: str) -> bool:
    if rule.startswith("a whole number"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= int(rule.split()[4])
    if rule.startswith(NAME):
        return value in rule.removeprefix(NAME).split(", ")
    if rule == COLUMNS:
        return isinstance(value, dict) and all(isinstance(name, str) for pair in value.items() for name in pair)
    if rule in (FLAG, SETTINGS):
        return isinstance(value, bool if rule == FLAG else dict)
    if not isinstance(value, str) or rule == TEXT:
        return isinstance(value, str)
    return _is_pattern(value) if rule == PATTERN else _asks(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _asks(template: str) -> bool:
    names = re.findall(r"\{(\w+)\}", template)
    return "question" in names and set(names) <= {"context", "question"}


def _refuse_idle(kind: str, item: dict, wrong: Callable) -> None:
    """What a task without `data` lacks, or has no use for."""
    if kind in ("text", "choice", "cloze", "pairs"):
        raise wrong("data", "given", None)
    if idle := [name for name in (*OF_DATA, "template") if name in item]:
        raise wrong(idle[0], "left out where there is no `data`", item[idle[0]])


def _complete_questions(options: dict, item: dict, wrong: Callable) -> None:
    """The verifier, which may follow from the puzzle, and what contradicts them."""
    if (options["puzzle"] is None) == (item.get("data") is None):
        raise wrong("puzzle", "given where there is no `data`, and only there", options["puzzle"])
    if options["puzzle"] is None and (made := [name for name in ("rows", "puzzle_options") if name in item]):
        raise wrong(made[0], "of a `puzzle`", item[made[0]])
    options["verify"] = options["verify"] or options["puzzle"] or "exact"
    if options["puzzle"] not in (None, options["verify"]):
        raise wrong("verify", f"that of the puzzle, {options['puzzle']!r}", options["verify"])
    if options["puzzle"] is None:
        options.update(rows=None)


def _complete_presets(options: dict, wrong: Callable) -> None:
    """Presets by name."""
    presets = options["presets"]
    options["presets"] = PRESETS[presets] if isinstance(presets, str) else presets
    if bare := [name for name in options["presets"] if not isinstance(name, str)]:  # YAML's off and on are no words
        raise wrong("presets", "mappings by name (in quotes, where YAML reads a name otherwise)", bare[0])
    if len(options["presets"]) < 2 or not all(isinstance(part, dict) for part in options["presets"].values()):
        raise wrong("presets", f"two or more mappings by name, or {' or '.join(PRESETS)}", presets)


def _check_decoding(kind: str, options: dict, wrong: Callable) -> None:
    """Names and values of decoding, alone and as each preset changes them, before any model is loaded."""
    from nanollada.modeling_nanollada import NanoLLaDAGenerationConfig

    known = [name for name in DecodingArguments.__dataclass_fields__ if name != "max_new_tokens"]
    presets = {f"presets.{name}": part for name, part in options.get("presets", {}).items()}
    for place, part in {"decoding": options["decoding"], **presets}.items():
        for name, value in part.items():
            if name == "max_new_tokens":
                raise wrong(f"{place}.{name}", "left out: it is a setting of the task itself", value)
            if name not in known:
                raise wrong(f"{place}.{name}", f"an option of decoding: {', '.join(known)}", value)
            if value is None:
                raise wrong(f"{place}.{name}", "left out or set", value)
    greedy = {} if kind == "statistics" else {"temperature": 0.0}  # as `suite_generation.py` has it
    for place, part in (presets or {"decoding": {}}).items():
        whole = {**greedy, **options["decoding"], **part}
        if whole.get("temperature") == 0 and (drawn := [name for name in ("top_k", "top_p") if whole.get(name)]):
            raise wrong(place, f"valid (`{drawn[0]}` needs a `temperature` above 0)", whole)
        try:
            NanoLLaDAGenerationConfig(**whole)
        except ValueError as error:
            raise wrong(place, f"valid ({error})", whole) from error
