"""Where a bundle, or a model's folder, keeps its chat template."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lminf_export.disk import read_json
from lminf_export.errors import BundleError, shown

FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
# Of a processor, which older multimodal models have.
PROCESSOR_FILE = "chat_template.json"
_KEY, _DEFAULT = "chat_template", "default"
_MOST_BYTES = 2**23


def find_template(folder: Path, names: Collection[str]) -> tuple[str, str] | None:
    """Return a template and the name of its file: its own file, or an entry of another one.

    Args:
        folder: where the files are.
        names: files that may be read.

    Returns:
        None if the files have no template.

    Raises:
        BundleError: a file is damaged, or has several templates and none called "default".
    """
    if FILE in names:
        return FILE, read_template(folder / FILE)
    for name in (CONFIG, PROCESSOR_FILE):
        if name in names:
            found = _default(name, _entry(folder / name))
            if found is not None:
                return name, found
    return None


def read_template(path: Path) -> str:
    """Return the text of a template's file.

    Raises:
        BundleError: it cannot be read, is too long, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise BundleError(f"{path} is no chat template: it has more than {_MOST_BYTES} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 (byte {error.start}: {error.reason})") from None
    except ValueError as error:  # a name with a NUL
        raise BundleError(f"cannot read {shown(str(path))}: {error}") from None


def _entry(path: Path) -> Any:
    content = read_json(path, BundleError, str(path))
    if not isinstance(content, dict):
        raise BundleError(f"{path} is damaged: it holds no table")
    return content.get(_KEY)


def _default(name: str, entry: Any) -> str | None:
    """Return the template of an entry: a text, a table of names, or a list of named ones."""
    if isinstance(entry, list):
        entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
    if isinstance(entry, dict) and entry:
        if _DEFAULT not in entry:
            others = ", ".join(repr(key) for key in entry)
            raise BundleError(
                f"{name} has the chat templates {others} and none called 'default'; give one with "
                "--template FILE"
            )
        entry = entry[_DEFAULT]
    return entry if isinstance(entry, str) and entry else None
