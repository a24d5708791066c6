"""Parameters of a model of the python backend: texts of config.pbtxt, checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lminf_export.errors import InputError, shown
from lminf_export.serve.credentials import secrets_of
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.settings_texts import settings_of_texts

_OF_LOADING = ("provider", "kernels", "threads", "trust_hash")
# What only HTTP has, and what would show secrets.
_NOT_HERE = ("api_keys", "allow_origins", "allow_hosts", "session_secrets")
# Stands for a secret where only the rest is checked.
_SOME_SECRET = "0" * 64


@dataclass(frozen=True)
class Parameters:
    """The parameters of one model, as its configuration has them.

    Attributes:
        bundle: folder, in the version's folder if it is not absolute.
        template: file of a chat template, or None.
        secret_file: of the store of sessions, or None.
        loading: arguments of `load`.
        settings: of the server, as texts.
    """

    bundle: str
    template: str | None
    secret_file: str | None
    loading: dict[str, Any]
    settings: dict[str, str]

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Parameters:
        """Return parameters that are checked as far as they can be without the server's files.

        Raises:
            LminfError: naming the parameter, and its rule.
        """
        for key, value in given.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise InputError(f"parameters: {shown(key)}={shown(value)}: must be texts")
        rest = dict(given)
        rest.pop("EXECUTION_ENV_PATH", None)  # Triton's own
        for name in _NOT_HERE:
            if name in rest:
                raise InputError(f"parameters: {name} has no place in a file that others read")
        loading: dict[str, Any] = {name: rest.pop(name) for name in _OF_LOADING if name in rest}
        if "threads" in loading:
            if not loading["threads"].isdecimal() or int(loading["threads"]) < 1:
                raise InputError(f"threads={shown(loading['threads'])}: must be a number above 0")
            loading["threads"] = int(loading["threads"])
        if "trust_hash" in loading:
            loading["trust_plan"] = loading.pop("trust_hash")
        found = cls(
            rest.pop("bundle", "bundle"),
            rest.pop("template", None),
            rest.pop("session_secret_file", None),
            loading,
            rest,
        )
        has_store = "session_store" in rest
        if found.secret_file is not None and not has_store:
            raise InputError("session_secret_file goes with a session_store")
        settings_of_texts({**rest, "session_secrets": (_SOME_SECRET,) if has_store else ()})
        return found

    def within(self, folder: Path) -> Parameters:
        """Return the parameters with paths that are not absolute in a folder."""
        settings = dict(self.settings)
        for name in ("session_folder", "session_store"):
            if name in settings and "://" not in settings[name]:
                settings[name] = str(folder / settings[name])
        return replace(
            self,
            bundle=str(folder / self.bundle),
            template=None if self.template is None else str(folder / self.template),
            secret_file=None if self.secret_file is None else str(folder / self.secret_file),
            settings=settings,
        )

    def read(self) -> ServeSettings:
        """Return the settings, with what the server's files hold.

        Raises:
            LminfError: a file that cannot be read, or a store without a secret.
        """
        secrets = secrets_of(self.settings.get("session_store"), self.secret_file)
        return settings_of_texts({**self.settings, "session_secrets": secrets})
