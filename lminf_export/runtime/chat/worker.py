"""The process that renders a chat template, run as a script; it imports jinja2 and nothing of ours.

A template is a program that somebody else wrote. Beside jinja2's sandbox, which keeps it from
Python, this process can open no file, start no process, and has limits of memory and time.

Protocol: JSON, one object a line. First {"template", "memory", "seconds"} (bytes, of processor
time); then for each rendering {"variables", "seconds", "characters"}. Every line is answered by
one of {"ready": true}, {"text": …}, {"refused": reason} (the template's own raise_exception) and
{"failed": reason}.
"""

from __future__ import annotations

import datetime
import html
import json
import pprint
import resource
import signal
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import jinja2.constants
import jinja2.debug
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASON = 500
# jinja2 imports them when they are needed; no file can be opened then.
_NEEDED_LATER = (html, jinja2.constants, jinja2.debug, pprint, textwrap)


class Refused(TemplateError):
    """The template's own objection to the messages."""


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, marks for training; the content stays as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the tag and return its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # `self` may be a value's name
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _require_plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace takes no name such as {name}")


def make_dict(*pairs: Any, **values: Any) -> dict[Any, Any]:
    """Stand in for the class `dict`, whose attributes a template need not see."""
    return dict(*pairs, **values)


def raise_exception(message: object) -> None:
    """Refuse the messages."""
    raise Refused(str(message))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON, without the escapes that HTML needs."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(pattern: str) -> str:
    """Return the date and time of now."""
    return datetime.datetime.now().strftime(pattern)


def compiled(template: str) -> Any:
    """Compile a template as transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": make_dict,
        "namespace": PlainNamespace,
    }
    return environment.from_string(template)


def limit(memory: int) -> None:
    """Give up files, processes and more memory than `memory` bytes, for good."""
    # The time zone and the codec of literals are files that are read when they are needed.
    compiled("{{ '\\n' }}{{ strftime_now('%c') }}{{ 'x' | pprint }}").render()
    # 3: standard streams stay open, and there is no number for a fourth.
    limits = {"AS": memory, "NOFILE": 3, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # a system that has no such limit
            continue


def rendered(template: Any, task: dict[str, Any]) -> str:
    """Render a template.

    Raises:
        OverflowError: the text has more characters than allowed.
    """
    most, count, pieces = task["characters"], 0, []
    for piece in template.generate(task["variables"]):
        count += len(piece)
        if count > most:
            raise OverflowError(f"it writes more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def answered(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what the work returns, or the reason why it cannot be done.

    After `seconds` of processor time the process ends: by the default action of SIGPROF, which
    comes inside one long call too.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return work()
    except Refused as error:
        return {"refused": str(error)[:_REASON]}
    except MemoryError:
        return {"failed": "it needs more memory than it may have"}
    except RecursionError:
        return {"failed": "it calls itself without end"}
    except TemplateSyntaxError as error:
        return {"failed": f"line {error.lineno}: {error.message}"[:_REASON]}
    except Exception as error:  # noqa: BLE001  # a template may raise anything; the reply names it
        return {"failed": f"{type(error).__name__}: {error}"[:_REASON]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer line after line, until there are no more."""
    lines, replies = sys.stdin.buffer, sys.stdout.buffer
    template: Any = None

    def begin(task: dict[str, Any]) -> dict[str, Any]:
        nonlocal template
        limit(task["memory"])
        template = compiled(task["template"])
        return {"ready": True}

    def render(task: dict[str, Any]) -> dict[str, Any]:
        return {"text": rendered(template, task)}

    for line in iter(lines.readline, b""):
        task = json.loads(line)
        work = begin if template is None else render
        reply = answered(partial(work, task), task["seconds"])
        replies.write(json.dumps(reply).encode("ascii") + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
