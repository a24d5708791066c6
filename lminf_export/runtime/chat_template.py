"""A model's chat template: messages to text, whole or only what is new behind an answer.

A template is a program from the model's folder. It runs in jinja2's immutable sandbox, in a
process of its own that can open no file; bounded are the template (2²⁰ characters), its text
(2²⁴ characters), its processor time (2 s for each rendering), the process's memory (1 GiB) and the
ranges it may count (100,000).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from lminf_export.bundle.folder import Bundle
from lminf_export.disk import require_path, user_path
from lminf_export.errors import BundleError, InputError, require_instance, shown
from lminf_export.runtime.added_tokens import SIDE_FILES, role_tokens
from lminf_export.runtime.chat.files import find_template, read_template
from lminf_export.runtime.chat.messages import checked_messages
from lminf_export.runtime.chat.process import TemplateProcess
from lminf_export.runtime.text import TextCodec

_THOUGHT = "a thought nobody else has"
# Variables that are not the caller's to set.
_RESERVED = frozenset({"self", "messages", "add_generation_prompt", "system", "codec"})


class ChatTemplate:
    """A chat template; safe to use from several threads.

    Args:
        text: the template, of jinja2.
        tokens: its variables such as bos_token.
        name: of the template, for messages.

    Raises:
        InputError: it is no text.
        BundleError: it is no template.
    """

    def __init__(
        self, text: str, tokens: dict[str, str] | None = None, name: str = "the chat template"
    ) -> None:
        if not isinstance(text, str):
            raise InputError(f"a chat template is a text of jinja2, not a {type(text).__name__}")
        if not isinstance(tokens, Mapping | NoneType):
            raise InputError(f"tokens: expected a table of names, found {shown(tokens)}")
        self.text = text
        self.tokens = dict(tokens or {})
        self._process = TemplateProcess(text, name)
        self._process.check()

    @classmethod
    def of(cls, bundle: Bundle) -> ChatTemplate:
        """Return a bundle's template.

        Raises:
            BundleError: it has none, or a damaged one.
        """
        require_instance("bundle", bundle, Bundle)
        found = find_template(bundle.path, bundle.manifest.files)
        if found is None:
            raise BundleError(
                f"{bundle.path} has no chat template: its model was not made for conversations; "
                "continue texts with lminf generate --follow, or give a template with "
                "--template FILE"
            )
        return cls(found[1], _tokens(bundle), f"the chat template in {found[0]}")

    @classmethod
    def from_file(cls, path: str | Path, bundle: Bundle) -> ChatTemplate:
        """Return the template in a file, with the tokens of a bundle.

        Raises:
            InputError: no path, or no bundle.
        BundleError: it cannot be read, or is no template.
        """
        require_instance("bundle", bundle, Bundle)
        require_path("path", path, InputError)
        place = user_path(path, InputError)
        return cls(read_template(place), _tokens(bundle), f"the chat template {path}")

    def render(self, messages: Any, /, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the text of a conversation, with the tokens that begin it if the template has any.

        Args:
            messages: list of {"role", "content"}, see `checked_messages`.
            add_generation_prompt: let the text end where the model's answer begins.
            variables: of the template, such as enable_thinking; values of JSON.

        Raises:
            InputError: messages of another shape, or that the template refuses, such as a system
                message where the model knows none; or the template fails or exceeds a bound.
        """
        check_variables(variables)
        plain = [self._known(message) for message in checked_messages(messages)]
        return self._process.render(
            {
                "tools": None,
                "documents": None,
                **self.tokens,
                **variables,
                "messages": plain,
                "add_generation_prompt": bool(add_generation_prompt),
            }
        )

    def turn(self, messages: Any, /, *, system: str | None = None, **variables: Any) -> str:
        """Return what is new behind an answer: from its end to where the next answer begins.

        It does not depend on what was said before, which a state has read and may have forgotten,
        except for the system's message, which some templates write or heed at every turn. The text
        begins with what ends an answer, such as <|im_end|>.

        Args:
            messages: what follows the answer, usually one message of the user.
            system: the system's message of the conversation; None for none.
            variables: see `render`.

        Raises:
            InputError: see `render`.
            BundleError: the template does not write an answer as it is, or more than once.
        """
        new = checked_messages(messages)
        said = self.text + "".join(message["content"] for message in [*of_system(system), *new])
        number = next(n for n in range(len(said) + 1) if _answer(n) not in said)
        before = [*of_system(system), *_before(_answer(number))]
        text = self.render([*before, *new], **variables)
        parts = text.split(_answer(number))
        if len(parts) != 2:
            raise BundleError(
                "the chat template does not write an answer once, as it is: nothing can be added "
                "behind one; render the whole conversation for every answer"
            )
        return parts[1]

    def end_ids(
        self, codec: TextCodec, /, *, system: str | None = None, **variables: Any
    ) -> frozenset[int]:
        """Return the special token that ends an answer in this template, none if it is a text.

        Models whose files name another end of text write it, too.

        Raises:
            InputError: see `render`.
            BundleError: see `turn`.
        """
        require_instance("codec", codec, TextCodec)
        ids = codec.ids_behind(self.turn(_before("")[:1], system=system, **variables))
        return frozenset(token for token in ids[:1] if codec.is_special(token))

    def rewrites(self, system: str | None = None, **variables: Any) -> str | None:
        """Say what the template changes of what was said when more is said; None for nothing.

        A stream that reads `turn` behind its own answers keeps all as it was, so it then differs
        from one that reads `render` of the whole conversation.

        Args:
            system: the system's message of the conversation; None for none.
            variables: see `render`.

        Raises:
            InputError: see `render`.
        """
        first = [*of_system(system), *_before("")[:1]]
        more = {"role": "user", "content": "And then?"}
        begun = self.render(first, **variables)
        before = [*of_system(system), *_before(_answer(0))]
        whole = self.render([*before, more], **variables)
        behind = whole.removeprefix(begun).lstrip()  # a model may begin with a space, too
        if not whole.startswith(begun) or not behind.startswith(_answer(0)):
            return (
                "the chat template writes what was said before otherwise when more is said; a "
                "conversation that goes on keeps all as it was read and written"
            )
        thinking = f"<think>\n{_THOUGHT}\n</think>\n\n{_answer(0)}"
        before = [*of_system(system), *_before(thinking)]
        if _THOUGHT not in self.render([*before, more], **variables):
            return (
                "the chat template leaves the reasoning out of earlier answers; a conversation "
                "that goes on keeps it, until the window has passed"
            )
        return None

    def _known(self, message: dict[str, str]) -> dict[str, str]:
        """Call a developer's message a system's, as it is for models that know no developer."""
        if message["role"] != "developer" or "developer" in self.text:
            return message
        return {**message, "role": "system"}


def of_system(text: str | None) -> list[dict[str, str]]:
    """Return a system's message as the beginning of messages; nothing for None.

    Raises:
        InputError: it is no text.
    """
    if not isinstance(text, str | NoneType):
        raise InputError(f"system={shown(text)}: must be a text, or None")
    return [] if text is None else [{"role": "system", "content": text}]


def check_variables(variables: Any) -> None:
    """Refuse variables of a template that are none, or not the caller's to set.

    Raises:
        InputError: they are no table of names, or one of them is reserved.
    """
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise InputError(f"variables: expected a table of names, found {shown(variables)}")
    for name in _RESERVED & variables.keys():
        raise InputError(f"{name} cannot be set as a variable of the chat template: it is reserved")


def _before(answer: str) -> list[dict[str, str]]:
    """Return a short conversation that an answer ends."""
    return [
        {"role": "user", "content": "Good morning."},
        {"role": "assistant", "content": answer},
    ]


def _answer(number: int) -> str:
    return f"Answer {number} is here"


def _tokens(bundle: Bundle) -> dict[str, str]:
    listed = bundle.manifest.files
    return role_tokens(bundle.path, [name for name in SIDE_FILES if name in listed])
