"""`lminf chat`: a conversation on a terminal, or line by line from a pipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lminf_export.cli.chat_lines import open_lines
from lminf_export.cli.chat_loop import COMMANDS, Chat, Writing, check_system, say, seen_tokens
from lminf_export.cli.common import handle_errors, read_text, require_unicode, verbosity_options
from lminf_export.cli.sampling_options import sampling_options, stop_option
from lminf_export.cli.session_options import load_options
from lminf_export.errors import InputError

if TYPE_CHECKING:
    from lminf_export.runtime.conversation import Conversation

DEFAULT_ANSWER_TOKENS = 1024


@click.command("chat")
@click.argument("bundle", type=click.Path())
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option("--system-file", type=click.Path(), help="Read the system prompt from a UTF-8 file.")
@click.option(
    "--pin-system",
    is_flag=True,
    help="Refuse to start unless the sink tokens hold the whole system prompt.",
)
@click.option(
    "--template", type=click.Path(), help="A chat template in jinja2, instead of the bundle's own."
)
@click.option(
    "--template-value",
    "template_values",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable of the template, such as enable_thinking=false; repeatable.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_ANSWER_TOKENS,
    show_default=True,
    help="Tokens of an answer at most.",
)
@sampling_options
@stop_option
@click.option("--load-state", type=click.Path(), help="Go on where /save wrote this file.")
@load_options
@verbosity_options
@handle_errors
def chat_command(
    bundle: str,
    system: str | None,
    system_file: str | None,
    pin_system: bool,
    template: str | None,
    template_values: tuple[str, ...],
    max_new_tokens: int,
    sampling: dict[str, Any],
    stop: tuple[str, ...],
    load_state: str | None,
    loading: dict[str, Any],
) -> None:
    """Talk with the model in BUNDLE, for as long as you like.

    Only what is new is read: the cache stays bounded, and a turn costs the same after a day.
    Lines that begin with a slash are commands; /help shows them. Ctrl-C stops an answer, Ctrl-D
    ends. Where stdin is no terminal, each of its lines is a message.
    """
    writing = Writing(max_new_tokens, stop, sampling)
    chats: list[Chat] = []
    lines = open_lines([f"/{name}" for name in COMMANDS], lambda: chats[0].status)
    conversation = _conversation(
        bundle, _system_text(system, system_file), template, _values(template_values), loading
    )
    if load_state is not None:
        _go_on(conversation, load_state)
    if conversation.knows_system:
        check_system(conversation, conversation.system, pinned=pin_system)
    rewrites = conversation.template.rewrites(conversation.system, **_values(template_values))
    if rewrites is not None:
        say(f"note: {rewrites}")
    chats.append(Chat(conversation, writing, pinned=pin_system))
    if lines.is_terminal:
        model_type = conversation.model.bundle.manifest.model_type
        say(f"{model_type}, {seen_tokens(conversation)}; /help shows the commands")
    chats[0].run(lines)


def _conversation(
    bundle: str,
    system: str | None,
    template: str | None,
    values: dict[str, Any],
    loading: dict[str, Any],
) -> Conversation:
    from lminf_export.runtime.chat_template import ChatTemplate
    from lminf_export.runtime.conversation import Conversation
    from lminf_export.runtime.load import load

    model = load(bundle, **loading)
    found = (
        ChatTemplate.of(model.bundle)
        if template is None
        else ChatTemplate.from_file(template, model.bundle)
    )
    return Conversation(model, found, system=system, variables=values)


def _go_on(conversation: Conversation, path: str) -> None:
    """Go on with a conversation in a file, and with its system prompt.

    Raises:
        InputError: --system gives another one.
    """
    asked = conversation.system
    conversation.load(path)
    if asked is not None and asked != conversation.system:
        raise InputError(
            f"the conversation in {path} has another system prompt; leave --system out to go on "
            "with it, or --load-state to begin with yours"
        )


def _system_text(text: str | None, path: str | None) -> str | None:
    if text is not None and path is not None:
        raise InputError("give the system prompt once: --system TEXT or --system-file FILE")
    if path is not None:
        return read_text(path)
    return None if text is None else require_unicode("--system", text)


def _values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return the template's variables; a value that is no JSON is a text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--template-value {pair!r}: expected NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = require_unicode("--template-value", value)
    return found
