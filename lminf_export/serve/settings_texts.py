"""Settings out of texts: of command lines and configuration files of other servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lminf_export.errors import ConfigError, shown
from lminf_export.serve.settings import ServeSettings

# A text names several of them, with commas between. Keys and secrets may have commas themselves.
_LISTS = ("allow_origins", "allow_hosts")


def settings_of_texts(given: Mapping[str, Any]) -> ServeSettings:
    """Return settings whose values may be texts, such as "8", "false" and "box.lan,box".

    Raises:
        ConfigError: naming each field that is wrong, and its rule.
    """
    known = {field.name for field in fields(ServeSettings)}
    wrong = [
        f"{shown(name)} is no setting of a server; see ServeSettings"
        for name in sorted(given.keys() - known, key=str)
    ]
    settings = {name: _split(name, value) for name, value in given.items() if name in known}
    try:
        found = TypeAdapter(ServeSettings).validate_python(settings)
    except ValidationError as error:
        wrong += rules_broken(error)
    if wrong:
        raise ConfigError("; ".join(wrong))
    return found


def rules_broken(error: ValidationError) -> list[str]:
    """Return "name: rule" for each value that pydantic refused, without the value."""
    found = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {message}" if place else message)
    return found


def _split(name: str, value: Any) -> Any:
    if name in _LISTS and isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return value
