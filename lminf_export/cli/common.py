"""Shared by all commands: one-line errors, exit codes, logging, the lazy group."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn, ParamSpec, TypeVar

import click

from lminf_export.cli.internal_errors import InternalErrors
from lminf_export.cli.signals import EXIT_INTERRUPTED, begin, ignore_signals, say_interrupted
from lminf_export.cli.terminal import close_stdout, make_streams_safe, say_if_heard
from lminf_export.errors import InputError, LminfError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_ERROR = 2
_MOST_TEXT_BYTES = 2**28
EXIT_BROKEN_PIPE = 141


def handle_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn what a user can cause into one line on stderr and an exit code.

    A LminfError, or an OSError from the system, ends with "error: …" and 2; Ctrl-C with 130; a
    reader that has gone away with 141 and silence. Everything else is a bug: one line, and 3.
    """

    def foreseen(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except LminfError as error:
            fail(str(error))
        except BrokenPipeError:
            close_stdout()
            raise SystemExit(EXIT_BROKEN_PIPE) from None
        except OSError as error:
            if error.errno is None:
                raise
            place = f"{error.filename}: " if error.filename else ""
            fail(f"{place}{error.strerror}")
        except KeyboardInterrupt:
            say_interrupted()
            raise SystemExit(EXIT_INTERRUPTED) from None

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        begin()
        with InternalErrors():
            return foreseen(*args, **kwargs)

    return wrapped


def run_command(command: click.Command, name: str) -> NoReturn:
    """Run a command as a program; a wrong option costs one line, as every other mistake."""
    make_streams_safe()
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        # The command that was being read, such as "lminf eval perplexity".
        context = error.ctx if isinstance(error, click.UsageError) else None
        fail(f"{error.format_message()} (see {context.command_path if context else name} --help)")
    except click.Abort:
        say_interrupted()
        raise SystemExit(EXIT_INTERRUPTED) from None
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:
            ignore_signals()
        raise
    raise SystemExit(code if isinstance(code, int) else 0)


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with 2."""
    say_if_heard(f"error: {' '.join(message.split())}")
    raise SystemExit(EXIT_ERROR)


def one_adapter(_: click.Context, __: click.Parameter, paths: tuple[str, ...]) -> str | None:
    """Return the adapter asked for; of several it is not said which comes first."""
    if len(paths) > 1:
        raise click.BadParameter(f"one adapter can be merged, found {len(paths)}")
    return paths[0] if paths else None


def verbosity_options(function: Callable[P, R]) -> Callable[..., R]:
    """Add -v and -q to a command and set logging up from them."""

    @click.option("-v", "--verbose", count=True, help="Show more messages; twice: all of them.")
    @click.option("-q", "--quiet", is_flag=True, help="Show errors only.")
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        set_up_logging(int(kwargs.pop("verbose")), bool(kwargs.pop("quiet")))  # type: ignore[call-overload]
        return function(*args, **kwargs)

    return wrapped


class _Lines(logging.Formatter):
    """One line a message, in lower case as errors are; a warning is what `inspect` calls a note."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "note" if record.levelno == logging.WARNING else record.levelname.lower()
        return f"{kind}: {super().format(record)}"


def set_up_logging(verbose: int, quiet: bool) -> None:
    """Send the package's messages to stderr: warnings, with -v progress, with -vv everything."""
    logger = logging.getLogger("lminf_export")
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logger.handlers[:] = [handler]
    logger.propagate = False
    levels = {0: logging.WARNING, 1: logging.INFO}
    logger.setLevel(logging.ERROR if quiet else levels.get(verbose, logging.DEBUG))


def read_text(path: str) -> str:
    """Return a UTF-8 file's text.

    Raises:
        InputError: it cannot be read, is not UTF-8, or has more than 256 MiB.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path or 'a file without a name'}: {reason}") from None
    with file:
        return text_of(file, path).replace("\r\n", "\n").replace("\r", "\n")


def text_of(file: BinaryIO, name: str) -> str:
    """Return the UTF-8 text of an opened file.

    Args:
        file: to be read to its end.
        name: of the file, for messages.

    Raises:
        InputError: it is not UTF-8, or has more than 256 MiB.
    """
    content = file.read(_MOST_TEXT_BYTES + 1)
    if len(content) > _MOST_TEXT_BYTES:
        raise InputError(
            f"{name} has more than {_MOST_TEXT_BYTES >> 20} MiB; give the text in pieces, line by "
            "line with lminf generate --follow, or over several runs with --save-state"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8(name, error)) from None


def not_utf8(name: str, error: UnicodeDecodeError) -> str:
    """Return the message for a text that is not UTF-8."""
    return (
        f"{name} is not UTF-8 (byte {error.start}: {error.reason}); convert it, for example with "
        "iconv"
    )


def require_unicode(name: str, text: str) -> str:
    """Return an argument as text, read as UTF-8 whatever this system's encoding is.

    Raises:
        InputError: its bytes are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(not_utf8(name, error)) from None
    return text


def quiet_transformers() -> None:
    """Keep transformers' own warnings and bars out of a command's output; -v shows ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used.

    Args:
        lazy: command name → ("module:attribute", one line of help).
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names, as declared."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; without any, print the help and end well."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is refused with the closest that there are."""
        if args[0] not in self.lazy and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.lazy, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else "there are: "
            ctx.fail(f"no command {args[0]!r}; {hint}{'' if close else ', '.join(self.lazy)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])
