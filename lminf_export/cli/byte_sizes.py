"""Options that are numbers of bytes, plain or with a unit."""

from __future__ import annotations

import re

import click

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_FORM = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([KMGTP])i?B?|B)?", re.IGNORECASE)


class ByteSize(click.ParamType):
    """A number of bytes, such as 1073741824, 1GiB or 1Gi; units are binary."""

    name = "bytes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        found = _FORM.fullmatch(str(value).replace("_", "").strip())
        if found is None:
            self.fail(f"{value!r}: expected bytes, such as 1073741824 or 1GiB", param, ctx)
        return int(float(found[1]) * 1024 ** _UNITS[(found[2] or "").upper()])
