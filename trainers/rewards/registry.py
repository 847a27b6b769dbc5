"""The rewards there are, and any Python function by its dotted name. A new one is a file, and its members here."""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable

from nanollada.trainers.rewards import puzzles
from nanollada.trainers.rewards.reward import Reward, trl_function

REWARDS: dict[str, Reward] = {member.name: member for member in puzzles.MEMBERS}


def reward_functions(names: list[str]) -> list[Callable]:
    """
    Reward functions for TRL, `function(completions, **columns) -> list[float | None]`.

    Args:
        names (`list[str]`): Of `REWARDS`, with an argument behind a colon where one takes it (`format:[0-9]+`); or a
            function anywhere, `package.module:function` or `package.module.function`. Modules of the working directory
            are found, too.

    Raises:
        `ValueError`: naming what is no reward; and for no names, and two rewards of one name.
    """
    names = [names] if isinstance(names, str) else names
    if not names:
        raise ValueError(f"`reward_funcs` must name at least one reward, among {', '.join(REWARDS)}, got none")
    functions = [_function(name) for name in names]
    shown = [getattr(function, "__name__", name) for function, name in zip(functions, names, strict=True)]
    if twice := [name for name in shown if shown.count(name) > 1]:
        raise ValueError(f"`reward_funcs` must have different names, under which they are logged, got {twice}")
    return functions


def _function(name: str) -> Callable:
    key, colon, argument = name.partition(":")
    if key not in REWARDS:
        return _imported(name)
    reward = REWARDS[key]
    if not colon:
        return trl_function(name, reward.score)
    if reward.with_argument is None:
        raise ValueError(f"`reward_funcs` {key} takes nothing behind a colon, got {name!r}")
    try:
        return trl_function(name, reward.with_argument(argument))
    except ValueError as error:
        raise ValueError(f"`reward_funcs` {key}: must be followed by {error}, got {name!r}") from error


def _imported(name: str) -> Callable:
    """A function by its dotted name."""
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module or not attribute:
        known = ", ".join(REWARDS)
        raise ValueError(f"`reward_funcs` must be among {known}, or package.module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"`reward_funcs` must name a module that can be imported, got {name!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"`reward_funcs` must name a function of {module}, got {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"`reward_funcs` must name a function, got {name!r}, which is a {type(function).__name__}")
    return _checked(name, function)


def _checked(name: str, function: Callable) -> Callable:
    """The function, whose errors name it, and whose rewards are numbers or `None`."""
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):  # TRL awaits it
        return function

    def rewards_of(**columns) -> list[float | None]:
        try:
            rewards = list(function(**columns))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"`reward_funcs` {name} must reward any answers, but raised {problem}") from error
        for place, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"`reward_funcs` {name} must give a finite number or None, got {reward} for the answer "
                    f"{columns['completions'][place]!r}"
                )
        return rewards

    rewards_of.__name__ = getattr(function, "__name__", name)  # under which TRL logs it
    return rewards_of
