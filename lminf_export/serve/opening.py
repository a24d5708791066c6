"""The models that a server is to serve: their names, and the engines that run them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lminf_export.errors import InputError
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.load import load
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.settings import ServeSettings


def named(bundles: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the bundle of each model name, in order.

    Args:
        bundles: folders, or ids on the hub.
        names: of the first of them; the folder's name is that of the others.

    Raises:
        InputError: a name that is none, or two models of one name.
    """
    if len(names) > len(bundles):
        raise InputError(f"{len(names)} names for {len(bundles)} bundles; give one for each")
    found: dict[str, str] = {}
    for place, path in enumerate(bundles):
        name = names[place] if place < len(names) else _folder_name(path)
        if not name or not name.isprintable() or len(name) > 200:
            raise InputError(f"the name {name!r} of {path} is no model name; see --name")
        if name in found:
            raise InputError(f"{found[name]} and {path} are both called {name}; see --name")
        found[name] = path
    return found


def _folder_name(path: str) -> str:
    folder = Path(os.path.abspath(path))
    if not folder.exists():
        return path  # an id on the hub
    return (folder if folder.is_dir() else folder.parent).name


def opened(
    called: Mapping[str, str],
    settings: ServeSettings,
    *,
    template: str | None = None,
    **loading: Any,
) -> dict[str, ServedModel]:
    """Load bundles and start an engine over each; all of them, or none.

    Args:
        called: bundle of each model name.
        settings: slots and queue.
        template: file of a chat template instead of the bundle's own.
        loading: what `load` takes.

    Raises:
        LminfError: see `load`, `ServedModel.of` and `ChatTemplate.from_file`.
    """
    if template is not None and len(called) > 1:
        raise InputError("--template goes with one bundle")
    with ExitStack() as stack:
        models = {}
        for name, path in called.items():
            lm = load(path, **loading)
            own = None if template is None else ChatTemplate.from_file(template, lm.bundle)
            if own is not None:
                _require_template(own)
            models[name] = ServedModel.of(name, lm, settings, own)
            stack.callback(models[name].engine.close)
        stack.pop_all()
    return models


def _require_template(template: ChatTemplate) -> None:
    """Refuse a file that is no template before anything is served.

    Raises:
        LminfError: it can be rendered neither without a system's message nor with one.
    """
    question = [{"role": "user", "content": "a"}]
    try:
        template.turn(question)
    except InputError:
        template.turn(question, system="Be brief.")
