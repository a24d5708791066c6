"""Arguments of the application for Ray Serve: texts of a command line, or values of a file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from lminf_export.errors import ConfigError
from lminf_export.runtime.options import PROVIDERS
from lminf_export.serve.credentials import keys_of, secrets_of
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.settings_texts import settings_of_texts

# Read from files where a replica runs, so that no secret is among an application's arguments.
_OF_FILES = {"api_keys": "api_key_file", "session_secrets": "session_secret_file"}
# A folder has one server; behind a store an answer is durable anyway.
_OF_ONE_SERVER = {"session_folder", "session_durable", "session_disk_bytes"}


class Arguments(BaseModel):
    """Arguments of the application: its deployment's, and any field of `ServeSettings`."""

    # Further ones are settings of a server.
    model_config = ConfigDict(extra="allow", frozen=True)

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
    replicas: int = Field(1, ge=1, description="To begin with, and at least.")
    max_replicas: int | None = Field(None, ge=1, description="More of them when requests queue.")
    num_cpus: float = Field(1.0, gt=0, description="That Ray reserves for a replica.")
    num_gpus: float = Field(0.0, ge=0, description="That Ray reserves for a replica.")
    max_queued: int = Field(256, ge=0, description="Requests that wait at the proxy; more get 503.")
    drain_seconds: float = Field(
        3600.0, gt=0, description="For the answers of a replica that is replaced."
    )

    def checked(self) -> ServeSettings:
        """Return the settings that need no file: what can be checked before a replica runs.

        Raises:
            ConfigError: a name or a value that a server does not take.
        """
        given = self.model_extra or {}
        for name, file in _OF_FILES.items():
            if name in given:
                raise ConfigError(f"{name} would be shown by Ray; name a file by {file}")
        for name in _OF_ONE_SERVER & given.keys():
            raise ConfigError(f"{name} is of one server; replicas share a session_store")
        if self.session_secret_file is not None and "session_store" not in given:
            raise ConfigError("session_secret_file goes with a session_store")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas}: must be at least replicas={self.replicas}"
            )
        return settings_of_texts({name: given[name] for name in given if name != "session_store"})

    def settings(self) -> ServeSettings:
        """Return the settings of a replica, with what its files hold.

        Raises:
            ConfigError: see `checked`.
            InputError: a file that cannot be read, or a store without a secret.
        """
        self.checked()
        given = self.model_extra or {}
        secrets = secrets_of(given.get("session_store"), self.session_secret_file)
        keys = keys_of(None, self.api_key_file)
        return settings_of_texts({**given, "api_keys": keys, "session_secrets": secrets})
