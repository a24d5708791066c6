"""Versions of installed packages, as bundles and results record them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

NOT_INSTALLED = "not installed"


def package_version(package: str, missing: str = NOT_INSTALLED) -> str:
    """Return the installed version of a package, or `missing` if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return missing
