"""Names of transformers' own code, looked up where they are used and nowhere before.

transformers promises nothing about its modeling code: a release may rename a class or move a
function. A name that is gone must cost the families that need it, in one line, and no others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from lminf_export.bundle.versions import package_version, supported_versions
from lminf_export.errors import DependencyError

# Where models are written: in transformers, and in what it fetches from repositories.
_CODE = ("transformers.models.", "transformers_modules.")


class Internals:
    """Access to transformers' own code on behalf of one user of it.

    Args:
        user: what needs the names, a plural for messages: "gptj models".
    """

    def __init__(self, user: str) -> None:
        self.user = user

    def lookup(self, path: str) -> Any:
        """Import a module of transformers and return one of its names.

        Args:
            path: dotted, below transformers: "modeling_utils.ALL_ATTENTION_FUNCTIONS".

        Raises:
            DependencyError: the installed version has no such module or name.
        """
        module, _, name = path.rpartition(".")
        try:
            owner = importlib.import_module(f"transformers.{module}")
        except ImportError as error:
            raise self.missing(f"transformers.{module}") from error
        return self.member(owner, name)

    def member(self, owner: Any, name: str) -> Any:
        """Return an attribute of a module, class or object of transformers.

        Raises:
            DependencyError: it has no such attribute.
        """
        try:
            return getattr(owner, name)
        except AttributeError as error:
            raise self.missing(f"{_name(owner)}.{name}") from error

    def members(self, owner: Any, *names: str) -> tuple[Any, ...]:
        """Return several attributes, in the order of their names; see `member`."""
        return tuple(self.member(owner, name) for name in names)

    @contextmanager
    def replaced(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        """Set an attribute of transformers' code for a while; see `member`."""
        self.member(owner, name)
        with replaced(owner, name, value):
            yield

    def missing(self, name: str) -> DependencyError:
        """Return the error of a name that the installed version does not have."""
        return DependencyError(
            f"transformers {package_version('transformers')} has no {name}, which {self.user} "
            f"need; supported is transformers{supported_versions('transformers')}"
        )


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def code_of(model: Any) -> ModuleType:
    """Return the module in which the class of a model is written."""
    return sys.modules[type(model).__module__]


def codes_of(model: Any) -> tuple[ModuleType, ...]:
    """Return every module in which a model's classes, or their bases, are written.

    A class of a repository may inherit its forward from one of transformers, whose functions are
    then those of the latter's module. The model's own class comes first.
    """
    classes = [c for part in model.modules() for c in type(part).__mro__]
    names = dict.fromkeys(c.__module__ for c in classes if c.__module__.startswith(_CODE))
    return tuple(sys.modules[name] for name in names)


def _name(owner: Any) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return owner.__name__ if isinstance(owner, type) else type(owner).__name__
