"""Parsers that know their options by full name alone, and name the nearest for one that they don't know."""

import argparse
import sys
from typing import NoReturn

from trl import TrlParser

from nanollada.trainers.commands.ending import TRACEBACK, end
from nanollada.trainers.commands.programs import CONSOLE, is_console, named_file, nearest


class _Strict(argparse.ArgumentParser):
    """What both parsers do with an option that they don't know, and with any other mistake."""

    def __init__(self, *args, **kwargs):
        if is_console() and sys.argv[1:]:
            kwargs.setdefault("prog", f"{CONSOLE} {sys.argv[1]}")
        super().__init__(*args, allow_abbrev=False, **kwargs)
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
            longs = [[form for form in action.option_strings if form[:2] == "--"] for action in self._actions]
            near = nearest("--" + name.strip("-").replace("-", "_"), [forms[0] for forms in longs if forms])
            self.error(f"unknown option `{name}`{near or '; `--help` lists them all'}")


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
    """

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        config = "YAML file with options by name, or the name of a recipe of the package; the command line goes first."
        self.add_argument("--config", metavar="RECIPE", dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=config)

    def parse_args_and_config(self, args=None, return_remaining_strings: bool = False) -> tuple:
        """
        One object per dataclass, from the command line over the file of `--config`. Mistakes in names and forms end
        the program with status 2.

        Args:
            args (`Iterable[str]`, *optional*): The words. Defaults to this process's.
            return_remaining_strings (`bool`, defaults to `False`): Options that are not known here are returned, last.

        Raises:
            `ValueError`: for what the dataclasses refuse, and a file that there is not.
        """
        import yaml

        words = [str(word) for word in (sys.argv[1:] if args is None else args) if word != TRACEBACK]
        self.passes_on, self.recipe = return_remaining_strings, None
        words = self._with_recipe(words)
        if not self.passes_on:
            self.check_names(words)
        try:
            return super().parse_args_and_config(words, return_remaining_strings)
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
        if unknown and not self.passes_on:
            self.error(f"{self.recipe} has an unknown option `{unknown[0]}`{nearest(unknown[0], names)}")
        return super().set_defaults_with_config(**values)

    def parse_args_into_dataclasses(self, args=None, return_remaining_strings: bool = False, **kwargs) -> tuple:
        *parsed, words = super().parse_args_into_dataclasses(args, True, look_for_args_file=False)
        if return_remaining_strings:
            return (*parsed, words)
        if words:
            self.error(f"options begin with `--`, got {' '.join(words)}")
        return tuple(parsed)
