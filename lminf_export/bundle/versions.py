"""Versions of installed packages, as bundles and results record them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

NOT_INSTALLED = "not installed"
DISTRIBUTION = "lminf-export"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*([^;\[]*)")


def package_version(package: str, missing: str = NOT_INSTALLED) -> str:
    """Return the installed version of a package, or `missing` if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return missing


def supported_versions(package: str) -> str:
    """Return the versions of a dependency that have been tested, as in ">=5.0,<5.25".

    They are those of pyproject.toml; empty where this package is not installed.
    """
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return ""
    for line in lines:
        found = _REQUIREMENT.match(line)
        if found and found[1].lower().replace("_", "-") == package and "extra ==" not in line:
            return ",".join(sorted(part.strip() for part in found[2].split(","))[::-1])
    return ""
