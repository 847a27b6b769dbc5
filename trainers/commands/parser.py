"""Parsers that know their options by full name alone, and name the nearest for one that they don't know."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from trl import TrlParser

from nanollada.trainers.commands.ending import TRACEBACK, end
from nanollada.trainers.commands.programs import named_file, nearest, shown_name

OUTPUTS = ("output", "output_dir", "trace", "trace_gif")  # options that name what will be written


def check_target(path: str | os.PathLike, argument: str) -> None:
    """
    Whether something can be written there, before the work is done that it is to hold. Makes nothing.

    Raises:
        `ValueError`: if the path leads through a file, or a folder is another user's; of `output_dir` if it is a file.
    """
    rule, path = f"`{argument}` must be a place to write to, got {path}", Path(path).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir() and (there != path or argument == "output_dir"):
        raise ValueError(f"{rule}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{rule}: {there} can't be written to")


class _Strict(argparse.ArgumentParser):
    """What both parsers do with an option that they don't know, and with any other mistake."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **{"prog": shown_name(), **kwargs})
        more = "Of a mistake, show also where in the program it was noticed."
        self.add_argument(TRACEBACK, action="store_true", dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=more)

    def error(self, message: str) -> NoReturn:
        end(" ".join(message.split()))

    def check_names(self, words: list[str]) -> None:
        """Ends the program at a word that has an option's form and is none, before argparse misses others."""
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if name[:1] != "-" or " " in name or _is_number(name) or name in ("-", *self._option_string_actions):
                continue
            others = self.passed_on()
            if name not in others:
                near = nearest("--" + name.strip("-").replace("-", "_"), [*self.names(), *others])
                self.error(f"unknown option `{name}`{near or '; `--help` lists them all'}")

    def names(self) -> list[str]:
        """The options, each in its first long form."""
        longs = [[form for form in action.option_strings if form[:2] == "--"] for action in self._actions]
        return [forms[0] for forms in longs if forms]

    def passed_on(self) -> list[str]:
        """Options that are another program's to read."""
        return []


def _is_number(word: str) -> bool:
    try:
        return float(word) is not None
    except ValueError:
        return False


class PlainParser(_Strict):
    """An `ArgumentParser` that refuses abbreviations and names the option that was meant."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        self.check_names(words)
        return super().parse_known_args(words, namespace)


class Parser(_Strict, TrlParser):
    """
    A `TrlParser` that refuses abbreviations, names the option or the recipe's key that was meant, and knows the
    recipes that come with the package by name (`--config quickstart_ar`).

    Args:
        dataclass_types: As TRL's parser takes them.
        passed_on (`Callable[[], list[str]]`, *optional*): Gives options that are returned as they are, behind the
            objects. Called only when there is one that these dataclasses don't have.
        kwargs: Those of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types, passed_on=None, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self.passes_on, self.recipe = passed_on is not None, None
        if self.passes_on:
            self.passed_on = passed_on
        config = "YAML file with options by name, or the name of a recipe of the package; the command line goes first."
        self.add_argument("--config", metavar="RECIPE", dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=config)

    def parse_args_and_config(self, args=None) -> tuple:
        """
        One object per dataclass, from the command line over the file of `--config`. Mistakes in names and forms end
        the program with status 2.

        Args:
            args (`Iterable[str]`, *optional*): The words. Defaults to this process's.

        Returns:
            `tuple`: The objects; with `passed_on` also the list of the words that are not for them.

        Raises:
            `ValueError`: for what the dataclasses refuse, and a file that there is not.
        """
        import yaml

        words = [str(word) for word in (sys.argv[1:] if args is None else args) if word != TRACEBACK]
        words = self._with_recipe(words)
        self.check_names([word for word in words if word != "--config"])
        try:
            return super().parse_args_and_config(words, return_remaining_strings=self.passes_on)
        except yaml.YAMLError as error:
            raise ValueError(f"{self.recipe} must be YAML: {error}") from error

    def _with_recipe(self, words: list[str]) -> list[str]:
        """The words with `--config FILE` as TRL's parser takes it, the file being one that there is."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            config, words = finder.parse_known_args(words)
        except argparse.ArgumentError as error:
            self.error(str(error))
        if config.config is None:
            return words
        self.recipe = config.config
        return ["--config", str(named_file(self.recipe, "recipe", "config")), *words]

    def set_defaults_with_config(self, **values) -> list[str]:
        names = [action.dest for action in self._actions if action.dest not in ("help", argparse.SUPPRESS)]
        unknown = [key for key in values if key not in names]
        if unknown and self.passes_on:
            names += [name.removeprefix("--") for name in self.passed_on()]
            unknown = [key for key in unknown if key not in names]
        if unknown:
            self.error(f"{self.recipe} has an unknown option `{unknown[0]}`{nearest(unknown[0], names)}")
        return super().set_defaults_with_config(**values)

    def parse_args_into_dataclasses(self, args=None, return_remaining_strings: bool = False, **kwargs) -> tuple:
        *parsed, words = super().parse_args_into_dataclasses(args, True, look_for_args_file=False)
        for name, value in ((name, getattr(part, name, None)) for part in parsed for name in OUTPUTS):
            if isinstance(value, str):
                check_target(value, name)
        if return_remaining_strings:
            return (*parsed, words)
        if words:
            self.error(f"options begin with `--`, got {' '.join(words)}")
        return tuple(parsed)
