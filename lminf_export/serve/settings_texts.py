"""Settings out of texts: of command lines and configuration files of other servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lminf_export.errors import ConfigError
from lminf_export.serve.settings import ServeSettings


def settings_of_texts(given: Mapping[str, Any]) -> ServeSettings:
    """Return settings whose values may be texts, such as "8" and "false".

    Raises:
        ConfigError: naming the field, and its rule.
    """
    try:
        return TypeAdapter(ServeSettings).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {message}" if place else message) from None
