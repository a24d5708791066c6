"""Environments that differ from the running one in a few packages, and what the registry serves.

An overlay is a virtual environment without pip that sees the running one's packages behind its own;
pip puts into it what has to differ. It takes seconds and a hundred megabytes where a whole
environment takes minutes and gigabytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def bounds(package: str) -> tuple[str, str | None]:
    """Return the lowest supported version of a dependency and the first that is not tested."""
    found = re.search(
        rf'^  "{re.escape(package)}>=([\w.]+)(?:,<([\w.]+))?",$',
        PYPROJECT.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    if found:
        return found[1], found[2]
    raise SystemExit(f"{PYPROJECT.name} names no lowest version of {package}")


def numbers(version: str) -> tuple[int, ...]:
    """Return the parts of a release's number, to compare it with another."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def newest(package: str) -> str:
    """Return the newest release that the registry serves to this Python.

    Raises:
        SystemExit: the registry does not answer.
    """
    command = (*PIP, "index", "versions", package)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.match(r"\S+ \(([^)]+)\)", answer.stdout)
    if answer.returncode or found is None:
        reason = (answer.stderr.strip() or "no answer").splitlines()[-1]
        raise SystemExit(f"the package registry does not say what versions {package} has: {reason}")
    return found[1].partition("+")[0]


def make_overlay(folder: Path, requirements: list[str]) -> Path:
    """Make or reuse an environment with these packages before the running one's.

    Args:
        folder: of the environment.
        requirements: as pip reads them, "transformers==5.13.0".

    Returns:
        Its Python.

    Raises:
        SystemExit: pip could not install them.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    if done.is_file() and done.read_text() == "\n".join(requirements):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(packages, "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = (*PIP, "--python", python, "install", "--quiet", *requirements)
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not install {' '.join(requirements)}")
    done.write_text("\n".join(requirements))
    return python
