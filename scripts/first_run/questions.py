"""Questions about documented objects, each with one answer."""

import itertools
import random
import re
from collections.abc import Iterable, Iterator

from nanollada.scripts.first_run.documentation import DocumentedObject, joined_lines, plain_text

MAX_ANSWER_CHARACTERS = 120


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, at most 120 characters; empty if it starts with anything else."""
    paragraph = joined_lines(re.split(r"\n\s*\n", plain_text(docstring))[0])
    sentence = re.match(r"(.+?[.!?])(?=\s+[A-Z`(]|$)|.*", paragraph, re.S).group()
    sentence = sentence if sentence.endswith((".", "!", "?")) else sentence + "."
    plain = sentence.isascii() and sentence.isprintable()
    plain = plain and not re.search(r"->|://|<\||\|>|[=:]\.$|\b(e\.g|i\.e|etc|vs)\.$", sentence)
    sized = 15 <= len(sentence) <= MAX_ANSWER_CHARACTERS and len(sentence.split()) >= 3
    return sentence if plain and sized and re.match(r"[A-Z][a-z]*\s", sentence) else ""


def _questions(item: DocumentedObject) -> Iterator[tuple[str, str]]:
    purpose = {"module": "What is the module `{}` for?", "class": "What is the class `{}`?"}
    if summary := first_sentence(item.docstring):
        yield purpose.get(item.kind, f"What does the {item.kind} `{{}}` do?").format(item.name), summary
        yield f"Which {item.kind} has this description: {summary}", f"`{item.name}`"
    if item.kind in ("class", "function"):
        yield f"In which module is the {item.kind} `{item.name.rsplit('.', 1)[-1]}` defined?", f"`{item.module}`"
    if item.arguments is not None:
        listed = ", ".join(f"`{name}`" for name in item.arguments)
        yield f"Which arguments does the {item.kind} `{item.name}` take?", listed or "None."


def question_answer_rows(objects: Iterable[DocumentedObject], count: int, seed: int = 42) -> list[dict]:
    """At most `count` TRL `messages` rows about public objects; answers have at most 120 characters.

    A question with two different answers (a name that several modules define) or with its own answer in it is not
    asked at all. Raises a ValueError if `count` is negative.
    """
    if count < 0:
        raise ValueError(f"`count` must not be negative, got {count}")
    answers: dict[str, str | None] = {}
    public = (item for item in objects if not any(part.startswith("_") for part in item.name.split(".")))
    for question, answer in itertools.chain.from_iterable(map(_questions, public)):
        if answers.setdefault(question, answer) != answer:
            answers[question] = None
    kept = {q: a for q, a in answers.items() if a is not None and a not in q and len(a) <= MAX_ANSWER_CHARACTERS}
    pairs = random.Random(f"{seed}/questions").sample(sorted(kept.items()), len(kept))
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "source": "documentation",
        }
        for question, answer in pairs[:count]
    ]
