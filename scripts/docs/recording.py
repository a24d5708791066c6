"""Recording what the commands of a page print: the place they run in, the file, the comparison."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lminf_export.runtime.environment import environment
from scripts.docs.tables import ROOT

Steps = list[dict[str, str]]


def record(
    description: str | None,
    file: Path,
    recorded: Callable[[Path], Steps],
    differences: Callable[[Steps], list[str]],
) -> None:
    """Run a page's commands in a new folder, and write what they print, or with --check compare.

    Args:
        description: of the program, for --help.
        file: JSON to write.
        recorded: runs the commands in a folder.
        differences: tells, a line each, what is other than in the file.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        steps = recorded(Path(folder))
    if check:
        if differing := differences(steps):
            sys.exit("\n".join(differing))
        return
    file.write_text(
        json.dumps({"environment": environment(), "steps": steps}, indent=1, ensure_ascii=False)
        + "\n",
        encoding="utf-8",
    )
    print(f"wrote {file.relative_to(ROOT)}; now python -m scripts.docs.write_all")


def place_with_demo(folder: Path, bundle: Path | None) -> dict[str, str]:
    """Put the demo model's bundle into a folder as `demo`; return the environment for commands.

    Args:
        folder: to run in.
        bundle: the exported demo model; made by default.
    """
    tools = tools_of_this_tree(folder)
    if bundle is None:
        command = ["lminf-export", "--model", str(ROOT / "examples" / "demo-llama")]
        subprocess.run(
            [*command, "--out", "demo"], cwd=folder, env=tools, check=True, capture_output=True
        )
    else:
        (folder / "demo").symlink_to(bundle)
    return tools


def tools_of_this_tree(folder: Path) -> dict[str, str]:
    """Return an environment in which lminf, lminf-export and python are of this tree."""
    tools = folder / ".tools"
    tools.mkdir()
    modules = {"lminf": "-m lminf_export.cli.main", "lminf-export": "-m lminf_export.cli.export"}
    for name, options in {**modules, "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        (tools / name).chmod(0o755)
    paths = f"{tools}:{os.environ['PATH']}"
    return {**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
