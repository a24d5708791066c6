"""Settings out of texts: of command lines and configuration files of other servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lminf_export.errors import ConfigError, shown
from lminf_export.serve.settings import ServeSettings


def settings_of_texts(given: Mapping[str, Any]) -> ServeSettings:
    """Return settings whose values may be texts, such as "8" and "false".

    Raises:
        ConfigError: naming the field, and its rule.
    """
    unknown = given.keys() - {field.name for field in fields(ServeSettings)}
    if unknown:
        raise ConfigError(f"{shown(min(unknown))} is no setting of a server; see ServeSettings")
    try:
        return TypeAdapter(ServeSettings).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {message}" if place else message) from None
