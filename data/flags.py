"""A command-line flag is written once: as a field of an options dataclass, with its help text.

`flag` declares the field. `add_flags` adds the flags of a dataclass to a parser, `flag_rows` writes the table of the
manual, and `range_problems` checks numbers. Every options dataclass of training uses them.
"""

import argparse
import dataclasses
import math
import types
import typing
from typing import Any


def flag(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    off: str | None = None,
    **settings: Any,
) -> Any:
    """A dataclass field that is also the flag `--name`; its type is that of the field.

    A field of type `bool` becomes the switches `--name` and `--no-name`, one of type `list[str]` takes several values.

    Args:
        help: a phrase that says what the value means, its unit, and which value switches it off.
        least, most: the numbers that `range_problems` accepts.
        off: another spelling of `--no-name`, that of the recipe.
        settings: for `ArgumentParser.add_argument`: `choices`, `metavar`, `type`.
    """
    metadata = {"help": help, "least": least, "most": most, "off": off, "settings": settings}
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(group: argparse._ArgumentGroup, options_class: type) -> None:
    """Adds the flags of a dataclass to a group of a parser."""
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        help_text, off, settings = (field.metadata[key] for key in ("help", "off", "settings"))
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is list:
            settings = {"nargs": "+"} | settings
        else:
            settings = {"type": kind} | settings
        group.add_argument(f"--{field.name}", default=field.default, help=help_text, **settings)
        if off:
            settings = {"action": "store_false", "help": f"the same as --no-{field.name}"}
            group.add_argument(f"--{off}", dest=field.name, default=field.default, **settings)


def range_problems(options: Any) -> list[str]:
    """The numbers of a dataclass of flags that are outside of their range, one sentence each."""
    found = []
    for field in dataclasses.fields(options):
        least, most, value = field.metadata["least"], field.metadata["most"], getattr(options, field.name)
        if least is not None and value is not None and not least <= value < math.inf:
            found.append(f"--{field.name} must be at least {least}, got {value}")
        if most is not None and not value <= most:
            found.append(f"--{field.name} must be at most {most}, got {value}")
    return found


def flag_rows(options_class: type) -> list[str]:
    """Rows of a Markdown table: flag, default, meaning."""
    rows = []
    for field in dataclasses.fields(options_class):
        name, off, choices = f"--{field.name}", field.metadata["off"], field.metadata["settings"].get("choices")
        names = f"`{name} {{{','.join(choices)}}}`" if choices else f"`{name}`"
        default = field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, int | float):
            default = f"{default:g}"
        rows.append(f"| {names}{f', `--{off}`' if off else ''} | {default or '-'} | {field.metadata['help']} |")
    return rows
