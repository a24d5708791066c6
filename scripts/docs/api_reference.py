"""docs/api.md, the reference of the public names, from their docstrings and signatures.

`scripts/docs/write_all.py` writes it. Docstrings are parsed by griffe.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from griffe import Docstring, DocstringSection

import lminf_export

GROUPS = {
    "Functions": (
        "export",
        "rewrite",
        "load",
        "validate",
        "push_to_hub",
        "plan_capacity",
        "export_triton",
    ),
    "Running a bundle": (
        "LanguageModel",
        "State",
        "Snapshot",
        "SamplingConfig",
        "TextCodec",
        "Session",
    ),
    "Many sequences": (
        *("Engine", "EngineStats", "Request", "TokenStream", "Token", "Kept"),
        *("StopText", "StreamText", "Generated", "Piece"),
    ),
    "Conversations": ("ChatTemplate", "Conversation", "Answer", "OneStream"),
    "Parked sessions": ("SessionStore", "Parked"),
    "Bundles": ("Bundle", "Manifest"),
    "Options": ("ExportOptions", "LambdaConfig", "QuantizeConfig", "EngineOptions"),
    "Capacity": ("CapacityOptions", "SessionActivity", "ReplicaSpeed", "CapacityPlan"),
    "Reports": ("ValidationReport", "Progress"),
    "Errors": (
        *("LminfError", "ConfigError", "ModelError", "ExportError"),
        *("BundleError", "EngineError", "SessionError", "InputError", "DependencyError"),
        *("BusyError", "ParkingError", "StaleTurnError", "ParkedSessionError"),
    ),
}
HEAD = """# Public names

<!-- Written by scripts/docs/write_all.py; do not edit. -->

All of these are imported from `lminf_export`, each when it is first used. What is not on this page
may change in any release (see [CHANGELOG.md](../CHANGELOG.md) for what is promised).

Letters in shapes: B batch, S new tokens, K rows of logits, V vocabulary, H query heads,
G key/value heads, C ring slots, N sink tokens, D head dimension.
"""
WIDTH = 100


def page() -> str:
    """Return the whole page.

    Raises:
        SystemExit: a public name is in no group, or in two.
    """
    listed = [name for names in GROUPS.values() for name in names]
    public = sorted({*lminf_export.__all__} - {"__version__"})
    if sorted(listed) != public:
        sys.exit(f"GROUPS must list each public name once: {set(listed) ^ set(public)}")
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts += [f"\n## {title}\n", *(entry(name) for name in names)]
    return "".join(parts)


def entry(name: str) -> str:
    """Return the section of one public name."""
    found = _defined(name)
    lines = [f"\n### `{name}`\n", *_body(name, found)]
    if inspect.isclass(found) and not issubclass(found, Exception):
        for member, value in _members(found):
            lines += [f"\n#### `{name}.{member}`\n", *_body(member, value)]
    return "".join(lines)


def _defined(name: str) -> Any:
    """Return a public object; `export` is a function behind a package of its name."""
    if name == "export":
        return importlib.import_module("lminf_export.export.run").export
    return getattr(lminf_export, name)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself, in order."""
    for name, value in vars(kind).items():
        is_member = inspect.isfunction(value) or isinstance(
            value, property | classmethod | staticmethod
        )
        if not name.startswith("_") and is_member:
            yield name, value


def _body(name: str, found: Any) -> Iterator[str]:
    signature = _signature(name, found)
    if signature:
        yield f"\n```python\n{signature}\n```\n"
    text = inspect.getdoc(getattr(found, "fget", None) or getattr(found, "__func__", found))
    for section in Docstring(text or "", parser="google").parse(
        returns_multiple_items=False, returns_named_value=False, warnings=False
    ):
        yield f"\n{_section(section)}\n"


def _signature(name: str, found: Any) -> str:
    if isinstance(found, property):
        annotation = found.fget.__annotations__.get("return", "")  # type: ignore[union-attr]
        return f"{name}: {annotation}"
    if inspect.isclass(found) and (issubclass(found, Exception) or _is_interface(found)):
        return ""
    signature = inspect.signature(getattr(found, "__func__", found))
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    words = list(_parameters(parameters))
    result = "" if inspect.isclass(found) else f" -> {_text(signature.return_annotation)}"
    line = f"{name}({', '.join(words)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def _is_interface(kind: type) -> bool:
    """Protocols and validated records are not made by callers."""
    return bool(getattr(kind, "_is_protocol", False)) or hasattr(kind, "model_fields")


def _parameters(parameters: list[inspect.Parameter]) -> Iterator[str]:
    keywords = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            yield "*"
        text = parameter.name
        if parameter.annotation is not inspect.Parameter.empty:
            text += f": {_text(parameter.annotation)}"
        if parameter.default is not inspect.Parameter.empty:
            text += f" = {_default(parameter.default)}"
        yield text


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _default(value: Any) -> str:
    if inspect.isfunction(value):
        return value.__name__
    return "…" if "object at" in repr(value) or "factory" in repr(value) else repr(value)


def _section(section: DocstringSection) -> str:
    kind, value = section.kind.value, section.value
    if kind == "text":
        return str(value)
    if kind in ("parameters", "attributes", "raises"):
        title = {"parameters": "Arguments"}.get(kind, kind.capitalize())
        rows = [_row(getattr(x, "name", None) or x.annotation, x.description) for x in value]
        return f"*{title}*\n\n" + "\n".join(rows)
    if kind in ("returns", "yields"):
        return f"*{kind.capitalize()}*\n\n" + "\n".join(_whole(x) for x in value)
    text = getattr(value, "description", None) or getattr(value, "contents", None) or str(value)
    title = section.title or kind.capitalize()
    return f"*{title}* {_joined(str(text))}"


def _row(name: Any, description: str) -> str:
    return textwrap.fill(
        f"- `{name}`: {_joined(description)}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _whole(item: Any) -> str:
    """Return a result's description; griffe takes what stands before a colon for its type."""
    before = f"{item.annotation}: " if item.annotation else ""
    return _joined(f"{before}{item.description}")


def _joined(text: str) -> str:
    return " ".join(text.split())
