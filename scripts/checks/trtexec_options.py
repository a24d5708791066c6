"""Write the names of trtexec's options, release by release, for the test of `build_engine.sh`.

    git clone --bare https://github.com/NVIDIA/TensorRT
    python -m scripts.checks.trtexec_options TensorRT.git v10.3.0 v10.8.0 v10.16 v11.0 v11.1

reads the sources of trtexec at these tags and writes tests/data/trtexec_options.json. Only names
are kept: every string of the parser that is an option as a whole, the preview features and the
memory pools that it knows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "data" / "trtexec_options.json"
SOURCE = "https://github.com/NVIDIA/TensorRT"
FILE = "samples/common/sampleOptions.cpp"
# Kind of name → how the parser has it.
PATTERNS = {
    "options": r'"--([A-Za-z0-9]+)"',
    "preview": r'featureName == "(\w+)"',
    "pools": r'memPoolName == "(\w+)"',
}


def names(text: str) -> dict[str, list[str]]:
    """Return the names of each kind in the parser's source."""
    return {kind: sorted(set(re.findall(found, text))) for kind, found in PATTERNS.items()}


def _git(repository: Path, *words: str) -> str:
    command = ["git", f"--git-dir={repository}", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path, help="a bare clone, or the .git of a checkout")
    parser.add_argument("tags", nargs="+")
    arguments = parser.parse_args()
    releases = {}
    for tag in arguments.tags:
        commit = _git(arguments.repository, "rev-parse", f"{tag}^{{commit}}").strip()
        found = names(_git(arguments.repository, "show", f"{commit}:{FILE}"))
        if not all(found.values()):
            parser.error(f"{tag}: {FILE} has another form, some names are missing")
        releases[tag] = {"commit": commit, **{kind: " ".join(x) for kind, x in found.items()}}
    content = {"source": SOURCE, "file": FILE, "releases": releases}
    LIST.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
