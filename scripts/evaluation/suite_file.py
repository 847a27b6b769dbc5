"""A suite's file: its tasks are parsed and checked, and every error names file and task."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError

from nanollada.scripts.evaluation.bench import Task, rule_of
from nanollada.scripts.evaluation.kinds import KINDS


def read_suite(path: str | Path) -> tuple[str, list[Task]]:
    """
    The description and the tasks of a YAML or JSON file `{"description": …, "tasks": [{…}, …]}`.

    Raises:
        `ValueError`: naming file and task, for whatever is missing, unknown, of another type, without effect, or there
            twice.
    """
    content = read_content(path)
    tasks = [parse_task(item, f"{path}, task {number}") for number, item in enumerate(content["tasks"], start=1)]
    names = [task.name.lower() for task in tasks]  # some file systems don't know case
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"`name` must be another for each task, got {twice[0]!r} twice in {path}")
    return str(content.get("description", "")), tasks


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


def parse_task(item: Any, place: str) -> Task:
    """
    One task of the class that its kind has, from a mapping that is checked as a whole.

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
    task_class = KINDS[kind].task
    settings = task_class.__dataclass_fields__
    if unknown := [key for key in item if key not in settings]:
        own = ", ".join(task_class.own())
        raise wrong(unknown[0], f"no setting of a {kind} task: its own are {own}", item[unknown[0]])
    task = task_class(name=name, kind=kind)
    for key, value in item.items():
        try:
            setattr(task, key, value)
        except StrictDataclassFieldValidationError as error:
            raise wrong(key, rule_of(settings[key]), value) from error
        if value is None:
            raise wrong(key, rule_of(settings[key]), value)
    task.complete(item, wrong)
    return task
