"""Options of commands, made from the fields of the dataclasses that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class NamedChoice(click.Choice):
    """Takes one of a few values, by its name or another one.

    Args:
        choices: the values.
        aliases: other name → value.
    """

    def __init__(self, choices: Sequence[str], aliases: Mapping[str, str]) -> None:
        super().__init__(choices)
        self.aliases = dict(aliases)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a name."""
        return super().convert(self.aliases.get(value, value), param, ctx)


def option_of(
    holder: type,
    choices: Mapping[str, Sequence[Any]],
    name: str,
    *declarations: str,
    help: str,
    aliases: Mapping[str, str] | None = None,
    **settings: Any,
) -> Decorator:
    """Return the click option of one field: its name, default and choices are the field's.

    Args:
        holder: a dataclass of options.
        choices: for each field with a few values, those.
        name: of the field, such as "window_size" for `--window-size`.
        declarations: flags, or a flag and the parameter's name, in place of those made from the
            field's name.
        help: text of the option.
        aliases: other names that its choices may be written by.
        settings: more of click's, such as `metavar`.
    """
    (field,) = (field for field in fields(holder) if field.name == name)
    flags = declarations or (f"--{name.replace('_', '-')}",)
    if all(flag.startswith("-") for flag in flags):
        flags = (*flags, name)
    if name in choices:
        settings["type"] = NamedChoice([str(choice) for choice in choices[name]], aliases or {})
    if field.default is MISSING:
        settings.setdefault("required", True)
    elif isinstance(field.default, bool):
        settings.setdefault("is_flag", True)
        settings["default"] = field.default
    elif field.default is not None:
        settings.update(default=_default(field.default, settings.get("type")), show_default=True)
    return click.option(*flags, help=help, **settings)


def _default(value: Any, kind: Any) -> Any:
    return str(value) if isinstance(kind, click.Choice) else value
