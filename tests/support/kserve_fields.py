"""The fields of KServe's resources, as the classes of its Python package name them.

The package is read as text: what it imports is not installed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any


class KServeFields:
    """Fields by class: name in a file → type.

    Args:
        sources: texts of the package's modules of models.
    """

    def __init__(self, sources: list[str]) -> None:
        self._classes: dict[str, dict[str, str]] = {}
        for source in sources:
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef):
                    tables = {
                        target.id: ast.literal_eval(statement.value)
                        for statement in node.body
                        if isinstance(statement, ast.Assign)
                        for target in statement.targets
                        if isinstance(target, ast.Name)
                        and target.id in ("openapi_types", "attribute_map")
                    }
                    if len(tables) == 2:
                        types, names = tables["openapi_types"], tables["attribute_map"]
                        self._classes[node.name] = {names[key]: types[key] for key in types}

    @classmethod
    def from_registry(cls, requirement: str, folder: Path) -> KServeFields:
        """Fetch a release of the package, without what it depends on, and read it."""
        subprocess.run(
            [
                sys.executable,
                *["-m", "pip", "download", "--quiet", "--no-deps", "--dest"],
                folder,
                requirement,
            ],
            check=True,
        )
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "/models/" in name]
            return cls([archive.read(name).decode("utf-8") for name in names])

    def unknown(self, value: Any, kind: str, place: str = "") -> list[str]:
        """Return the places of fields that a class does not have.

        Types of Kubernetes are not entered: they have schemas of their own.
        """
        if isinstance(value, list):
            inner = re.fullmatch(r"list\[(.*)\]", kind)
            assert inner is not None, f"{place}: {kind} is no list"
            parts = (self.unknown(x, inner[1], f"{place}[{i}]") for i, x in enumerate(value))
            return [found for part in parts for found in part]
        fields = self._classes.get(kind)
        if fields is None or not isinstance(value, dict):
            return []
        missing = []
        for name, content in value.items():
            where = f"{place}.{name}".lstrip(".")
            if name not in fields:
                missing.append(where)
            else:
                missing += self.unknown(content, fields[name], where)
        return missing
