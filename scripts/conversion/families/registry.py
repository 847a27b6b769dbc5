"""The families there are. A new one is a file with `MEMBERS`, and its name here."""

from nanollada.scripts.conversion.families import minimind, nano_llada, transformers_own
from nanollada.scripts.conversion.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for members in (transformers_own, minimind, nano_llada) for family in members.MEMBERS
}


def names(of=lambda family: True) -> list[str]:
    """Names of the families for which something holds."""
    return [name for name, family in FAMILIES.items() if of(family)]


def with_config(family: Family) -> bool:
    """Whether its folders are known by their config.json."""
    return family.owns is None


def named(family: Family) -> bool:
    """Whether `--architecture` may name it."""
    return family.architecture is not None


def written(family: Family) -> bool:
    """Whether a nanollada checkpoint can become one of it."""
    return family.writes is not None


def documentation() -> str:
    """A table of the families: what is read, and whether it is written."""
    rows = [f"| {name} | {family.help} | {'yes' if written(family) else ''} |" for name, family in FAMILIES.items()]
    return "\n".join(["| family | what is read | written, too |", "|---|---|---|", *rows])
