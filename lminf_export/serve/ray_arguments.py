"""Arguments of the application for Ray Serve: texts of a command line, or values of a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.hub import names_hub
from lminf_export.disk import user_path
from lminf_export.errors import ConfigError, LminfError
from lminf_export.operator.settings import require_one_of
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.options import PROVIDERS
from lminf_export.runtime.parking.file_system_objects import has_keys
from lminf_export.runtime.parking.seal import Secret
from lminf_export.serve.credentials import keys_of, secrets_of
from lminf_export.serve.opening import named
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.settings_texts import rules_broken, settings_of_texts

# Read from files where a replica runs, so that no secret is among an application's arguments.
_OF_FILES = {"api_keys": "api_key_file", "session_secrets": "session_secret_file"}
# A folder has one server; behind a store an answer is durable anyway.
_OF_ONE_SERVER = ("session_folder", "session_durable", "session_disk_bytes")
_PATHS = ("bundle", "template", "api_key_file", "session_secret_file", "session_store")
# Stands for the secret of a store, which is read where a replica runs.
_SOME_SECRET = "0" * 64
_MOST_REPLICAS = 10_000
_MOST_PROCESSORS = 10_000
_MOST_QUEUED = 2**31 - 1
_MOST_SECONDS = 1e9


class ArgumentError(ConfigError, click.ClickException):
    """An argument of the application is wrong; `serve run` prints it in one line and exits 2.

    Args:
        message: naming each argument, and its rule.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        ConfigError.__init__(self, message)
        click.ClickException.__init__(self, self.args[0])

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line as lminf's own commands do; click calls this."""
        click.echo(f"error: {self.message}", file=file, err=file is None)


class Arguments(BaseModel):
    """Arguments of the application: its deployment's, and any field of `ServeSettings`."""

    # Further ones are settings of a server.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    bundle: str = Field(description="Folder of a bundle, where every replica finds it.")
    name: str | None = Field(None, description="Of the model; the folder's by default.")
    template: str | None = Field(None, description="File of a chat template.")
    provider: str = Field(PROVIDERS[0], description="onnxruntime's execution provider.")
    kernels: str = Field("auto", description="Implementation of attention in onnxruntime.")
    threads: int | None = Field(None, ge=1, description="Threads of one operator.")
    trust_hash: str | None = Field(None, description="manifest_sha256 of a bundle with a plan.")
    api_key_file: str | None = Field(None, description="File of API keys, one a line.")
    session_secret_file: str | None = Field(
        None, description="File of the secret that seals the store."
    )
    replicas: int = Field(1, ge=1, le=_MOST_REPLICAS, description="To begin with, and at least.")
    max_replicas: int | None = Field(
        None, ge=1, le=_MOST_REPLICAS, description="More of them when requests queue."
    )
    num_cpus: float = Field(
        1.0, gt=0, le=_MOST_PROCESSORS, description="That Ray reserves for a replica."
    )
    num_gpus: float = Field(
        0.0, ge=0, le=_MOST_PROCESSORS, description="That Ray reserves for a replica."
    )
    max_queued: int = Field(
        256, ge=1, le=_MOST_QUEUED, description="Requests that wait at the proxy; more get 503."
    )
    drain_seconds: float = Field(
        3600.0, gt=0, le=_MOST_SECONDS, description="For the answers of a replica that is replaced."
    )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """Return arguments that are checked as far as they can be without any file.

        Args:
            given: their values, or texts that stand for them.

        Raises:
            ArgumentError: naming each argument that is wrong, and its rule, but no value that may
                be a secret.
        """
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ArgumentError("arguments: expected a table of values by their names")
        own = {name: given[name] for name in given if name in cls.model_fields}
        rest = {name: given[name] for name in given if name not in cls.model_fields}
        wrong = []
        try:
            cls.model_validate(own)
        except ValidationError as error:
            wrong = rules_broken(error)
        try:
            _require_settings(rest, own)
        except ConfigError as error:
            wrong.append(str(error))
        if wrong:
            raise ArgumentError("; ".join(wrong))
        found = cls.model_validate(dict(given))
        try:
            found._check()
        except LminfError as error:
            raise ArgumentError(str(error)) from None
        return found

    def found_here(self) -> Arguments:
        """Return the arguments with absolute paths, behind a look at what they name.

        Raises:
            ArgumentError: a file cannot be read, or is none of its kind.
        """
        try:
            keys_of(None, self.api_key_file)
            if self.session_secret_file is not None:
                for n, text in enumerate(
                    secrets_of(self.session_store, self.session_secret_file), 1
                ):
                    Secret(text, f"{self.session_secret_file}: secret {n}")
            if not names_hub(self.bundle):
                bundle = Bundle.open(user_path(self.bundle, ConfigError))
                if self.template is not None:
                    ChatTemplate.from_file(self.template, bundle)
        except LminfError as error:
            raise ArgumentError(str(error)) from None
        return self.model_copy(update=self._absolute())

    @property
    def session_store(self) -> str | None:
        """The store that replicas share."""
        return (self.model_extra or {}).get("session_store")

    def settings_without_secrets(self) -> ServeSettings:
        """Return the settings of a server but for what its files hold."""
        return _settings_of(self.model_extra or {})

    def settings(self) -> ServeSettings:
        """Return the settings of a replica, with what its files hold.

        Raises:
            InputError: a file that cannot be read, or a store without a secret.
        """
        secrets = secrets_of(self.session_store, self.session_secret_file)
        keys = keys_of(None, self.api_key_file)
        given = self.model_extra or {}
        return settings_of_texts({**given, "api_keys": keys, "session_secrets": secrets})

    def _check(self) -> None:
        """Check what more than one argument decides, and names."""
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas}: must be at least replicas={self.replicas}"
            )
        require_one_of("provider", self.provider, PROVIDERS)
        named([self.bundle], [] if self.name is None else [self.name])

    def _absolute(self) -> dict[str, str]:
        """Return paths as they are seen from other folders than this process's."""
        given = {name: getattr(self, name) for name in _PATHS}
        if names_hub(self.bundle):
            del given["bundle"]
        return {
            name: os.path.abspath(user_path(path, ConfigError))
            for name, path in given.items()
            # A colon is one of a URL, or of what is meant as one.
            if path is not None and not (name == "session_store" and ":" in str(path))
        }


def _settings_of(given: Mapping[str, Any]) -> ServeSettings:
    secrets = (_SOME_SECRET,) if given.get("session_store") is not None else ()
    return settings_of_texts({**given, "session_secrets": secrets})


def _require_settings(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse settings that a replica does not take.

    Raises:
        ConfigError: naming those that are wrong, and no value of a secret.
    """
    for name, file in _OF_FILES.items():
        if name in given:
            raise ConfigError(f"{name} would be shown by Ray; name a file by {file}")
    for name in _OF_ONE_SERVER:
        if name in given:
            raise ConfigError(f"{name} is of one server; replicas share a session_store")
    store = given.get("session_store")
    if store is None and own.get("session_secret_file") is not None:
        raise ConfigError("session_secret_file goes with a session_store")
    if isinstance(store, str | Path) and has_keys(str(store)):
        raise ConfigError(
            "session_store: keys in a URL would be shown by Ray; give them as the store's own "
            "variables or files"
        )
    _settings_of(given)
