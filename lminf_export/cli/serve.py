"""`lminf serve`: bundles over HTTP, as OpenAI's API."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.session_options import (
    kernels_option,
    provider_option,
    threads_option,
    trust_options,
)
from lminf_export.errors import DependencyError, InputError
from lminf_export.serve.credentials import KEY_VARIABLE, SECRET_VARIABLE, keys_of, secrets_of
from lminf_export.serve.settings import ServeSettings

_NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
}
_POSITIVE = click.IntRange(min=1)
_NATURAL = click.IntRange(min=0)
_SECONDS = click.FloatRange(min=0, min_open=True)

# Option → type and help; each sets the setting of its name, whose default it has.
LIMITS: dict[str, tuple[click.ParamType, str]] = {
    "slots": (_POSITIVE, "Sequences of a model that are written side by side."),
    "max-waiting": (_NATURAL, "Sequences that may wait for a slot; more get 429."),
    "max-requests": (_POSITIVE, "Requests read or answered at once; more get 429."),
    "max-prompt-tokens": (_POSITIVE, "Tokens of a prompt."),
    "max-new-tokens": (_POSITIVE, "Tokens that a request may ask for."),
    "default-max-tokens": (_POSITIVE, "Tokens of an answer if the request names no number."),
    "max-choices": (_POSITIVE, "Prompts times n of a request."),
    "max-body-bytes": (_POSITIVE, "Bytes of a request's body."),
    "body-seconds": (_SECONDS, "Time in which a body must arrive."),
    "write-seconds": (_SECONDS, "Time after which a client that reads nothing is cut off."),
    "max-stream-seconds": (_SECONDS, "Time of one answer, waiting included."),
    "event-seconds": (
        click.FloatRange(min=0),
        "Least time between events of a stream; tokens in between come together.",
    ),
    "shutdown-seconds": (_SECONDS, "Time that running answers get after SIGTERM."),
    "session-bytes": (_NATURAL, "Memory of kept conversations."),
    "session-disk-bytes": (_POSITIVE, "Bytes of the folder of conversations."),
    "session-store-seconds": (
        _SECONDS,
        "Time that --session-store may take for one call; then the request gets an error.",
    ),
    "session-max-age": (_SECONDS, "Seconds that a conversation in a folder or a store is kept."),
}


def _limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, (kind, text) in reversed(LIMITS.items()):
        default = getattr(ServeSettings, name.replace("-", "_"))
        option = click.option(f"--{name}", type=kind, default=default, show_default=True, help=text)
        function = option(function)
    return function


@click.command("serve")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen at; 0: a free one, which is printed.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Name of a model, in the order of the bundles; its folder's name by default.",
)
@click.option(
    "--api-key",
    help="Key that each request must bear. Others on this machine see it in the list of "
    f"processes: rather use --api-key-file, or the variable {KEY_VARIABLE}.",
)
@click.option("--api-key-file", type=click.Path(), help="File of keys, one a line.")
@click.option("--template", type=click.Path(), help="Chat template instead of the bundle's own.")
@click.option("--session-folder", type=click.Path(), help="Keep conversations over restarts.")
@click.option(
    "--session-store",
    metavar="URL",
    help="Keep conversations where other servers resume them: a folder that all of them reach, or "
    "what fsspec opens, such as s3://BUCKET/PREFIX.",
)
@click.option(
    "--session-secret-file",
    type=click.Path(),
    help="File of the secret that seals what --session-store holds, the same for all its servers; "
    f"or the variable {SECRET_VARIABLE}. Further lines open sessions, too.",
)
@click.option(
    "--session-durable",
    is_flag=True,
    help="End an answer when its conversation is in the folder, and not before.",
)
@click.option(
    "--prefix-bytes",
    type=_NATURAL,
    help="Memory of states that prompts go on from.  [default: that of all slots]",
)
@click.option("--no-prefix-reuse", is_flag=True, help="Read every prompt from its beginning.")
@click.option("--allow-host", multiple=True, help="Another name of this server; without a key.")
@click.option("--allow-origin", multiple=True, help="Let pages of this origin use the API.")
@_limit_options
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a bundle on the hub.")
@provider_option
@threads_option
@kernels_option
@trust_options
@verbosity_options
@handle_errors
def serve_command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    names: tuple[str, ...],
    api_key: str | None,
    api_key_file: str | None,
    template: str | None,
    session_folder: str | None,
    session_store: str | None,
    session_secret_file: str | None,
    session_durable: bool,
    prefix_bytes: int | None,
    no_prefix_reuse: bool,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    revision: str | None,
    provider: str,
    kernels: str,
    threads: int | None,
    trust_plan: bool | str,
    **limits: int | float,
) -> None:
    """Serve the models in BUNDLEs over HTTP, with the endpoints of OpenAI's API.

    Each bundle is a model with an engine of its own. Without an API key only this machine can
    use the server. SIGTERM or Ctrl-C lets running answers finish; a second one does not.
    """
    _require_packages()
    from lminf_export.serve.app import create_app
    from lminf_export.serve.auth import is_local
    from lminf_export.serve.opening import named, opened
    from lminf_export.serve.run import address_of, bound_socket, run

    keys = keys_of(api_key, api_key_file)
    if session_durable and session_folder is None and session_store is None:
        raise InputError("--session-durable needs a --session-folder to keep conversations in")
    secrets = secrets_of(session_store, session_secret_file)
    if not keys and not is_local(host):
        raise InputError(
            f"--host {host or repr(host)} is reached from other machines, which needs a key: "
            f"--api-key-file, or the variable {KEY_VARIABLE}; without one listen at 127.0.0.1"
        )
    settings = ServeSettings(
        api_keys=keys,
        allow_origins=allow_origin,
        allow_hosts=allow_host,
        session_folder=None if session_folder is None else _folder(session_folder),
        session_store=session_store,
        session_secrets=secrets,
        session_durable=session_durable,
        prefix_reuse=not no_prefix_reuse,
        prefix_bytes=prefix_bytes,
        **limits,  # type: ignore[arg-type]
    )
    called = named(bundles, names)
    with ExitStack() as stack:
        bound = stack.enter_context(bound_socket(host, port))
        models = opened(
            called,
            settings,
            template=template,
            provider=provider,
            kernels=kernels,
            threads=threads,
            trust_plan=trust_plan,
            revision=revision,
        )
        for model in models.values():
            stack.callback(model.engine.close)
        app = create_app(models, settings)
        listed = ", ".join(models)
        run(
            app,
            bound,
            settings,
            lambda: click.echo(f"serving {listed} at {address_of(bound)}"),
        )
    if app.state.serving.sessions.is_stuck:
        os._exit(1)  # Python would wait for the thread that waits for the store


def _require_packages() -> None:
    missing = [name for module, name in _NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        raise DependencyError(
            f"lminf serve needs {', '.join(missing)}: pip install lminf-export[serve]"
        )


def _folder(path: str) -> Path:
    """Return the folder of conversations.

    Raises:
        InputError: an empty name, as of a variable that is not set.
    """
    if not path:
        raise InputError("--session-folder is empty: name a folder, or leave the option out")
    return Path(path)
