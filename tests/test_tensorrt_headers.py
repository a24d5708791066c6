"""Headers of several releases come from tags of a repository, in the form that tests take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def repository(tmp_path):
    """Two releases: the header holds the tag."""
    place = tmp_path / "origin"
    (place / "include").mkdir(parents=True)
    (place / "big").write_text("not asked for")

    def git(*words):
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "tag.gpgsign=false")
        subprocess.run(["git", *settings, *words], cwd=place, check=True, capture_output=True)

    git("init", "--quiet")
    for tag in ("v10.3.0", "v11.1"):
        (place / "include" / "NvInferRuntime.h").write_text(tag)
        git("add", ".")
        git("commit", "--quiet", "-m", tag)
        git("tag", tag)
    return place


def run(*words):
    command = [sys.executable, "-m", "scripts.checks.tensorrt_headers", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_each_release_gets_a_folder_of_its_own(repository, tmp_path):
    asked = (tmp_path / "headers", "v10.3.0", "v11.1", "--repository", repository)
    done = run(*asked)
    assert (done.returncode, done.stderr) == (0, "")
    folders = done.stdout.strip().split(os.pathsep)
    texts = []
    for folder in folders:
        with open(os.path.join(folder, "NvInferRuntime.h"), encoding="utf-8") as file:
            texts.append(file.read())
    assert texts == ["v10.3.0", "v11.1"]
    assert not (tmp_path / "headers" / "v11.1" / "big").exists()
    # What is there is not fetched again.
    repository.rename(tmp_path / "gone")
    assert run(*asked).stdout == done.stdout


def test_what_cannot_be_had_is_one_line(tmp_path):
    done = run(tmp_path / "headers", "--repository", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("TensorRT's headers cannot be had here: ")
