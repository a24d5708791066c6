"""Parameters of a model of the python backend: texts of config.pbtxt, checked in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lminf_export.errors import InputError, shown
from lminf_export.operator.settings import require_one_of
from lminf_export.runtime.kernels import AUTO, NONE
from lminf_export.runtime.options import PROVIDERS
from lminf_export.serve.credentials import secrets_of
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.settings_texts import settings_of_texts

_OF_LOADING = ("provider", "kernels", "threads", "trust_hash")
# What would show secrets in a file that others read.
_SECRET = ("api_keys", "session_secrets")
# Which Triton's python backend reads itself.
_OF_TRITON = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")
# What only a server of HTTP has, or several answers to one request.
_OF_HTTP = (
    "allow_origins", "allow_hosts", "max_requests", "max_connections", "max_choices",
    "max_body_bytes", "max_json_depth", "max_header_bytes", "header_seconds", "body_seconds",
    "write_seconds", "shutdown_seconds",
)  # fmt: skip
_THREADS = re.compile(r"[0-9]{1,4}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
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
            _require_text(key, value)
        rest = dict(given)
        for name in _OF_TRITON:
            rest.pop(name, None)
        for name in _SECRET:
            if name in rest:
                raise InputError(f"parameters: {name} has no place in a file that others read")
        for name in _OF_HTTP:
            if name in rest:
                raise InputError(f"parameters: {name} has no place in Triton; it is of HTTP alone")
        loading: dict[str, Any] = {name: rest.pop(name) for name in _OF_LOADING if name in rest}
        _check_loading(loading)
        if "threads" in loading:
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


def _require_text(key: object, value: object) -> None:
    """Refuse what a configuration cannot hold."""
    if not isinstance(key, str) or not isinstance(value, str):
        raise InputError(f"parameters: {shown(key)}={shown(value)}: must be texts")
    try:
        f"{key}={value}".encode()
    except UnicodeEncodeError:
        raise InputError(f"parameters: {shown(key)}={shown(value)}: no text in UTF-8") from None
    if not value:
        raise InputError(f"parameters: {shown(key)} is empty; leave it out")
    if not value.isprintable():
        raise InputError(f"parameters: {shown(key)}={shown(value)}: must be one line of text")


def _check_loading(loading: Mapping[str, str]) -> None:
    """Check what `load` would find only in the server."""
    if "provider" in loading:
        require_one_of("provider", loading["provider"], PROVIDERS, InputError)
    kernels = loading.get("kernels", AUTO)
    if kernels not in (AUTO, NONE) and not Path(kernels).is_absolute():
        raise InputError(
            f"kernels={shown(kernels)}: must be {AUTO}, {NONE}, or the whole path of a library"
        )
    threads = loading.get("threads", "1")
    if not _THREADS.fullmatch(threads) or int(threads) < 1:
        raise InputError(f"threads={shown(threads)}: must be a number of 1 … 9999")
    if not _SHA256.fullmatch(loading.get("trust_hash", "0" * 64)):
        raise InputError(
            f"trust_hash={shown(loading['trust_hash'])}: must be a SHA-256, 64 hexadecimal digits"
        )
