"""Objects that live in one process and stand for more than their Python attributes."""

from __future__ import annotations

from typing import ClassVar, NoReturn

from lminf_export.errors import InputError


class Unpicklable:
    """A class whose objects are not pickled, nor copied unless it says how, with a clear error.

    Attributes:
        in_its_place: what to do instead, for the message.
    """

    in_its_place: ClassVar[str]

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"a {type(self).__name__} cannot be copied or pickled: {self.in_its_place}"
        )
