"""What a reward is, and how one becomes a function that TRL calls."""

from collections.abc import Callable
from dataclasses import dataclass

Score = Callable[[dict, str], float | None]  # (a row's columns, an answer without space around); `None`: not defined


@dataclass(frozen=True)
class Reward:
    """
    A way to reward answers; [`~trainers.rewards.registry.REWARDS`] has them all.

    Args:
        name (`str`): Under which programs know it.
        help (`str`): One line.
        score (`Callable`): `score(row, answer)`, a number, or `None` where the row has no such reward.
        with_argument (`Callable`, *optional*): From what stands behind `name:` to another `score`; a `ValueError`
            names what is wrong with it. Without it the name stands alone.
    """

    name: str
    help: str
    score: Score
    with_argument: Callable[[str], Score] | None = None


def text_of(completion: str | list[dict]) -> str:
    """An answer's text without space around: a string, or the content of messages."""
    text = (
        completion if isinstance(completion, str) else "".join(message.get("content") or "" for message in completion)
    )
    return text.strip()


def trl_function(name: str, score: Score) -> Callable[..., list[float | None]]:
    """A function with TRL's signature, `function(completions, **columns)`, with a list of each column's values."""

    def function(completions: list, **columns) -> list[float | None]:
        lists = {key: column for key, column in columns.items() if isinstance(column, list)}
        rewards = []
        for place, completion in enumerate(completions):
            row = {key: column[place] for key, column in lists.items()}
            rewards.append(score(row, text_of(completion)))
        return rewards

    function.__name__ = function.__qualname__ = name
    return function
