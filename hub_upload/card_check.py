"""Whether a card says what the evaluation.json beside it holds, and nothing else.

[`card_faults`] makes the evaluation section and the `model-index` again from that file, and compares: a card cannot
say a number that no file holds. Above its functions this file imports the standard library and its neighbour only, so
that verify.py has it where nanollada is not installed.
"""

import json
import os
import re
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path

if __package__:
    from nanollada.hub_upload.card_results import COLUMNS, END, SOURCE_URL, START, eval_results, evaluation_section
    from nanollada.hub_upload.evaluation_file import EVALUATION, check_model, read_evaluation
else:  # verify.py runs by its path, without nanollada
    from card_results import COLUMNS, END, SOURCE_URL, START, eval_results, evaluation_section
    from evaluation_file import EVALUATION, check_model, read_evaluation

PLAIN = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")  # JSON, which every YAML reads alike


def card_faults(folder: str | os.PathLike) -> list[str]:
    """
    Compares a folder's card with the evaluation.json beside it.

    Every result of the card's `model-index` must be one of the file's, as an export writes it: same value, metric,
    dataset, error and settings, no other key, numbers in plain JSON; that some are left out is no fault. The marked
    section must be the file's, line by line (blank lines and the padding of table cells don't count). The file must be
    of the folder's weights and config. Prose outside the marks is the writer's own. Results of other tools in the
    `model-index` are faults, too: nobody could check them. A picture that the card shows must be in the folder.

    Args:
        folder (`str` or `os.PathLike`): With README.md, config.json and safetensors.

    Returns:
        `list[str]`: the faults, each naming the number or the line; empty for a good card.
    """
    folder = Path(folder)
    text = (folder / "README.md").read_text(encoding="utf-8-sig")
    section, faults = _marked(text)
    faults += [f"README.md shows {name}, got no such file in {folder.name}" for name in _pictures(text, folder)]
    try:
        found = _index_of(text)
    except Exception as error:  # whatever the YAML parser raises
        return [*faults, f"README.md must have readable metadata, got {error}"]
    said = [_say(result) for result in found] or _values_said(section) or section
    try:
        evaluation = _read_evaluation(folder)
    except ValueError as error:
        needed = said or (folder / EVALUATION).is_file()  # what is there must be good, even if no number is said
        return [*faults, f"{error}; README.md says {_some(said)}"] if needed else faults
    expected, source = _expected_index(evaluation), evaluation_section(evaluation)
    return [*faults, *_index_faults(found, expected), *_section_faults(section, source)]


def _pictures(text: str, folder: Path) -> list[str]:
    """What a card shows of its own folder and isn't there."""
    shown = re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", text)
    return [name for name in shown if "://" not in name and not (folder / name).is_file()]


def _read_evaluation(folder: Path) -> dict:
    path = folder / EVALUATION
    if not path.is_file():
        raise ValueError(f"`folder` must hold {EVALUATION}, got none in {folder.name}")
    evaluation = read_evaluation(path)
    check_model(evaluation, folder)
    return evaluation


# ---- the section


def _marked(text: str) -> tuple[list[str], list[str]]:
    """The lines between the marks, and what is wrong with the marks."""
    marks, section = (text.count(START), text.count(END)), ""
    faults = []
    if marks == (1, 1) and text.index(START) < text.index(END):
        before, _, rest = text.partition(START)
        section, _, after = rest.partition(END)
        text = before + after
    elif marks != (0, 0):
        faults.append(f"README.md must hold the marks of the evaluation once, in order, got {marks[0]} and {marks[1]}")
    if not faults and any(_head(line) == _head(" | ".join(COLUMNS)) for line in text.splitlines()):
        faults.append("README.md must keep the table of results between its marks, got one outside (export again?)")
    return [_canonical(line) for line in section.splitlines() if line.strip()], faults


def _head(line: str) -> tuple[str, ...]:
    """A line's cells as a table's head, whatever its case, its outer pipes and its emphasis."""
    cells = re.sub(r"[*_`]", "", line).strip("|> \t").casefold().split("|")
    return tuple(" ".join(cell.split()) for cell in cells)


def _canonical(line: str) -> str:
    """Without what formatters of Markdown change in a table."""
    line = line.strip()
    return re.sub(r"-{3,}", "---", re.sub(r"\s*\|\s*", "|", line)) if line.startswith("|") else line


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else []


def _values_said(section: list[str]) -> list[str]:
    """Lines of the table, without its head."""
    rows = [", ".join(_cells(line)) for line in section if line.startswith("|")]
    return [row for row in rows if row != ", ".join(COLUMNS) and not row.startswith("---")]


def _section_faults(section: list[str], source: str) -> list[str]:
    """A card may leave the whole section out, and no line of it."""
    if not section:
        return []
    expected = [_canonical(line) for line in source.splitlines() if line.strip()][1:-1]  # without the marks
    faults = []
    for tag, start, end, other, other_end in SequenceMatcher(None, section, expected, False).get_opcodes():
        pairs = zip_longest(section[start:end], expected[other:other_end]) if tag != "equal" else ()
        faults += [_difference(mine, theirs) for mine, theirs in pairs]
    return faults


def _difference(mine: str | None, theirs: str | None) -> str:
    if mine is None:
        return f"README.md leaves out {theirs!r} of {EVALUATION}"
    cells, others = _cells(mine), _cells(theirs or "")
    if not cells or len(cells) != len(others) or cells[0] != others[0]:
        return f"README.md says {mine!r}, {EVALUATION} has {'no such line' if theirs is None else repr(theirs)}"
    same = [cell for cell, other in zip(cells, others, strict=True) if cell == other][:3]
    odd = [(cell, other) for cell, other in zip(cells, others, strict=True) if cell != other]
    says, has = (", ".join(side) for side in zip(*odd, strict=True))
    return f"README.md says {says} for {', '.join(same)}; {EVALUATION} has {has}"


# ---- the model-index


def _index_of(card: str) -> list[dict]:
    """The results of a card's `model-index`, one a metric, as its YAML spells them: every key, nothing read over."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(card)
    metadata = yaml.compose(block.group(2)) if block else None
    models = _listed(_read_node(metadata) if metadata else {}, "model-index", [])
    if odd := [key for model in models for key in model if key not in ("name", "results")]:
        raise ValueError(f"`model-index` must hold `name` and `results`, got `{odd[0]}`")
    results = [result for model in models for result in _listed(model, "results")]
    return [_flat(result, metric) for result in results for metric in _listed(result, "metrics")]


def _listed(mapping: dict, name: str, default=None) -> list[dict]:
    value = mapping.get(name, default)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{name}` must be a list of mappings, got {value!r}")
    return value


def _read_node(node, strict: bool = False):
    """
    A YAML node as JSON. `ValueError` for a key that stands twice (readers take one or the other of its values) or
    brings others (`<<`), and in the `model-index` for a scalar that is neither JSON nor text: of octal, base 60, yes
    and no, … versions of YAML differ.
    """
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise ValueError(f"`{twice[0]}` more than once")
        if "<<" in keys:
            raise ValueError("the merge key `<<`")
        return {key.value: _read_node(value, strict or key.value == "model-index") for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item, strict) for item in node.value]
    if node.style is None and PLAIN.fullmatch(node.value):
        return json.loads(node.value)
    if strict and not node.tag.endswith(":str"):
        raise ValueError(f"{node.value!r}, which is neither text nor a plain JSON number, true, false or null")
    return node.value


def _flat(result: dict, metric: dict) -> dict[tuple, object]:
    """A result with one of its metrics, by (part, key). A source that is our file is left out, whatever repository."""
    parts = {**result, "metrics": metric}
    source = parts.get("source")
    if isinstance(source, dict) and source.keys() == {"name", "url"} and source["name"] == EVALUATION:
        if SOURCE_URL.fullmatch(str(source["url"])):
            del parts["source"]
    flat = {}
    for part, item in parts.items():
        flat |= {(part, key): value for key, value in item.items()} if isinstance(item, dict) else {(part,): item}
    return flat


def _expected_index(evaluation: dict) -> list[dict]:
    """As an export writes it, and the YAML comes back."""
    from huggingface_hub import ModelCardData

    results = eval_results(evaluation, "any/name")
    data = ModelCardData(model_name="any", eval_results=results or None)
    return _index_of(f"---\n{data.to_yaml()}\n---\n")


def _text(value) -> str:
    """By which values are compared: 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True)


def _same(result: dict, other: dict) -> bool:
    return result.keys() == other.keys() and all(_text(result[key]) == _text(other[key]) for key in result)


def _say(result: dict) -> str:
    """A result of the index in words."""
    arguments, config = result.get(("metrics", "args")), result.get(("dataset", "config"))
    error = arguments.get("standard_error") if isinstance(arguments, dict) else None
    error = "" if error is None else f" ± {error}"
    config = f" ({config})" if config else ""
    metric, value, data = (result.get(key) for key in (("metrics", "type"), ("metrics", "value"), ("dataset", "name")))
    return f"{metric} {value}{error} on {data}{config}"


def _some(texts: list[str], shown: int = 3) -> str:
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return "; ".join(texts[:shown]) + more if texts else "no number"


def _index_faults(found: list[dict], expected: list[dict]) -> list[str]:
    def place(result):
        return [_text(result.get(key)) for key in (("dataset", "name"), ("dataset", "config"), ("metrics", "type"))]

    faults = []
    for result in found:
        if any(_same(result, other) for other in expected):
            continue
        alike = [other for other in expected if place(other) == place(result)]
        alike = [other for other in alike if not any(_same(other, one) for one in found)] or alike
        has = " and ".join(_say(other) for other in alike) or "no such result"
        if alike and _say(alike[0]) == _say(result):
            has += f", but {_odd_fields(result, alike[0])}"
        elif not alike:
            has += " (what other tools measured is prose: write it outside `model-index` and the marks)"
        faults.append(f"README.md says {_say(result)}, {EVALUATION} has {has}")
    return faults


def _odd_fields(result: dict, other: dict) -> str:
    keys = [key for key in {**result, **other} if _text(result.get(key)) != _text(other.get(key))]
    return ", ".join(f"`{'.'.join(key)}` {other.get(key)!r} and not {result.get(key)!r}" for key in keys)
