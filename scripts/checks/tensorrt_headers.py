"""Fetch TensorRT's public headers of several releases, for the tests of the plugin.

    export TENSORRT_INCLUDE_DIR=$(python -m scripts.checks.tensorrt_headers build/tensorrt-headers)

puts the folder `include` of each tag into FOLDER/TAG/include and prints them as
TENSORRT_INCLUDE_DIR takes them. What is there already is not fetched again. Status 1 and one line
on stderr where they cannot be had. NVIDIA's headers are not ours to commit.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = "https://github.com/NVIDIA/TensorRT"
# The oldest release that the plugin serves, the last of 10, and the newest of 11.
TAGS = ("v10.3.0", "v10.16", "v11.1")
_SECONDS = 300  # for one release
_SECONDS_TO_ANSWER = 20  # after which the repository counts as out of reach


def fetch(repository: str, tag: str, folder: Path) -> Path:
    """Return the folder of one release's headers, fetched if it is not there.

    Raises:
        OSError: there is no git.
        subprocess.SubprocessError: the tag cannot be had, or takes too long.
    """
    target = folder / tag / "include"
    if (target / "NvInferRuntime.h").is_file():
        return target
    clone = folder / ".git"
    if not clone.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _git("init", "--quiet", "--bare", str(clone))
    git = (f"--git-dir={clone}",)
    reference = f"refs/tags/{tag}"
    _git("ls-remote", "--exit-code", repository, reference, seconds=_SECONDS_TO_ANSWER)
    # Of the files only those of `include` are fetched, when they are packed.
    _git(*git, "config", "remote.origin.url", repository)
    wanted = ("--depth", "1", "--filter=blob:none", "origin", f"+{reference}:{reference}")
    _git(*git, "fetch", "--quiet", *wanted)
    packed = _git(*git, "archive", "--format=tar", reference, "include")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder / tag, filter="data")
    return target


def _git(*words: str, seconds: float = _SECONDS) -> bytes:
    done = subprocess.run(["git", *words], capture_output=True, check=True, timeout=seconds)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("tags", nargs="*", default=TAGS)
    parser.add_argument("--repository", default=REPOSITORY, help="a clone, to fetch nothing")
    arguments = parser.parse_args()
    try:
        found = [
            fetch(arguments.repository, tag, arguments.folder.resolve()) for tag in arguments.tags
        ]
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = said.decode(errors="replace").strip().splitlines() or [str(error)]
        print(f"TensorRT's headers cannot be had here: {reason[-1]}", file=sys.stderr)
        sys.exit(1)
    print(os.pathsep.join(map(str, found)))


if __name__ == "__main__":
    main()
