"""Raise the upper bound of a dependency in pyproject.toml after its newest release was tested.

    python -m scripts.checks.raise_caps transformers
    python -m scripts.checks.raise_caps            every package that has an upper bound

Runs the quick form of the family suite with the newest release that the registry serves. If every
family is exact the bound becomes the next release to come; otherwise nothing is changed, the
families that fail are named and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from scripts.checks.dependency_matrix import report, run_lane
from scripts.checks.overlays import PYPROJECT, bounds, newest, numbers

PACKAGES = ("transformers", "torch", "onnxruntime", "onnx", "onnx-ir", "onnxscript")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", nargs="*", choices=[*PACKAGES, []], help="default: all")
    options = parser.parse_args()
    sys.exit(max(raise_cap(package) for package in options.packages or PACKAGES))


def raise_cap(package: str) -> int:
    """Test the newest release of a package and raise its bound; return 1 if a family fails."""
    low, cap = bounds(package)
    release = newest(package)
    if cap is not None and numbers(release) < numbers(cap):
        print(f"{package}: the newest release, {release}, is within <{cap}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        result = run_lane([f"{package}=={release}"], Path(scratch), [])
    if report(f"{package} {release}", result):
        print(f"{package}: the bound stays at <{cap}")
        return 1
    new = next_minor(release)
    text = PYPROJECT.read_text(encoding="utf-8")
    old = f'"{package}>={low}' + (f",<{cap}" if cap else "") + '"'
    PYPROJECT.write_text(text.replace(old, f'"{package}>={low},<{new}"'), encoding="utf-8")
    print(f"{package}: {release} is exact, the bound is <{new} now")
    return 0


def next_minor(release: str) -> str:
    """Return the first version that no test has seen: "5.25" for "5.24.1"."""
    major, minor = numbers(release)[:2]
    return f"{major}.{minor + 1}"


if __name__ == "__main__":
    main()
