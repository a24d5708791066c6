"""Which GGUF files make a model: one, or the parts of a split one. Imports no library."""

from __future__ import annotations

import re
from pathlib import Path

from lminf_export.disk import is_dir, is_file
from lminf_export.errors import ModelError, shortened

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 1000
# Of a vision or sound encoder, or of an importance matrix; they lie beside models.
_BESIDE = re.compile(r"(mmproj|imatrix)", re.IGNORECASE)
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Return the GGUF files of a model, in order; () for a path that is none.

    Args:
        path: a file, any part of a split one, or a folder that holds one model as GGUF and none
            in another format.

    Raises:
        ModelError: a part is missing, or a folder holds several models.
    """
    if is_file(path):
        return _parts_of(path) if path.suffix.lower() == SUFFIX or _has_magic(path) else ()
    if not is_dir(path) or any(next(path.glob(kind), None) for kind in _OTHER_WEIGHTS):
        return ()
    found = sorted(x for x in path.glob(f"*{SUFFIX}") if is_file(x) and not _BESIDE.search(x.name))
    if not found:
        return ()
    models = {(match["name"] if (match := _PART.fullmatch(x.name)) else x.name): x for x in found}
    if len(models) > 1:
        names = " and ".join(shortened(x.name, 40) for x in list(models.values())[:2])
        more = f" and {len(models) - 2} more" if len(models) > 2 else ""
        raise ModelError(
            f"model folder {shortened(repr(path.name))} holds several GGUF models, {names}{more}; "
            f"give the file itself as --model"
        )
    return _parts_of(found[0])


def _parts_of(path: Path) -> tuple[Path, ...]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MOST_PARTS:
        raise ModelError(
            f"GGUF file {shortened(path.name)} is no part of a split model: its name must end in "
            f"NUMBER-of-COUNT, with a number from 1 to the count, at most {_MOST_PARTS}"
        )
    parts = tuple(
        path.with_name(f"{match['name']}-{number:05d}-of-{match['count']}{SUFFIX}")
        for number in range(1, count + 1)
    )
    missing = [part.name for part in parts if not is_file(part)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"part {shortened(missing[0])}{more} of a GGUF model in {count} parts is missing; "
            f"fetch all of them into one folder"
        )
    return parts


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False
